"""Schedules written for one batch size, rescaled to another."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..rules import check_config, value_of

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

_LR_SCALING = {"sqrt": math.sqrt, "linear": lambda factor: factor, "none": lambda factor: 1.0}
# Counted in iterations; with smaller batches the same images take more of them. CHECKPOINT_PERIOD stays: it
# bounds what an interruption may cost, which is time and not images.
_RATES = ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END")
_ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD")


def rescale_schedule(cfg: CfgNode, fixed: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Fit the learning rate and the schedule of a config to its batch size (in place).

    They are written for ``SOLVER.REFERENCE_IMS_PER_BATCH`` images per step, and ``SOLVER.IMS_PER_BATCH`` are
    trained on. With ``SOLVER.MAX_ITER`` among ``fixed`` the iterations are somebody's own, and none is
    stretched. The learning rate changes by the square root of their ratio (which suits AdamW), by the ratio
    itself or not at all, as ``SOLVER.LR_SCALING`` says; iterations are stretched, so that as many images are
    seen as before. Afterwards the reference is the batch size itself: a config is not rescaled twice.

    Args:
        cfg: a config with rev_det's keys, not frozen.
        fixed: keys that are left as they are, for instance those given on the command line.

    Returns:
        by key, the old and the new value of what was changed.

    Raises:
        ValueError: ``SOLVER.LR_SCALING`` is unknown, a batch size is not positive, or Detectron2's own
            ``SOLVER.REFERENCE_WORLD_SIZE`` would rescale once more.
    """
    check_config(cfg, "SOLVER.LR_SCALING", "SOLVER.REFERENCE_IMS_PER_BATCH", "SOLVER.IMS_PER_BATCH")
    solver = cfg.SOLVER
    reference, batch = solver.REFERENCE_IMS_PER_BATCH, solver.IMS_PER_BATCH
    if reference == 0:
        return {}
    if solver.REFERENCE_WORLD_SIZE:
        raise ValueError(
            f"SOLVER.REFERENCE_IMS_PER_BATCH is {reference} and SOLVER.REFERENCE_WORLD_SIZE "
            f"{solver.REFERENCE_WORLD_SIZE}: both would rescale the schedule; set one of them to 0"
        )
    solver.REFERENCE_IMS_PER_BATCH = batch
    factor = batch / reference
    if factor == 1:
        return {}
    rate = _LR_SCALING[solver.LR_SCALING](factor)
    changes: dict[str, tuple[Any, Any]] = {}
    for key in (*_RATES, *(() if "SOLVER.MAX_ITER" in fixed else _ITERATIONS)):
        before = value_of(cfg, key)
        after = before * rate if key in _RATES else _stretch(before, factor)
        if key not in fixed and before != after:
            changes[key] = before, after
    cfg.merge_from_list([word for key, (_, after) in changes.items() for word in (key, after)])
    if changes:
        logger.info(
            "The schedule is written for %d images per step and was rescaled to %d: %s. "
            "SOLVER.REFERENCE_IMS_PER_BATCH 0 leaves it as it is written",
            reference,
            batch,
            ", ".join(f"{key} {_text(before)} -> {_text(after)}" for key, (before, after) in changes.items()),
        )
    return changes


def warn_of_long_warmup(cfg: CfgNode) -> None:
    """Say so if the learning rate is warmed up until it falls, so that it does not reach ``SOLVER.BASE_LR``.

    It falls at the first of ``SOLVER.STEPS``, and along a cosine to one half in the middle of the schedule.
    """
    solver = cfg.SOLVER
    steps = solver.STEPS[:1] if "MultiStep" in solver.LR_SCHEDULER_NAME else (solver.MAX_ITER // 2,)
    falls = max(1, min(*steps, solver.MAX_ITER, solver.MAX_ITER))
    if solver.WARMUP_ITERS >= falls:
        logger.warning(
            "SOLVER.WARMUP_ITERS is %d, too long for this schedule of %d iterations: the learning rate falls "
            "from iteration %d on, and will not reach SOLVER.BASE_LR. Set a shorter warm-up, such as "
            "SOLVER.WARMUP_ITERS %d",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
            falls,
            falls // 10,
        )


def _stretch(iterations: Any, factor: float) -> Any:
    if isinstance(iterations, tuple | list):
        return tuple(_stretch(i, factor) for i in iterations)
    # 0, and for Detectron2 what is below it, means never.
    return max(1, round(iterations / factor)) if iterations > 0 else iterations


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
