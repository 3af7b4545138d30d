"""Loading published and own weights into backbones, pyramids and detectors."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from .files import read_checkpoint, split_digest
from .layouts import convert
from .plan import LoadMode, LoadPlan, plan_load
from .report import LoadReport

logger = logging.getLogger(__name__)

_ZOO = "detectron2://"


def load_pretrained(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Any],
    strict: bool = True,
    *,
    evaluation: bool = False,
) -> LoadReport:
    """Load weights of any supported layout; the report is logged, too.

    The layout is recognised by the keys. Everything is checked before anything is copied: on an error the
    model is as it was. Position embeddings for another grid are interpolated, floating-point values take the
    model's type.

    Args:
        model: a ``RevViT`` or ``RevMViT``, a pyramid over one, or a whole detector.
        source: path or URL, with an optional ``#sha256=<hex>`` that is verified; or what such a file holds.
            Layouts: PySlowFast, mmpretrain, rev_det (a backbone, a pyramid or a whole detector).
        strict: anything missing, unexpected or of another shape is an error. If not, what fits is loaded and
            the rest is reported and logged as a warning. Not counted are, in the report, ``dropped`` and
            ``initialised``.
        evaluation: the model will be used as it is: with ``strict``, weights without its heads, or with heads
            for another number of classes, are an error. Otherwise such heads keep their values, with a
            warning.

    Returns:
        what became of every tensor.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: the file is damaged, of no supported kind or would run code; the weights do not fit the
            model, or are not finite.
    """
    container, name = read_source(source)
    mode = LoadMode(strict=strict, evaluation=evaluation)
    plan = plan_load(model, convert(container, name), name, mode)
    apply_plan(model, plan)
    return plan.report


def read_source(source: str | os.PathLike | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What a source holds, and its name for messages.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`, for what concerns the file alone.
    """
    if isinstance(source, Mapping):
        return source, "the state"
    name, _ = split_digest(source)
    if name.startswith(_ZOO):
        raise ValueError(
            f"{name} is of Detectron2's model zoo, which has no reversible backbone (R-50.pkl is a ResNet). "
            "Set MODEL.WEIGHTS to a Rev-ViT or Rev-MViT file, or to '' to train from scratch"
        )
    return read_checkpoint(source), name


def apply_plan(model: nn.Module, plan: LoadPlan) -> None:
    """Copy a plan's values into its model, and log its report and warnings."""
    # Not strict: the plan has settled what is not in it.
    model.load_state_dict(plan.values, strict=False)
    logger.info("%s", plan.report)
    for warning in plan.warnings:
        logger.warning("%s", warning)
