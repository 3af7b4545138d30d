"""What a training run shows and writes beside Detectron2's own output."""

from __future__ import annotations

import logging
import math
import os
import platform
import resource
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from detectron2.data import detection_utils as utils
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm

from ..checkpoint.origin import versions
from ..files import write_json
from .amp import Precision
from .metrics import read_metrics
from .pictures import draw_curves, draw_predictions
from .saving import BEST, FINAL, EvaluateSaved

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# ru_maxrss is in KiB, except on macOS.
_RSS_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def _on_cuda(cfg: CfgNode) -> bool:
    """Whether a run is on GPUs, which a machine may have and not be asked to use."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def _peak_memory_mib(cfg: CfgNode) -> float:
    """Peak memory of this process in MiB: what torch has allocated on CUDA, else resident memory."""
    if _on_cuda(cfg):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS_PER_MIB


class Progress(HookBase):
    """Puts into the progress line what Detectron2 leaves out.

    These are the images per second of all processes together and, on the CPU, this process's peak memory in
    MiB. To be registered after ``IterationTimer``, which measures steps once a few have passed.
    """

    def after_step(self) -> None:
        cfg, storage = self.trainer.cfg, self.trainer.storage
        if not _on_cuda(cfg):
            storage.put_scalar("[metric]max_rss_mib", _peak_memory_mib(cfg), smoothing_hint=False)
        if "time" in storage.histories():
            rate = cfg.SOLVER.IMS_PER_BATCH / storage.history("time").latest()
            storage.put_scalar("[metric]images_per_s", rate)


def show_predictions(trainer: DefaultTrainer) -> None:
    """Draw predictions beside the ground truth of the first test set.

    They are written to ``predictions.png`` in ``OUTPUT_DIR``, and to tensorboard by the hook that does so.
    """
    cfg = trainer.cfg
    path = os.path.join(cfg.OUTPUT_DIR, "predictions.png")
    model = getattr(trainer.model, "module", trainer.model)
    if draw_predictions(cfg, model, cfg.DATASETS.TEST[0], path):
        logger.info("Predictions beside the ground truth of '%s': %s", cfg.DATASETS.TEST[0], path)
        sheet = utils.read_image(path, format="RGB")
        trainer.storage.put_image("predictions", sheet.transpose(2, 0, 1))


class Summary(HookBase):
    """Writes ``curves.png`` and ``summary.json`` in ``OUTPUT_DIR`` once training is complete.

    The last line of the log then tells the AP, the files of the run and how to use them. To be registered on
    all processes, after the hooks that write pictures and ``metrics.json``.

    Args:
        evaluation: the hook that evaluates.
    """

    def __init__(self, evaluation: EvaluateSaved):
        self._evaluation = evaluation
        self._start = 0.0

    def before_train(self) -> None:
        self._start = time.perf_counter()

    def after_train(self) -> None:
        # Also called when training failed.
        if self.trainer.iter < self.trainer.max_iter:
            return
        cfg, latest = self.trainer.cfg, self._evaluation.latest
        peaks = comm.gather(round(_peak_memory_mib(cfg), 1))
        if not comm.is_main_process():
            return
        folder = cfg.OUTPUT_DIR
        metrics, curves = os.path.join(folder, "metrics.json"), os.path.join(folder, "curves.png")
        records = read_metrics(metrics)
        if records:  # the writers of a subclass may be others
            draw_curves(metrics, curves)
            logger.info("Curves of losses, learning rate and AP: %s", curves)
        write_json(os.path.join(folder, "summary.json"), self._summary(records, peaks))
        results = [f"{name} {value:.1f}" for name, value in latest.items() if name.endswith("/AP")]
        names = (f"{FINAL}.pth", "predictions.png", "curves.png", "summary.json")
        logger.info(
            "Training is complete. %s; in %s: %s; next: rev-det predict IMAGES --run %s",
            ", ".join(results) or ("No AP" if latest else "Not evaluated"),
            folder,
            ", ".join(name for name in names if os.path.exists(os.path.join(folder, name))),
            shlex.quote(folder),
        )

    def _summary(self, records: list[dict[str, float]], peaks: list[float]) -> dict[str, Any]:
        trainer, cfg, best = self.trainer, self.trainer.cfg, self._evaluation.best
        series: dict[str, list[float]] = {}
        for record in records:
            for name, value in record.items():
                series.setdefault(name, []).append(value)
        rates = sorted(series.get("[metric]images_per_s", []))
        errors = [error for name in series if name.startswith("inversion_error/") for error in series[name]]
        # NaN is the worst; as text, since JSON has no such number.
        worst = max(errors, key=lambda error: (math.isnan(error), error), default=None)
        return {
            "iterations": trainer.max_iter,
            "resumed_at_iteration": trainer.start_iter,
            "images_per_step": cfg.SOLVER.IMS_PER_BATCH,
            "processes": comm.get_world_size(),
            "accumulate": cfg.SOLVER.ACCUMULATE,
            "activations": cfg.MODEL.REV.ACTIVATIONS,
            "precision": str(Precision.from_config(cfg)),
            "seconds_since_start_or_resume": round(time.perf_counter() - self._start, 1),
            "images_per_s_median": round(rates[len(rates) // 2], 3) if rates else None,
            "peak_memory_mib_by_process": peaks,
            "peak_memory_is": "allocated on CUDA" if _on_cuda(cfg) else "resident",
            "last_losses": {name: series[name][-1] for name in sorted(series) if "loss" in name},
            "largest_inversion_error": worst if worst is None or math.isfinite(worst) else str(worst),
            # The AP of classes without instances is NaN.
            "metrics": {k: v if math.isfinite(v) else None for k, v in self._evaluation.latest.items()},
            "best": {**best, "file": f"{BEST}.pth"} if best else None,
            "datasets": {"train": list(cfg.DATASETS.TRAIN), "test": list(cfg.DATASETS.TEST)},
            "versions": versions(),
            "device": torch.cuda.get_device_name() if _on_cuda(cfg) else platform.machine(),
        }
