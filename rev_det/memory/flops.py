"""Parameters and FLOPs of a detector's inference, module by module, as fvcore counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from torch import nn

from .table import COUNTED, Figure, Row

DEFINITION = (
    "FLOPs as fvcore counts them, a multiplication and addition being one, with fused attention; the heads "
    "are full: RPN.POST_NMS_TOPK_TEST proposals, TEST.DETECTIONS_PER_IMAGE detections."
)
# The number of boxes decides what the heads cost, so none is dropped.
FULL_HEADS = (
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
)


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
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    # Operations without a rule are elementwise; which they are is of no use to a reader.
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.tracer_warnings("none")


@torch.no_grad()
def analyze_detector(model: nn.Module, size: tuple[int, int], depth: int = 3) -> list[Row]:
    """Cost of every module of a detector for one image.

    Args:
        model: built from a config with `FULL_HEADS`, on the CPU.
        size: (H, W) of the image in pixels.
        depth: parts of the names that are listed.

    Returns:
        parameters and multiply-adds, submodules included; the whole model first, then depth first.
    """
    image = torch.zeros(3, *size, dtype=torch.uint8)
    found = count_flops(model, [{"image": image, "height": size[0], "width": size[1]}]).by_module()
    # Detectron2's tracing wraps the model.
    flops = {name.removeprefix("model").removeprefix("."): round(n) for name, n in found.items() if name}
    parameters = parameter_count(model)
    return [
        Row(
            {"module": name, "class": type(module).__name__},
            {
                "parameters": Figure(parameters[name], "parameters", COUNTED),
                "FLOPs": Figure(flops.get(name, 0), "multiply-adds", COUNTED),
            },
        )
        for name, module in model.named_modules()
        if len(name.split(".")) <= depth and (parameters[name] or flops.get(name))
    ]
