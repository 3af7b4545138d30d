"""One case of a comparison: which model, trained how, on what; counted or measured into a row of figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..devices import cudnn_attention
from ..engine import load_config
from ..model_zoo import find_config_file
from .cost import Rates
from .counting import GIB, MIB, StepCount, count_backbone
from .detector import DetectorStep, count_detector
from .measure import BackboneStep, Measurement, largest_batch, measure, memory_limit, unless_out_of_memory
from .peers import CACHED, DETECTRON2, Model, Scheme, build, has_baselines, stages
from .report import COUNTED, ESTIMATED, MEASURED, Figure, Row

if TYPE_CHECKING:
    from detectron2.config import CfgNode

DTYPES = {"bf16": torch.bfloat16, "fp32": None}
# Tensors alive at the peak that a report lists.
_LISTED = 12
# Images in a step; more take too long to count where they are computed in many parts.
MOST_COUNTED = 1024
# What Detectron2's own models are called in a config.
_BASELINES = {"rev_vit": "build_baseline_vit_fpn_backbone", "rev_mvit": "build_baseline_mvit_fpn_backbone"}


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        title: of the model or config.
        model: a backbone alone, of `peers.MODELS`; or None for the whole detector of ``cfg``.
        cfg: with rev_det's keys.
        scheme: of `peers`.
        batch: images in a step.
        size: (H, W) in pixels.
        dtype: of `DTYPES`.
        depth: blocks, instead of the model's own number.
    """

    title: str
    model: Model | None
    scheme: Scheme
    batch: int
    size: tuple[int, int]
    dtype: str
    depth: int | None = None
    cfg: CfgNode | None = None

    @property
    def labels(self) -> dict[str, str | int]:
        title = self.title
        if self.scheme == DETECTRON2 and self.model is not None:
            title = title.removeprefix("Rev-")
        return {
            "model": title,
            "training": self.scheme.name,
            "depth": self.depth or self._own_depth(),
            "size": f"{self.size[0]}x{self.size[1]}",
            "images": self.batch,
            "type": self.dtype,
        }

    @property
    def reference(self) -> Case:
        """What the ratios of this case are to: the same under ordinary autograd."""
        return replace(self, scheme=CACHED)

    def _own_depth(self) -> int | str:
        if self.model is not None:
            return self.model.depth
        family = reversible_family(self.cfg)
        return self.cfg.MODEL[family.upper()].DEPTH if family else "-"


