"""Detectors as rev_det's commands build them, and what a config can get wrong about them."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from detectron2.modeling import build_model
from torch import nn

from ..modeling import float32_boxes, low_memory
from ..rules import value_of

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# What Detectron2 and torch raise where a config is wrong: most asserts have no message, registries raise
# KeyError, and sizes come to light as what they break.
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ZeroDivisionError,
)


def build_detector(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``, with `float32_boxes`, and `low_memory` if ``MODEL.LOW_MEMORY`` says so.

    This is the detector that every command works with.

    Args:
        cfg: a config with rev_det's keys; no weights are loaded.

    Raises:
        ValueError: the config cannot be built, or ``MODEL.LOW_MEMORY`` finds nothing to change.
    """
    with explained(cfg):
        model = float32_boxes(build_model(cfg))
    return low_memory(model, cfg.MODEL.REV.KEEP_ATTENTION) if cfg.MODEL.LOW_MEMORY else model


@contextlib.contextmanager
def explained(cfg: CfgNode | None = None) -> Iterator[None]:
    """What fails while parts are built, as a ValueError that says what can be known of the cause.

    Args:
        cfg: to name the heads that ask for a level of the pyramid which nothing makes.
    """
    try:
        yield
    except BUILD_ERRORS as error:
        text, missing = " ".join(map(str, error.args)), error.args[:1]
        if " " not in text:
            # An assertion without a message, or a mere key: the line that raised it says more.
            line = traceback.extract_tb(error.__traceback__)[-1].line
            text = f"{type(error).__name__} {text!r} in `{line}`" if text else f"`{line}` failed"
        if cfg is not None and isinstance(error, KeyError):
            heads = (f"MODEL.{name}.IN_FEATURES" for name in ("RPN", "ROI_HEADS", "RETINANET"))
            key = next((key for key in heads if set(missing) & set(value_of(cfg, key))), None)
            text = f"{key}: {error}" if key else text
        if "in anchor generator" in text:
            text += (
                " MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS have one entry, or one for each of the "
                "head's IN_FEATURES"
            )
        raise ValueError(f"the config cannot be built: {text}") from error
