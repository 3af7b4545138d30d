"""Sets of cases that reproduce the paper's table and figures, and this project's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cases import Case, Counting, Measuring, run_cases
from .peers import (
    CACHED,
    CHECKPOINT,
    CHECKPOINT_KEPT,
    DETECTRON2,
    MODELS,
    PAPER,
    REVERSIBLE,
    REVERSIBLE_KEPT,
    Scheme,
)
from .report import PUBLISHED, Figure, Row

# The paper's Table 1: memory per image (its MB are 2^20 bytes), and images that fit into 16 GB.
_TABLE1 = {
    ("rev_vit_s", DETECTRON2.name): (66.5, 207),
    ("rev_vit_s", REVERSIBLE.name): (8.8, 1232),
    ("rev_vit_b", DETECTRON2.name): (129.7, 95),
    ("rev_vit_b", REVERSIBLE.name): (17.0, 602),
    ("rev_vit_l", DETECTRON2.name): (349.3, 26),
    ("rev_vit_l", REVERSIBLE.name): (22.6, 341),
    ("rev_mvit_b", DETECTRON2.name): (153.6, 89),
    ("rev_mvit_b", REVERSIBLE.name): (66.8, 157),
}
_IMAGENET = (224, 224)
_DEPTHS = (12, 24, 48, 80)


@dataclass(frozen=True)
class Preset:
    """What ``--preset`` runs.

    Attributes:
        title: of its table.
        cases: what is run.
        run: makes the rows; ``limit`` is ``--memory-limit`` in bytes.
        memory_limit: in bytes, where none is given.
        measured_only: it is about time, which cannot be counted.
        scatter: figures (x, y) that its plot has for axes; None for bars or lines.
    """

    title: str
    cases: tuple[Case, ...]
    run: Callable[[Sequence[Case], Counting | Measuring, int | None, Callable[[], Any]], list[Row]]
    memory_limit: int | None = None
    measured_only: bool = False
    scatter: tuple[str, str] | None = None


def _steps(cases, runner, limit, done) -> list[Row]:
    return run_cases(cases, runner, done)


def _images(cases, runner, limit, done) -> list[Row]:
    """Memory per image, beside the paper's."""
    # Large batches: small ones are dominated by what does not grow with the batch.
    batches = (256, 384) if isinstance(runner, Counting) else (16, 24)
    rows = []
    for case in cases:
        row = Row({name: value for name, value in case.labels.items() if name != "images"})
        row.figures = runner.per_image(case, batches)
        published = _published(case)
        if published is not None:
            row.figures[f"memory per image, {PUBLISHED}"] = Figure(published[0], "MiB", PUBLISHED)
        rows.append(row)
        done()
    return rows


def _table1(cases, runner, limit, done) -> list[Row]:
    rows = _images(cases, runner, limit, lambda: None)
    for case, row in zip(cases, rows, strict=True):
        row.figures["largest batch"] = Figure(runner.largest_batch(case, limit), "images", runner.method)
        published = _published(case)
        if published is not None:
            row.figures[f"largest batch, {PUBLISHED}"] = Figure(published[1], "images", PUBLISHED)
        done()
    return rows


def largest_batches(cases, runner, limit, done) -> list[Row]:
    """The largest batch of each case, and its step if it can be measured."""
    rows = []
    for case in cases:
        batch = runner.largest_batch(case, limit)
        row = Row({name: value for name, value in case.labels.items() if name != "images"})
        row.figures["largest batch"] = Figure(batch, "images", runner.method)
        if batch and isinstance(runner, Measuring):
            step = runner.step(replace(case, batch=batch))
            row.figures |= step.figures
            row.note = step.note
        rows.append(row)
        done()
    return rows


def _published(case: Case) -> tuple[float, int] | None:
    return next(
        (
            figures
            for (name, scheme), figures in _TABLE1.items()
            if MODELS[name] == case.model and scheme == case.scheme.name
        ),
        None,
    )


def _cases(
    model: str,
    schemes: Sequence[Scheme],
    size: tuple[int, int],
    batch: int,
    dtype: str,
    depths: Sequence[int | None] = (None,),
) -> tuple[Case, ...]:
    return tuple(
        Case(MODELS[model].title, MODELS[model], scheme, batch, size, dtype, depth)
        for depth in depths
        for scheme in schemes
    )


_EVERY = (CACHED, DETECTRON2, CHECKPOINT, CHECKPOINT_KEPT, PAPER, REVERSIBLE_KEPT)
_TABLE1_CASES = tuple(
    case
    for model in MODELS
    for case in _cases(model, (DETECTRON2, CACHED, CHECKPOINT, REVERSIBLE), _IMAGENET, 1, "fp32")
)
_DEEP = _cases("rev_vit_b", (CACHED, CHECKPOINT, REVERSIBLE), _IMAGENET, 1, "fp32", _DEPTHS)

PRESETS = {
    "detection": Preset(
        "Training step of a backbone at detection size",
        (
            *_cases("rev_mvit_b", _EVERY, (800, 1344), 2, "bf16", (16, 24)),
            *_cases(
                "rev_vit_b",
                [scheme for scheme in _EVERY if scheme != PAPER],
                (1024, 1024),
                1,
                "bf16",
            ),
        ),
        _steps,
    ),
    "depth": Preset(
        "Rev-MViT-B of growing depth: training step of 2 images of 800x1344, bf16",
        _cases(
            "rev_mvit_b",
            (CACHED, CHECKPOINT_KEPT, REVERSIBLE_KEPT),
            (800, 1344),
            2,
            "bf16",
            (16, 24, 32, 48, 64, 80),
        ),
        _steps,
    ),
    "table1": Preset(
        "The paper's Table 1: 224x224, float32, 16 GB", _TABLE1_CASES, _table1, memory_limit=16 * 10**9
    ),
    "figure1": Preset(
        "The paper's figure 1: memory of an image against its FLOPs, 224x224, float32",
        _TABLE1_CASES,
        _images,
        scatter=("forward FLOPs", "memory per image"),
    ),
    "figure3b": Preset(
        "The paper's figure 3b: ViT-B of growing depth, throughput at the largest batch in 16 GB",
        _DEEP,
        largest_batches,
        memory_limit=16 * 10**9,
        measured_only=True,
    ),
    "figure3c": Preset(
        "The paper's figure 3c: largest batch in 16 GB",
        _DEEP,
        largest_batches,
        memory_limit=16 * 10**9,
    ),
}
