"""What a training run shows beside Detectron2's own output."""

from __future__ import annotations

import logging
import os
import resource
import sys

import torch
from detectron2.engine import HookBase

from .pictures import draw_curves, draw_predictions

logger = logging.getLogger(__name__)

# ru_maxrss is in KiB, except on macOS.
_RSS_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


class PeakMemory(HookBase):
    """Puts the process's peak memory (MiB) in the progress line where there is no CUDA.

    Detectron2 prints the peak of the CUDA memory, and nothing on the CPU.
    """

    def after_step(self) -> None:
        if not torch.cuda.is_available():
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_MIB
            self.trainer.storage.put_scalar("[metric]max_rss_mib", peak, smoothing_hint=False)


class RunPictures(HookBase):
    """Draws ``curves.png`` and ``predictions.png`` in ``OUTPUT_DIR`` once training is complete.

    To be registered on the first process, after the hook that writes ``metrics.json``.
    """

    def after_train(self) -> None:
        # Also called when training failed.
        if self.trainer.iter < self.trainer.max_iter:
            return
        cfg = self.trainer.cfg
        path = os.path.join(cfg.OUTPUT_DIR, "curves.png")
        draw_curves(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), path)
        logger.info("Curves of losses, learning rate and AP: %s", path)
        if cfg.DATASETS.TEST:
            path = os.path.join(cfg.OUTPUT_DIR, "predictions.png")
            model = getattr(self.trainer.model, "module", self.trainer.model)
            draw_predictions(cfg, model, cfg.DATASETS.TEST[0], path)
            logger.info("Predictions beside the ground truth of '%s': %s", cfg.DATASETS.TEST[0], path)
