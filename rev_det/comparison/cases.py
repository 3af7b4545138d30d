"""One case of a comparison: which model, trained how, on what; counted or measured into a row of figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..devices import cudnn_attention
from ..engine import Precision, TrainStep, build_detector, build_gradient_clipper, build_optimizer
from ..memory.cost import Rates
from ..memory.counting import GIB, MIB, StepCount, count_step
from ..memory.detector import DetectorStep, count_detector
from ..memory.measure import (
    BackboneStep,
    Measurement,
    largest_batch,
    measure,
    memory_limit,
    unless_out_of_memory,
)
from ..memory.table import COUNTED, ESTIMATED, MEASURED, Figure, Row
from .models import CACHED, DETECTRON2, PEERS, TRAININGS, Model, build, has_baselines, stages

if TYPE_CHECKING:
    from detectron2.config import CfgNode

DTYPES = {"bf16": torch.bfloat16, "fp32": None}
# Tensors alive at the peak that a file lists.
_LISTED = 12
# Images, and pixels of all images in a step; more take too long to count.
MOST_COUNTED, MOST_PIXELS = 1024, 2**28
# What Detectron2's own models are called in a config.
_BASELINES = {"rev_vit": "build_baseline_vit_fpn_backbone", "rev_mvit": "build_baseline_mvit_fpn_backbone"}


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        title: of the model or config.
        model: a backbone alone, of `MODELS`; or None for the whole detector of ``cfg``.
        training: of `TRAININGS`.
        batch: images in a step.
        size: (H, W) in pixels.
        dtype: of `DTYPES`.
        depth: blocks, instead of the model's own number.
        cfg: with rev_det's keys.
    """

    title: str
    model: Model | None
    training: str
    batch: int
    size: tuple[int, int]
    dtype: str
    depth: int | None = None
    cfg: CfgNode | None = None

    @property
    def labels(self) -> dict[str, str | int]:
        title = self.title
        if self.training == DETECTRON2 and self.model is not None:
            title = title.removeprefix("Rev-")
        return {
            "model": title,
            "training": self.training,
            "depth": self.depth or self._own_depth(),
            "size": f"{self.size[0]}x{self.size[1]}",
            "images": self.batch,
            "type": self.dtype,
        }

    def row(self) -> Row:
        """An empty row, whose figures are not of a single number of images."""
        return Row({name: value for name, value in self.labels.items() if name != "images"})

    def _own_depth(self) -> int | str:
        if self.model is not None:
            return self.model.arguments.get("depth", "-")
        family = reversible_family(self.cfg)
        return self.cfg.MODEL[family.upper()].DEPTH if family else "-"


def reversible_family(cfg: CfgNode) -> str | None:
    """ "rev_vit" or "rev_mvit" if the config has such a backbone, or Detectron2's of its sizes."""
    name = cfg.MODEL.BACKBONE.NAME
    if "rev_mvit" in name or "baseline_mvit" in name:
        return "rev_mvit"
    return "rev_vit" if "rev_vit" in name or "baseline_vit" in name else None


def detector_step(cfg: CfgNode, batch: int, size: tuple[int, int]) -> DetectorStep:
    """The step that training with this config takes, on ``MODEL.DEVICE``; see `DetectorStep`."""

    def make_trainer(cfg: CfgNode, batches: Iterable) -> TrainStep:
        model = build_detector(cfg).train()
        precision, clip = Precision.from_config(cfg), build_gradient_clipper(cfg)
        return TrainStep(model, batches, build_optimizer(cfg, model), precision, clip)

    return DetectorStep(cfg, batch, size, make_trainer)


def training_step(case: Case, device: str) -> DetectorStep | BackboneStep:
    """The step of a case, not yet settled.

    Raises:
        ValueError: a way of training or a depth for a backbone that has neither.
        ImportError: Detectron2's own model without timm.
    """
    if case.model is None:
        return detector_step(_configured(case, device), case.batch, case.size)
    model = build(case.model, case.training, case.depth, device)
    return BackboneStep(model, case.batch, case.size, DTYPES[case.dtype])


