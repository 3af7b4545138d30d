"""Parameters and FLOPs of a detector, module by module, as fvcore counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from torch import nn

from ..engine import build_detector

if TYPE_CHECKING:
    from detectron2.config import CfgNode

DEFINITION = (
    "FLOPs as fvcore counts them, a multiplication and addition being one, with fused attention; the heads "
    "are full: RPN.POST_NMS_TOPK_TEST proposals, TEST.DETECTIONS_PER_IMAGE detections."
)


@dataclass(frozen=True)
class ModuleCost:
    """What one module costs, its submodules included.

    Attributes:
        name: dotted; "" is the whole model.
        kind: its class.
        parameters: how many.
        flops: of the inference on one image, a multiplication and addition being one.
    """

    name: str
    kind: str
    parameters: int
    flops: int


def attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """fvcore's rule for ``aten::scaled_dot_product_attention``, which it does not count by itself.

    The two products of (..., Nq, d), (..., Nk, d) and (..., Nk, dv); softmax is not counted, as elsewhere.
    """
    (*batch, queries, width), (*_, keys, _), (*_, value_width) = (get_shape(x) for x in inputs[:3])
    return math.prod(batch) * queries * keys * (width + value_width)


def count_flops(model: nn.Module, inputs: Any) -> FlopCountAnalysis:
    """Detectron2's analysis of a model in inference, with fused attention counted.

    Args:
        model: anything; its mode is set to evaluation.
        inputs: what it takes; for a detector a list of one ``{"image": (3, H, W)}``.
    """
    model.eval()
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    # Operations without a rule are elementwise; which they are is of no use to a reader.
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    return analysis


def analyze_detector(cfg: CfgNode, size: tuple[int, int], depth: int = 3) -> list[ModuleCost]:
    """Cost of every module of a detector for one image.

    The number of boxes decides what the heads cost, so all are full: RPN keeps ``POST_NMS_TOPK_TEST``
    proposals, and the heads ``TEST.DETECTIONS_PER_IMAGE`` detections.

    Args:
        cfg: of the detector.
        size: (H, W) of the image in pixels.
        depth: parts of the names that are listed.

    Returns:
        the whole model first, then depth first.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RPN.NMS_THRESH = 1.0
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_detector(cfg).eval()
    image = torch.zeros(3, *size, dtype=torch.uint8)
    with torch.no_grad():
        flops = count_flops(model, [{"image": image, "height": size[0], "width": size[1]}]).by_module()
    # Detectron2's tracing wraps the model.
    flops = {name.removeprefix("model").removeprefix("."): value for name, value in flops.items() if name}
    parameters = parameter_count(model)
    return [
        ModuleCost(name, type(module).__name__, parameters[name], round(flops.get(name, 0)))
        for name, module in model.named_modules()
        if len(name.split(".")) <= depth and (parameters[name] or flops.get(name))
    ]
