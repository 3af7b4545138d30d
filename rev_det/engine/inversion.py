"""A check, while training goes on, that activations are rebuilt as they were."""

from __future__ import annotations

import logging

import torch
from detectron2.engine import HookBase
from torch import Tensor

from ..modeling.backbone import ReversibleBackbone, Run
from ..modeling.reversible import invert_blocks

logger = logging.getLogger(__name__)


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
            for backbone in self._backbones():
                backbone.observer = self._observe

    def after_step(self) -> None:
        if not self._is_due():
            return
        for backbone in self._backbones():
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

    def _backbones(self) -> list[ReversibleBackbone]:
        return [m for m in self.trainer.model.modules() if isinstance(m, ReversibleBackbone)]

    @torch.no_grad()
    def _observe(self, run: Run) -> None:
        x1, x2 = invert_blocks(run.blocks, *run.y, *run.args, masks=run.masks)
        error = torch.stack([(x1 - run.x).norm(), (x2 - run.x).norm()]).norm()
        name = f"blocks.{run.first}-{run.first + len(run.blocks) - 1}"
        # Of several forward passes in one step the worst counts.
        error = error / (run.x.norm() * 2**0.5)
        self._errors[name] = torch.maximum(error, self._errors.get(name, error))
