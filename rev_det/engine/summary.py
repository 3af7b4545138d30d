"""``summary.json``: what a training run was, and what came of it, in one file."""

from __future__ import annotations

import logging
import math
import os
import platform
import shlex
import time
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint.origin import versions
from ..files import write_json
from .amp import Precision
from .checkpoints import BEST, FINAL, Evaluation
from .hooks import on_cuda, peak_memory_mib
from .metrics import read_metrics

logger = logging.getLogger(__name__)


class Summary(HookBase):
    """Writes ``summary.json`` in ``OUTPUT_DIR`` once training is complete.

    The last line of the log then tells the AP, the files of the run and how to use them. To be registered on
    all processes, after the hooks that write these and ``metrics.json``.

    Args:
        evaluation: the hook that evaluates.
    """

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation
        self._start = 0.0

    def before_train(self) -> None:
        self._start = time.perf_counter()

    def after_train(self) -> None:
        # Also called when training failed.
        if self.trainer.iter < self.trainer.max_iter:
            return
        peaks = comm.gather(round(peak_memory_mib(self.trainer.cfg), 1))
        if not comm.is_main_process():
            return
        path = os.path.join(self.trainer.cfg.OUTPUT_DIR, "summary.json")
        write_json(path, self._collect(peaks))
        logger.info("Training is complete. %s", self._headline())

    def _headline(self) -> str:
        """The AP, where the files are and the next command: what is looked for at the end of a log."""
        folder = self.trainer.cfg.OUTPUT_DIR
        results = [
            f"{name} {value:.1f}" for name, value in self._evaluation.latest.items() if name.endswith("/AP")
        ]
        names = (f"{FINAL}.pth", "predictions.png", "curves.png", "summary.json")
        files = [name for name in names if os.path.exists(os.path.join(folder, name))]
        results = results or ["No AP" if self._evaluation.latest else "Not evaluated"]
        return (
            f"{', '.join(results)}; in {folder}: {', '.join(files)}; "
            f"next: rev-det predict IMAGES --run {shlex.quote(folder)}"
        )

    def _collect(self, peaks: list[float]) -> dict[str, Any]:
        trainer, cfg = self.trainer, self.trainer.cfg
        records = read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
        names = {name for record in records for name in record}
        return {
            "iterations": trainer.max_iter,
            "resumed_at_iteration": trainer.start_iter,
            "images_per_step": cfg.SOLVER.IMS_PER_BATCH,
            "processes": comm.get_world_size(),
            "accumulate": cfg.SOLVER.ACCUMULATE,
            "activations": cfg.MODEL.REV.ACTIVATIONS,
            "precision": str(Precision.from_config(cfg)),
            "seconds_since_start_or_resume": round(time.perf_counter() - self._start, 1),
            "images_per_s_median": _median(records, "[metric]images_per_s"),
            "peak_memory_mib_by_process": peaks,
            "peak_memory_is": "allocated on CUDA" if on_cuda(cfg) else "resident",
            "last_losses": {name: _last(records, name) for name in sorted(names) if "loss" in name},
            "largest_inversion_error": _largest(
                [r[name] for r in records for name in r if name.startswith("inversion_error/")]
            ),
            "metrics": {name: _or_none(value) for name, value in self._evaluation.latest.items()},
            "best": {**self._evaluation.best, "file": f"{BEST}.pth"} if self._evaluation.best else None,
            "datasets": {"train": list(cfg.DATASETS.TRAIN), "test": list(cfg.DATASETS.TEST)},
            "versions": versions(),
            "device": torch.cuda.get_device_name() if on_cuda(cfg) else platform.machine(),
        }


def _or_none(value: float) -> float | None:
    """JSON has no NaN, which is the AP of classes without instances."""
    return value if math.isfinite(value) else None


def _largest(errors: list[float]) -> float | str | None:
    """The largest, of which NaN is the worst; as text where JSON has no number."""
    worst = max(errors, key=lambda error: (math.isnan(error), error), default=None)
    return worst if worst is None or math.isfinite(worst) else str(worst)


def _last(records: list[dict[str, float]], name: str) -> float | None:
    return next((record[name] for record in reversed(records) if name in record), None)


def _median(records: list[dict[str, float]], name: str) -> float | None:
    values = sorted(record[name] for record in records if name in record)
    return round(values[len(values) // 2], 3) if values else None
