"""How exactly the inputs of reversible blocks are rebuilt: in training, or block by block."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from detectron2.engine import HookBase
from torch import Tensor

from ..checkpoint import RevCheckpointer
from ..modeling.backbone import ReversibleBackbone, Run
from ..modeling.reversible import invert_blocks, run_blocks
from .build import build_detector

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)
DEFINITION = (
    "Error of the rebuilt streams relative to the true ones; each run of blocks is inverted from its end, in "
    "the precision it was computed in. bfloat16: inside F and G, the streams are float32."
)


class InversionCheck(HookBase):
    """Logs how far the rebuilt input of each run of reversible blocks is from the true one.

    In some iterations each run is inverted from its end to its beginning, once, in the precision of training
    and with the same drop path. What is logged, as ``inversion_error/blocks.A-B`` (numbers of the first and
    the last block), is the norm of the difference over that of the true input. About 1e-6 is usual in
    float32, 1e-3 with F and G in bfloat16.

    Args:
        period: iterations from one check to the next; 0 for none.
        threshold: errors above it, or NaN, are warned of.
    """

    def __init__(self, period: int, threshold: float):
        self._period = period
        self._threshold = threshold
        self._errors: dict[str, Tensor] = {}

    def before_step(self) -> None:
        if self._is_due():
            for backbone in _reversible(self.trainer.model):
                backbone.observer = self._observe

    def after_step(self) -> None:
        if not self._is_due():
            return
        for backbone in _reversible(self.trainer.model):
            backbone.observer = None
        errors = {name: error.item() for name, error in self._errors.items()}
        self._errors = {}
        for name, error in errors.items():
            self.trainer.storage.put_scalar(f"inversion_error/{name}", error, smoothing_hint=False)
            if not error <= self._threshold:
                logger.warning(
                    "Iteration %d: the input of %s of the backbone was rebuilt with relative error %.2g, "
                    "above MODEL.REV.INVERSION_THRESHOLD %g, so its gradients are inexact. `rev-det analyze "
                    "CONFIG --inversion` shows the error of each block. SOLVER.AMP.ENABLED False makes it "
                    "smaller; MODEL.REV.ACTIVATIONS checkpoint does without rebuilding",
                    self.trainer.iter,
                    name,
                    error,
                    self._threshold,
                )

    def _is_due(self) -> bool:
        return self._period > 0 and (self.trainer.iter + 1) % self._period == 0

    @torch.no_grad()
    def _observe(self, run: Run) -> None:
        rebuilt = invert_blocks(run.blocks, *run.y, *run.args, masks=run.masks)
        error = relative_error(rebuilt, (run.x, run.x))
        name = f"blocks.{run.first}-{run.first + len(run.blocks) - 1}"
        # Of several forward passes in one step the worst counts.
        self._errors[name] = torch.maximum(error, self._errors.get(name, error))


def relative_error(rebuilt: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> Tensor:
    """Norm of the difference of two streams from the true ones, over the norm of these; in float64."""
    rebuilt, true = torch.stack(rebuilt).double(), torch.stack(true).double()
    return (rebuilt - true).norm() / true.norm()


def reversible_backbone(cfg: CfgNode) -> ReversibleBackbone:
    """The reversible part of the config's detector, with ``MODEL.WEIGHTS`` if there are any.

    Raises:
        ValueError: the detector has none.
    """
    model = build_detector(cfg)
    found = _reversible(model)
    if not found:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is not reversible: nothing to invert"
        )
    if cfg.MODEL.WEIGHTS:
        RevCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return found[0]


@torch.no_grad()
def block_errors(
    backbone: ReversibleBackbone, images: Tensor, dtype: torch.dtype | None = None
) -> list[dict[str, float]]:
    """Run the backbone forward without drop path, then each of its runs backward, and compare.

    Args:
        backbone: RevViT or RevMViT; its mode is left as it was.
        images: (B, in_chans, H, W) on the backbone's device.
        dtype: what autocast computes F and G in, both ways; None for float32 without autocast.

    Returns:
        for each run of reversible blocks, by a block's name, the `relative_error` of its input streams when
        all blocks from the run's end to this one were inverted; the first block first.
    """
    found: list[dict[str, float]] = []

    def invert(run: Run) -> None:
        true = [(run.x, run.x)]
        for block in run.blocks[:-1]:
            true.append(run_blocks([block], *true[-1], *run.args))
        errors, streams = {}, run.y
        for i, block in reversed(list(enumerate(run.blocks))):
            streams = invert_blocks([block], *streams, *run.args)
            errors[f"blocks.{run.first + i}"] = relative_error(streams, true[i]).item()
        found.append(dict(reversed(errors.items())))

    was_training, backbone.observer = backbone.training, invert
    try:
        with torch.autocast(images.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            backbone.eval()(images)
    finally:
        backbone.observer = None
        backbone.train(was_training)
    return found


def _reversible(model: torch.nn.Module) -> list[ReversibleBackbone]:
    return [m for m in model.modules() if isinstance(m, ReversibleBackbone)]
