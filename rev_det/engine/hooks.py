"""What a training run shows beside Detectron2's own output."""

from __future__ import annotations

import logging
import os
import resource
import sys
from typing import TYPE_CHECKING

import torch
from detectron2.data import detection_utils as utils
from detectron2.engine import HookBase

from .metrics import read_metrics
from .pictures import draw_curves, draw_predictions

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# ru_maxrss is in KiB, except on macOS.
_RSS_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def on_cuda(cfg: CfgNode) -> bool:
    """Whether a run is on GPUs, which a machine may have and not be asked to use."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def peak_memory_mib(cfg: CfgNode) -> float:
    """Peak memory of this process in MiB: what torch has allocated on CUDA, else resident memory."""
    if on_cuda(cfg):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_MIB


class PeakMemory(HookBase):
    """Puts the process's peak memory (MiB) in the progress line of runs on the CPU.

    Detectron2 prints the peak of the CUDA memory alone.
    """

    def after_step(self) -> None:
        cfg = self.trainer.cfg
        if not on_cuda(cfg):
            self.trainer.storage.put_scalar("[metric]max_rss_mib", peak_memory_mib(cfg), smoothing_hint=False)


class Throughput(HookBase):
    """Puts the images per second of all processes together in the progress line.

    To be registered after ``IterationTimer``, which measures the time of steps once a few have passed.

    Args:
        images: of one step.
    """

    def __init__(self, images: int):
        self._images = images

    def after_step(self) -> None:
        storage = self.trainer.storage
        if "time" in storage.histories():
            rate = self._images / storage.history("time").latest()
            storage.put_scalar("[metric]images_per_s", rate)


class Predictions(HookBase):
    """Draws predictions beside the ground truth of the first test set after each evaluation.

    They are written to ``predictions.png`` in ``OUTPUT_DIR``, and to tensorboard. To be registered on the
    first process, before the hook that writes there.

    Args:
        period: as that of the evaluation; 0 for the end of training alone.
    """

    def __init__(self, period: int):
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done < self.trainer.max_iter:
            self._draw()

    def after_train(self) -> None:
        # Also called when training failed.
        if self.trainer.iter >= self.trainer.max_iter:
            self._draw()

    def _draw(self) -> None:
        cfg = self.trainer.cfg
        path = os.path.join(cfg.OUTPUT_DIR, "predictions.png")
        model = getattr(self.trainer.model, "module", self.trainer.model)
        if not draw_predictions(cfg, model, cfg.DATASETS.TEST[0], path):
            return
        logger.info("Predictions beside the ground truth of '%s': %s", cfg.DATASETS.TEST[0], path)
        sheet = utils.read_image(path, format="RGB")
        self.trainer.storage.put_image("predictions", sheet.transpose(2, 0, 1))


class Curves(HookBase):
    """Draws ``curves.png`` in ``OUTPUT_DIR`` once training is complete.

    To be registered on the first process, after the hook that writes ``metrics.json``.
    """

    def after_train(self) -> None:
        # Also called when training failed.
        if self.trainer.iter < self.trainer.max_iter:
            return
        folder = self.trainer.cfg.OUTPUT_DIR
        path, metrics = os.path.join(folder, "curves.png"), os.path.join(folder, "metrics.json")
        # The writers of a subclass may be others.
        if not read_metrics(metrics):
            return
        draw_curves(metrics, path)
        logger.info("Curves of losses, learning rate and AP: %s", path)
