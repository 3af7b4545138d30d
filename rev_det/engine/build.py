"""Detectors as rev_det's commands build them, and what a config can get wrong about them."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from detectron2.modeling import build_backbone, build_model
from torch import nn

from ..modeling import float32_boxes

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
    """Detectron2's ``build_model``, with `float32_boxes`: the detector that every command works with.

    Args:
        cfg: a config with rev_det's keys; no weights are loaded.

    Raises:
        ValueError: the config cannot be built.
    """
    with explained(cfg):
        return float32_boxes(build_model(cfg))


@contextlib.contextmanager
def explained(cfg: CfgNode | None = None) -> Iterator[None]:
    """What fails while parts are built, as a ValueError that says what can be known of the cause.

    Args:
        cfg: to look for levels of the pyramid that a head asks for and nothing makes.
    """
    try:
        yield
    except BUILD_ERRORS as error:
        problem = _missing_level(cfg, error) if cfg is not None else None
        raise ValueError(problem or f"the config cannot be built: {_text(error)}") from error


def _text(error: Exception) -> str:
    text = " ".join(map(str, error.args))
    if "in anchor generator" in text:
        return (
            f"{text} MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS have one entry, or one for each of the "
            "head's IN_FEATURES"
        )
    if " " in text:
        return text
    # An assertion without a message, or a mere key: the line that raised it says more.
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__} {text!r} in `{line}`" if text else f"`{line}` failed"


def _missing_level(cfg: CfgNode, error: Exception) -> str | None:
    if not isinstance(error, KeyError) or not error.args:
        return None
    for head in ("RPN", "ROI_HEADS", "RETINANET"):
        wanted = cfg.MODEL[head].IN_FEATURES
        if error.args[0] in wanted:
            levels = list(build_backbone(cfg).output_shape())
            missing = [name for name in wanted if name not in levels]
            if missing:
                return (
                    f"MODEL.{head}.IN_FEATURES has {missing}, which {cfg.MODEL.BACKBONE.NAME} does not "
                    f"return; allowed are {levels}"
                )
    return None
