"""Seconds and memory of a training step on a device, and how many images fit."""

from __future__ import annotations

import gc
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ..devices import is_out_of_memory
from .counting import sum_of_means
from .detector import DetectorStep

logger = logging.getLogger(__name__)
T = TypeVar("T")
LARGEST_BATCH_TRIED = 2**16


@dataclass(frozen=True)
class Measurement:
    """A training step, measured.

    Attributes:
        median, low, high: seconds of a step; low and high are the quartiles.
        mean: seconds of a step, over all timed ones, which is what Detectron2 reports.
        warm_up: seconds of all that came before, in which kernels are loaded and chosen.
        images_per_second: by the mean.
        peak: bytes of memory above what existed before the step, at most; None on the CPU.
        allocated: ``torch.cuda.max_memory_allocated``: the peak with weights, optimizer state and inputs.
    """

    median: float
    low: float
    high: float
    mean: float
    warm_up: float
    images_per_second: float
    peak: int | None = None
    allocated: int | None = None


def measure(
    step: BackboneStep | DetectorStep,
    batch: int,
    device: torch.device,
    warm_up: int,
    steps: int,
    progress: Callable[[], None] = lambda: None,
) -> Measurement:
    """Time a step and watch its memory.

    Args:
        step: what has ``settle()``, which comes once, ``run()`` and ``release()``.
        batch: images in it.
        device: where it runs.
        warm_up: steps that are not timed.
        steps: steps that are.
        progress: called after every step, outside its time.

    Raises:
        ValueError: ``warm_up`` or ``steps`` is less than 1.
    """
    if warm_up < 1 or steps < 1:
        raise ValueError(f"--warm-up and --steps must be at least 1, got {warm_up} and {steps}")

    def timed() -> float:
        seconds = seconds_of(step.run, device)
        progress()
        return seconds

    start = time.perf_counter()
    step.settle()
    for _ in range(warm_up):
        timed()
    seconds_of_warm_up = time.perf_counter() - start
    step.release()
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed() for _ in range(steps)]
    allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    low, median, high = statistics.quantiles(seconds, n=4) if steps > 1 else seconds * 3
    mean = statistics.fmean(seconds)
    return Measurement(
        median=median,
        low=low,
        high=high,
        mean=mean,
        warm_up=seconds_of_warm_up,
        images_per_second=batch / mean,
        peak=None if allocated is None else allocated - before,
        allocated=allocated,
    )


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, the device having finished before and after."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


class BackboneStep:
    """A training step of a backbone alone; the loss is the sum of the means of its feature maps.

    The weights are not updated, but the memory of AdamW's two averages is taken, as in training.

    Args:
        model: maps images (B, 3, H, W) to a dictionary of feature maps, on its device.
        batch: B.
        size: (H, W) in pixels.
        dtype: what autocast computes in; None for float32 without autocast.
    """

    def __init__(self, model: nn.Module, batch: int, size: tuple[int, int], dtype: torch.dtype | None):
        self.model, self.dtype = model, dtype
        self.images = torch.rand(batch, 3, *size, device=next(model.parameters()).device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer_state = [torch.empty_like(p, requires_grad=False) for p in trained for _ in range(2)]

    def run(self) -> None:
        """Forward and backward; gradients start from None."""
        self.release()
        kind = self.images.device.type
        with torch.autocast(kind, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            loss = sum_of_means(self.model(self.images))
        loss.backward()

    def settle(self) -> None:
        """Nothing has to come before the first step."""

    def release(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)


def unless_out_of_memory(attempt: Callable[[], T], what: str) -> T | None:
    """The result of ``attempt``, or None if the device's memory did not suffice.

    What the attempt held is freed, so that the process can go on with something smaller. Other errors are
    raised as they are.

    Args:
        what: of the message that is then logged.
    """
    try:
        return attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the traceback hold on to everything that was alive.
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        logger.warning("%s does not fit: %s", what, str(error).split(". ")[0])
    _free_cached_memory()
    return None


@contextmanager
def memory_limit(device: torch.device, nbytes: int | None) -> Iterator[None]:
    """Let the allocator of a CUDA device hand out no more than ``nbytes``; None is no limit.

    Raises:
        ValueError: the device is the CPU, which has no such limit, or has less memory than that.
    """
    if nbytes is None:
        yield
        return
    if device.type != "cuda":
        raise ValueError("--memory-limit is enforced on CUDA devices; leave --device out to count instead")
    total = torch.cuda.get_device_properties(device).total_memory
    if nbytes > total:
        raise ValueError(
            f"--memory-limit is {nbytes} bytes, but the device has {total}: give {total // 10**6}MB or less"
        )
    # What earlier cases left in the allocator's cache counts towards the limit.
    _free_cached_memory()
    # PyTorch wants a number here, which "cuda" has not.
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(nbytes / total, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def largest_batch(fits: Callable[[int], bool], guess: int = 1) -> int:
    """The largest number of images for which ``fits`` is true; 0 if one is too many.

    Args:
        fits: true up to some number and false from there on.
        guess: where to start; from a good one two calls suffice.

    Raises:
        ValueError: everything fits, up to `LARGEST_BATCH_TRIED`.
    """
    step, guess = 1, max(1, guess)
    if fits(guess):
        low = guess
        while fits(low + step):
            low, step = low + step, 2 * step
            if low > LARGEST_BATCH_TRIED:
                raise ValueError(f"{low} images fit and no end is in sight; give a --memory-limit")
        high = low + step
    else:
        high = guess
        while high > 1 and not fits(max(1, high - step)):
            high, step = max(1, high - step), 2 * step
        if high == 1:
            return 0
        low = max(1, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _free_cached_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
