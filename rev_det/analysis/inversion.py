"""How exactly the inputs of reversible blocks are rebuilt from the last outputs of their run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint import RevCheckpointer
from ..engine import build_detector
from ..modeling.backbone import ReversibleBackbone
from ..modeling.layers import ReversibleBlock

if TYPE_CHECKING:
    from detectron2.config import CfgNode

DEFINITION = (
    "Error of the rebuilt streams relative to the true ones; each run of blocks is inverted from its end, in "
    "the precision it was computed in. bfloat16: inside F and G, the streams are float32."
)


@dataclass(frozen=True)
class InversionError:
    """What is lost on the way back to one block.

    Attributes:
        block: its name in the backbone.
        stage: number of its run of reversible blocks, from 0.
        error: norm of the difference between the rebuilt and the true input streams, over the true one's; all
            blocks from the run's end to this one were inverted.
    """

    block: str
    stage: int
    error: float


class _Calls:
    """Inputs and results of a block's F and G in one forward pass."""

    def __init__(self, block: ReversibleBlock):
        self.block = block
        self.inputs: dict[str, tuple] = {}
        self.results: dict[str, Tensor] = {}

    def record(self, name: str, module: nn.Module, inputs: tuple, result: Tensor) -> None:
        self.inputs[name], self.results[name] = tuple(_copy(x) for x in inputs), result.clone()


def reversible_backbone(cfg: CfgNode) -> ReversibleBackbone:
    """The reversible part of the config's detector, on the CPU, with ``MODEL.WEIGHTS`` if there are any.

    Raises:
        ValueError: the detector has none.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_detector(cfg)
    found = [module for module in model.modules() if isinstance(module, ReversibleBackbone)]
    if not found:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is not reversible: nothing to invert"
        )
    if cfg.MODEL.WEIGHTS:
        RevCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return found[0]


def inversion_errors(
    backbone: ReversibleBackbone, images: Tensor, dtype: torch.dtype | None = None
) -> list[InversionError]:
    """Run the backbone forward without drop path, then each of its runs backward, and compare.

    Args:
        backbone: RevViT or RevMViT; its mode is left as it was.
        images: (B, in_chans, H, W) on the backbone's device.
        dtype: what autocast computes F and G in, both ways; None for float32 without autocast.
    """
    runs = list(_runs(backbone))
    calls = {name: _Calls(block) for run in runs for name, block in run}
    was_training = backbone.training
    backbone.eval()
    autocast = torch.autocast(images.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    with ExitStack() as stack:
        for call in calls.values():
            for branch in "FG":
                hook = getattr(call.block, branch).register_forward_hook(partial(call.record, branch))
                stack.callback(hook.remove)
        with torch.no_grad(), autocast:
            backbone(images)
    errors: list[InversionError] = []
    with torch.no_grad(), autocast:
        for stage, run in enumerate(runs):
            errors += reversed(list(_invert(stage, [(name, calls[name]) for name, _ in run])))
    backbone.train(was_training)
    return errors


def _invert(stage: int, run: list[tuple[str, _Calls]]) -> Iterator[InversionError]:
    """From the last block of a run to the first."""
    last = run[-1][1]
    y1, y2 = last.inputs["G"][0], last.inputs["F"][0] + last.results["G"]
    for i, (name, call) in reversed(list(enumerate(run))):
        true_x2, *args = call.inputs["F"]
        # A run starts with equal streams; after that, X1 is what the G before read.
        true_x1 = run[i - 1][1].inputs["G"][0] if i else true_x2
        x2 = y2 - call.block.G(y1)
        x1 = y1 - call.block.F(x2, *args)
        rebuilt, true = torch.stack([x1, x2]).double(), torch.stack([true_x1, true_x2]).double()
        yield InversionError(name, stage, float((rebuilt - true).norm() / true.norm()))
        y1, y2 = x1, x2


def _runs(backbone: ReversibleBackbone) -> Iterator[list[tuple[str, ReversibleBlock]]]:
    """Names and blocks between stage transitions."""
    run: list[tuple[str, ReversibleBlock]] = []
    for i, block in enumerate(backbone.blocks):
        if isinstance(block, ReversibleBlock):
            run.append((f"blocks.{i}", block))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _copy(x):
    return x.clone() if isinstance(x, Tensor) else x