def _configured(case: Case, device: str) -> CfgNode:
    cfg = case.cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    cfg.SOLVER.AMP.ENABLED = case.dtype != "fp32"
    cfg.SOLVER.AMP.DTYPE = "bf16"
    if case.training in PEERS:
        cfg.MODEL.LOW_MEMORY = False
    family, arguments = reversible_family(cfg), TRAININGS[case.training]
    if family is None:
        if case.depth is not None or arguments:
            raise ValueError(
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is not reversible: "
                "there is no --depth and no --activations to choose"
            )
        return cfg
    if case.depth is not None:
        cfg.MODEL[family.upper()].DEPTH = case.depth
        if family == "rev_mvit":
            cfg.MODEL.REV_MVIT.LAST_BLOCK_INDEXES = stages(case.depth)
    if case.training == DETECTRON2:
        cfg.MODEL.BACKBONE.NAME = _BASELINES[family]
    for name, value in arguments.items():
        cfg.MODEL.REV[name.upper()] = value
    return cfg


class Counting:
    """Counts cases; nothing is run on a device.

    Args:
        device_rules, rates: see `rev_det.memory.Counter`.
        listed: how many of the tensors alive at the peak a row has.
    """

    method = COUNTED

    def __init__(self, device_rules: str = "cuda", rates: Rates | None = None, listed: int = _LISTED):
        self.device_rules, self.rates, self.listed = device_rules, rates or Rates(), listed

    def step(self, case: Case) -> Row:
        """Memory and cost of a training step."""
        count = self.count(case)
        row = Row(case.labels)
        row.figures = {
            "peak memory": Figure(count.peak / GIB, "GiB", COUNTED),
            "in all": Figure(count.total / GIB, "GiB", COUNTED),
            "FLOPs": Figure(count.flops / 1e12, "TFLOP", COUNTED),
            "bytes moved": Figure(count.cost.bytes_moved / 1e9, "GB", COUNTED),
            "launches": Figure(count.cost.launches, "kernels", COUNTED),
            "estimated time": Figure(count.cost.seconds * 1e3, "ms", ESTIMATED),
        }
        parts = count.split("backbone" if case.model is None else None)
        row.split = {name: Figure(nbytes / GIB, "GiB", COUNTED) for name, nbytes in parts.items()}
        row.at_peak = [
            {
                "bytes": a.nbytes,
                "shape": list(a.shape),
                "dtype": a.dtype,
                "operation": a.operation or "before the step",
                "module": a.module,
                "for": a.kind,
            }
            for a in count.at_peak[: self.listed]
        ]
        last = count.step
        row.peak = f"reached in {last.operation} of {last.module or 'the model'}, {last.phase} pass"
        return row

    def per_image(self, case: Case) -> dict[str, Figure]:
        """Memory that each further image takes, and the forward pass's FLOPs of one."""
        # Large batches: small ones are dominated by what does not grow with the batch.
        low, high = (self.count(replace(case, batch=batch)) for batch in (256, 384))
        return {
            "memory per image": Figure((high.peak - low.peak) / 128 / MIB, "MiB", COUNTED),
            # As papers count: a multiplication and addition is one.
            "forward FLOPs": Figure(low.forward.flops / 2 / 256 / 1e9, "GMAC per image", COUNTED),
        }

    def largest_batch(self, case: Case, limit: int) -> int:
        """Images in a step whose whole memory, optimizer state included, is at most ``limit`` bytes.

        Exact up to what is counted in reasonable time, 1024 images if they are not large; beyond, the memory
        of that many and of half as many is extended in a straight line.
        """
        most = max(2, min(MOST_COUNTED, MOST_PIXELS // math.prod(case.size)))
        totals: dict[int, int] = {}

        def total(batch: int) -> int:
            if batch not in totals:
                totals[batch] = self.count(replace(case, batch=batch)).total
            return totals[batch]

        def extended(low: int, high: int) -> int:
            slope = max(1.0, (total(high) - total(low)) / (high - low))
            return high + math.floor((limit - total(high)) / slope)

        guess = extended(1, 2)
        # The peak can move to another operation at larger batches: twice more from there.
        for _ in range(2):
            if guess > 8:
                high = min(guess, most)
                guess = extended(high // 2, high)
        if guess > most:
            return guess
        return largest_batch(lambda batch: total(batch) <= limit, guess)

    def count(self, case: Case) -> StepCount:
        if case.model is None:
            return count_detector(training_step(case, "cpu"), self.device_rules, self.rates)
        return count_step(
            build(case.model, case.training, case.depth),
            lambda: torch.empty(case.batch, 3, *case.size),
            dtype=DTYPES[case.dtype],
            device_rules=self.device_rules,
            rates=self.rates,
        )


class Measuring:
    """Runs cases on a device.

    Args:
        device: "cuda", "cuda:1" or "cpu".
        warm_up, steps: see `measure`.
        limit: bytes that the allocator may hand out; None for all the device has.
        progress: called after every step.
    """

    method = MEASURED

    def __init__(
        self,
        device: torch.device,
        warm_up: int,
        steps: int,
        limit: int | None = None,
        progress: Callable[[], None] = lambda: None,
    ):
        self.device, self.warm_up, self.steps = device, warm_up, steps
        self.limit, self.progress = limit, progress

    def step(self, case: Case) -> Row:
        """Time and memory of a training step."""
        row = Row(case.labels)
        result = self.try_measure(case, self.warm_up, self.steps)
        if result is None:
            row.note = "out of memory"
            return row
        figures = {
            "time": (result.median, "s, median"),
            "lower quartile": (result.low, "s"),
            "upper quartile": (result.high, "s"),
            "mean": (result.mean, "s"),
            "warm-up": (result.warm_up, "s"),
            "throughput": (result.images_per_second, "images/s"),
        }
        if result.peak is not None:
            figures["peak memory"] = (result.peak / GIB, "GiB")
            figures["allocated"] = (result.allocated / GIB, "GiB, max_memory_allocated")
        row.figures = {name: Figure(*figure, MEASURED) for name, figure in figures.items()}
        return row

    def per_image(self, case: Case) -> dict[str, Figure]:
        """Memory that each further image takes; nothing on the CPU, or if it does not fit."""
        low, high = (self.try_measure(replace(case, batch=batch), 1, 2) for batch in (16, 24))
        if low is None or high is None or high.peak is None:
            return {}
        return {"memory per image": Figure((high.peak - low.peak) / 8 / MIB, "MiB", MEASURED)}

    def largest_batch(self, case: Case, limit: int | None) -> int:
        """Images in a step that fit, found by trying two steps each."""
        return largest_batch(lambda batch: self.try_measure(replace(case, batch=batch), 1, 1) is not None)

    def try_measure(self, case: Case, warm_up: int, steps: int) -> Measurement | None:
        """The measurement, or None if the memory does not suffice."""

        def attempt() -> Measurement:
            step = training_step(case, str(self.device))
            return measure(step, case.batch, self.device, warm_up, steps, self.progress)

        what = f"{case.title}, {case.training}, {case.batch} images of {case.size[0]}x{case.size[1]}"
        # As training does it, unless a config says otherwise.
        allowed = case.cfg is not None and case.cfg.MODEL.REV.CUDNN_ATTENTION
        with memory_limit(self.device, self.limit), cudnn_attention(allowed):
            return unless_out_of_memory(attempt, what)


def run_cases(
    cases: Sequence[Case], make_row: Callable[[Case], Row], done: Callable[[], Any] = lambda: None
) -> list[Row]:
    """A row of figures for each case; those of one step with ratios to the same under ordinary autograd.

    Args:
        cases: without those of Detectron2's own models where they cannot be built.
        done: called after every case.
    """
    rows = []
    for case in cases:
        rows.append(make_row(case))
        done()
    for case, row in zip(cases, rows, strict=True):
        ordinary = replace(case, training=CACHED)
        if case == ordinary or ordinary not in cases or "images" not in row.labels:
            continue
        reference = rows[cases.index(ordinary)].figures
        for name in ("peak memory", "FLOPs", "estimated time", "time"):
            if name in row.figures and name in reference:
                figure = row.figures[name]
                ratio = figure.value / reference[name].value
                row.figures[f"{name}, relative"] = Figure(ratio, "x cached", figure.method)
    return rows


def without_baselines(cases: Sequence[Case]) -> tuple[list[Case], str]:
    """The cases that can be built here, and a line about those that cannot."""
    left = [
        case for case in cases if case.training != DETECTRON2 and not (case.model and case.model.is_stock)
    ]
    if has_baselines() or len(left) == len(cases):
        return list(cases), ""
    return (
        left,
        "Detectron2's own models are left out: they need timm (pip install 'rev_det[baselines]')",
    )