def read_config(config_file: str, opts: Sequence[str], device: str = "cpu") -> CfgNode:
    """A detector's config without its datasets, which need not be on this machine, and its schedule.

    Args:
        config_file: a YAML file, ours or any of Detectron2's, or the name of a model in rev_det's zoo.
        opts: keys and values that override the file's, alternating.
        device: for ``MODEL.DEVICE``.

    Raises:
        FileNotFoundError, ValueError: see `rev_det.engine.load_config`.
    """
    no_data = ("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "DATASETS.COCO_JSON", "[]")
    # The CPU does not train in float16, but what is counted there can be meant for a GPU.
    # Nobody trains by this schedule: nothing needs to be said about rescaling it.
    no_schedule = ("SOLVER.REFERENCE_IMS_PER_BATCH", "0")
    settled = (*no_data, *no_schedule, "MODEL.DEVICE", device, "SOLVER.AMP.DTYPE", "auto")
    return load_config(find_config_file(config_file), [*opts, *settled])


def reversible_family(cfg: CfgNode) -> str | None:
    """ "rev_vit" or "rev_mvit" if the config has such a backbone, or Detectron2's of its sizes."""
    name = cfg.MODEL.BACKBONE.NAME
    if "rev_mvit" in name or "baseline_mvit" in name:
        return "rev_mvit"
    return "rev_vit" if "rev_vit" in name or "baseline_vit" in name else None


def configured(case: Case, device: str) -> CfgNode:
    """The config of a detector for a case.

    Raises:
        ValueError: a scheme or a depth for a backbone that has neither.
        ImportError: Detectron2's own model without timm.
    """
    cfg = case.cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    cfg.SOLVER.AMP.ENABLED = case.dtype != "fp32"
    cfg.SOLVER.AMP.DTYPE = "bf16"
    family = reversible_family(cfg)
    if family is None:
        if case.depth is not None or case.scheme.arguments:
            raise ValueError(
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is not reversible: "
                "there is no --depth and no --activations to choose"
            )
        return cfg
    if case.depth is not None:
        cfg.MODEL[family.upper()].DEPTH = case.depth
        if family == "rev_mvit":
            cfg.MODEL.REV_MVIT.LAST_BLOCK_INDEXES = stages(case.depth)
    if case.scheme == DETECTRON2:
        cfg.MODEL.BACKBONE.NAME = _BASELINES[family]
    for name, value in (case.scheme.arguments or {}).items():
        cfg.MODEL.REV[name.upper()] = value
    return cfg


class Counting:
    """Counts cases; nothing is run on a device.

    Args:
        device_rules, rates: see `rev_det.analysis.counting.Counter`.
    """

    method = COUNTED

    def __init__(self, device_rules: str = "cuda", rates: Rates | None = None):
        self.device_rules, self.rates = device_rules, rates or Rates()

    def step(self, case: Case) -> Row:
        """Memory and cost of a training step."""
        count = self.count(case)
        row = Row(case.labels)
        row.figures = {
            "peak memory": self._figure(count.peak / GIB, "GiB"),
            "in all": self._figure(count.total / GIB, "GiB"),
            "FLOPs": self._figure(count.flops / 1e12, "TFLOP"),
            "bytes moved": self._figure(count.cost.bytes_moved / 1e9, "GB"),
            "launches": self._figure(count.cost.launches, "kernels"),
            "estimated time": Figure(count.cost.seconds * 1e3, "ms", ESTIMATED),
        }
        parts = count.split("backbone" if case.model is None else None)
        row.split = {name: self._figure(nbytes / GIB, "GiB") for name, nbytes in parts.items()}
        row.at_peak = [
            {
                "bytes": a.nbytes,
                "shape": list(a.shape),
                "dtype": a.dtype,
                "operation": a.operation or "before the step",
                "module": a.module,
                "for": a.kind,
            }
            for a in count.at_peak[:_LISTED]
        ]
        last = count.step
        row.peak = f"reached in {last.operation} of {last.module or 'the model'}, {last.phase} pass"
        return row

    def per_image(self, case: Case, batches: tuple[int, int]) -> dict[str, Figure]:
        """Memory that each further image takes, and the forward pass's FLOPs of one."""
        low, high = (self.count(replace(case, batch=batch)) for batch in batches)
        images = batches[1] - batches[0]
        return {
            "memory per image": self._figure((high.peak - low.peak) / images / MIB, "MiB"),
            # As papers count: a multiplication and addition is one.
            "forward FLOPs": self._figure(low.forward.flops / 2 / batches[0] / 1e9, "GMAC per image"),
        }

    def largest_batch(self, case: Case, limit: int) -> int:
        """Images in a step whose whole memory, optimizer state included, is at most ``limit`` bytes.

        Exact up to 1024 images; beyond, the memory of 512 and of 1024 is extended in a straight line.
        """
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
                high = min(guess, MOST_COUNTED)
                guess = extended(high // 2, high)
        if guess > MOST_COUNTED:
            return guess
        return largest_batch(lambda batch: total(batch) <= limit, guess)

    def count(self, case: Case) -> StepCount:
        rules = {"device_rules": self.device_rules, "rates": self.rates}
        if case.model is None:
            return count_detector(configured(case, "cpu"), case.batch, case.size, **rules)
        model = build(case.model, case.scheme, case.depth)
        return count_backbone(model, case.batch, case.size, DTYPES[case.dtype], **rules)

    def _figure(self, value: float, unit: str) -> Figure:
        return Figure(value, unit, self.method)


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
        row.figures = self._figures(result)
        return row

    def per_image(self, case: Case, batches: tuple[int, int]) -> dict[str, Figure]:
        """Memory that each further image takes; nothing on the CPU, or if it does not fit."""
        low, high = (self.try_measure(replace(case, batch=batch), 1, 2) for batch in batches)
        if low is None or high is None or high.peak is None:
            return {}
        return {
            "memory per image": self._figure((high.peak - low.peak) / (batches[1] - batches[0]) / MIB, "MiB")
        }

    def largest_batch(self, case: Case, limit: int | None) -> int:
        """Images in a step that fit, found by trying two steps each."""
        return largest_batch(lambda batch: self.try_measure(replace(case, batch=batch), 1, 1) is not None)

    def try_measure(self, case: Case, warm_up: int, steps: int) -> Measurement | None:
        """The measurement, or None if the memory does not suffice."""
        what = f"{case.title}, {case.scheme.name}, {case.batch} images of {case.size[0]}x{case.size[1]}"
        # As training does it, unless a config says otherwise.
        allowed = case.cfg is not None and case.cfg.MODEL.REV.CUDNN_ATTENTION
        with memory_limit(self.device, self.limit), cudnn_attention(allowed):
            return unless_out_of_memory(lambda: self._measure(case, warm_up, steps), what)

    def _measure(self, case: Case, warm_up: int, steps: int) -> Measurement:
        if case.model is None:
            step = DetectorStep(configured(case, str(self.device)), case.batch, case.size)
            prepare, release = step.settle, step.optimizer.zero_grad
        else:
            model = build(case.model, case.scheme, case.depth, str(self.device))
            step = BackboneStep(model, case.batch, case.size, DTYPES[case.dtype])
            prepare, release = step.release, step.release
        return measure(step.run, release, case.batch, self.device, warm_up, steps, prepare, self.progress)

    def _figures(self, result: Measurement) -> dict[str, Figure]:
        figures = {
            "time": self._figure(result.median, "s, median"),
            "lower quartile": self._figure(result.low, "s"),
            "upper quartile": self._figure(result.high, "s"),
            "mean": self._figure(result.mean, "s"),
            "warm-up": self._figure(result.warm_up, "s"),
            "throughput": self._figure(result.images_per_second, "images/s"),
        }
        if result.peak is not None:
            figures["peak memory"] = self._figure(result.peak / GIB, "GiB")
            figures["allocated"] = self._figure(result.allocated / GIB, "GiB, max_memory_allocated")
        return figures

    def _figure(self, value: float, unit: str) -> Figure:
        return Figure(value, unit, self.method)


def run_cases(
    cases: Sequence[Case], runner: Counting | Measuring, done: Callable[[], Any] = lambda: None
) -> list[Row]:
    """A row of figures for each case, with ratios to the case under ordinary autograd if that is among them.

    Args:
        cases: without those of Detectron2's own models where they cannot be built.
        done: called after every case.
    """
    rows = []
    for case in cases:
        rows.append(runner.step(case))
        done()
    by_case = {_key(case): row for case, row in zip(cases, rows, strict=True)}
    for case, row in zip(cases, rows, strict=True):
        reference = by_case.get(_key(case.reference))
        if reference is None or reference is row:
            continue
        for name in ("peak memory", "FLOPs", "estimated time", "time"):
            if name in row.figures and name in reference.figures:
                figure = row.figures[name]
                ratio = figure.value / reference.figures[name].value
                row.figures[f"{name}, relative"] = Figure(ratio, "x cached", figure.method)
    return rows


def without_baselines(cases: Sequence[Case]) -> tuple[list[Case], str]:
    """The cases that can be built here, and a line about those that cannot."""
    if has_baselines() or not any(case.scheme == DETECTRON2 for case in cases):
        return list(cases), ""
    left = [case for case in cases if case.scheme != DETECTRON2]
    return (
        left,
        "Detectron2's own ViT and MViT are left out: they need timm (pip install 'rev_det[baselines]')",
    )


def _key(case: Case) -> tuple:
    return case.title, case.scheme.name, case.batch, case.size, case.dtype, case.depth
