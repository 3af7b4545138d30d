"""Schedules written for one batch size, rescaled to another."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from detectron2.solver import build_lr_scheduler

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

_LR_SCALING = {"sqrt": math.sqrt, "linear": lambda factor: factor, "none": lambda factor: 1.0}
# Counted in iterations; with smaller batches the same images take more of them. CHECKPOINT_PERIOD stays: it
# bounds what an interruption may cost, which is time and not images.
_ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD")
# Of SOLVER.BASE_LR: with a learning rate that stays below, a run is another one than was asked for.
_ENOUGH = 0.5


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
    solver = cfg.SOLVER
    if solver.LR_SCALING not in _LR_SCALING:
        raise ValueError(f"SOLVER.LR_SCALING is {solver.LR_SCALING!r}; allowed are {', '.join(_LR_SCALING)}")
    reference, batch = solver.REFERENCE_IMS_PER_BATCH, solver.IMS_PER_BATCH
    if reference == 0:
        return {}
    if reference < 0 or batch < 1:
        raise ValueError(
            f"SOLVER.REFERENCE_IMS_PER_BATCH is {reference} and SOLVER.IMS_PER_BATCH {batch}; the first must "
            "be at least 0 (no rescaling), the second at least 1"
        )
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
    new: dict[str, Any] = {key: _get(cfg, key) * rate for key in ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END")}
    for key in () if "SOLVER.MAX_ITER" in fixed else _ITERATIONS:
        value = _get(cfg, key)
        new[key] = (
            tuple(_stretch(v, factor) for v in value) if key.endswith("STEPS") else _stretch(value, factor)
        )
    changes = {key: (_get(cfg, key), value) for key, value in new.items() if key not in fixed}
    changes = {key: (before, after) for key, (before, after) in changes.items() if before != after}
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
    """Say so if the learning rate stays below half of ``SOLVER.BASE_LR``: it falls while it is warmed up.

    Args:
        cfg: a config whose scheduler can be built.
    """
    solver = cfg.SOLVER
    reached = _highest_multiplier(cfg)
    if reached < _ENOUGH:
        ends = [solver.MAX_ITER, *(solver.STEPS[:1] if "MultiStep" in solver.LR_SCHEDULER_NAME else ())]
        logger.warning(
            "SOLVER.WARMUP_ITERS is %d, too long for this schedule of %d iterations: the learning rate will "
            "not exceed %.0f %% of SOLVER.BASE_LR. Set a shorter warm-up, such as SOLVER.WARMUP_ITERS %d",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
            100 * reached,
            min(ends) // 10,
        )


def _highest_multiplier(cfg: CfgNode) -> float:
    """The largest factor by which the scheduler multiplies learning rates, at about a thousand iterations."""
    cfg = cfg.clone()
    cfg.defrost()
    last = cfg.SOLVER.MAX_ITER - 1
    # Detectron2 leaves out later steps, and says so where it trains.
    cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step <= last)
    scheduler = build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    # The end of the warm-up is the highest point of nearly every schedule.
    iterations = {*range(0, last + 1, 1 + last // 1000), min(cfg.SOLVER.WARMUP_ITERS, last)}
    rates = []
    for iteration in iterations:
        scheduler.last_epoch = iteration
        rates += scheduler.get_lr()
    return max(rates)


def _stretch(iterations: int, factor: float) -> int:
    """0, and for Detectron2 what is below it, means never."""
    return max(1, round(iterations / factor)) if iterations > 0 else iterations


def _get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
