"""Sets of cases that reproduce the paper's table and figures, and this project's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..memory.counting import GIB
from ..memory.table import COUNTED, PUBLISHED, Figure, Row
from .cases import Case, Counting, Measuring
from .models import (
    CACHED,
    CHECKPOINT,
    CHECKPOINT_KEPT,
    DETECTRON2,
    LOW_MEMORY,
    MODELS,
    PAPER,
    REVERSIBLE,
    REVERSIBLE_KEPT,
    STOCK_MODELS,
)

# The paper's Table 1: memory per image (its MB are 2^20 bytes), and images that fit into 16 GB.
_TABLE1 = {
    ("Rev-ViT-S", DETECTRON2): (66.5, 207),
    ("Rev-ViT-S", REVERSIBLE): (8.8, 1232),
    ("Rev-ViT-B", DETECTRON2): (129.7, 95),
    ("Rev-ViT-B", REVERSIBLE): (17.0, 602),
    ("Rev-ViT-L", DETECTRON2): (349.3, 26),
    ("Rev-ViT-L", REVERSIBLE): (22.6, 341),
    ("Rev-MViT-B", DETECTRON2): (153.6, 89),
    ("Rev-MViT-B", REVERSIBLE): (66.8, 157),
}
# Sizes that cards are sold by. N GB are taken as N * 10^9 bytes; most have some per cent more, which are left
# to CUDA itself, the workspaces of kernels, and fragmentation.
CARDS = (12, 16, 24, 40, 80, 141)
FITS = (
    "What fits: weights, gradients, optimizer state and activations of a whole training step, counted at two "
    "batches and extended in a straight line; a card of N GB is taken as N * 10^9 bytes, the rest is left to "
    "CUDA, workspaces and fragmentation."
)
Runner = Counting | Measuring
MakeRow = Callable[[Runner, Case, int | None], Row]


def step(runner: Runner, case: Case, limit: int | None) -> Row:
    """Memory and cost, or time, of one step."""
    return runner.step(case)


def memory_per_image(runner: Runner, case: Case, limit: int | None) -> Row:
    """What each further image takes, beside the paper's."""
    row = case.row()
    row.figures = runner.per_image(case)
    published = _TABLE1.get((case.title, case.training))
    if published is not None:
        row.figures[f"memory per image, {PUBLISHED}"] = Figure(published[0], "MiB", PUBLISHED)
    return row


def table1(runner: Runner, case: Case, limit: int | None) -> Row:
    """Memory per image and the largest batch, beside the paper's."""
    row = memory_per_image(runner, case, limit)
    row.figures["largest batch"] = Figure(runner.largest_batch(case, limit), "images", runner.method)
    published = _TABLE1.get((case.title, case.training))
    if published is not None:
        row.figures[f"largest batch, {PUBLISHED}"] = Figure(published[1], "images", PUBLISHED)
    return row


def largest_batch(runner: Runner, case: Case, limit: int | None) -> Row:
    """The largest batch under a limit of memory, and its step if it can be measured."""
    batch, row = runner.largest_batch(case, limit), case.row()
    row.figures["largest batch"] = Figure(batch, "images", runner.method)
    if batch and isinstance(runner, Measuring):
        measured = runner.step(replace(case, batch=batch))
        row.figures |= measured.figures
        row.note = measured.note
    return row


def memory_by_images(case: Case) -> tuple[int, float]:
    """Counted bytes of a step with one image, everything included, and of each further image."""
    # Four images of detection size make activations outweigh the gradients, from where on memory grows evenly
    # with each; more if they are smaller, but not so many that counting takes long.
    many = min(16, max(4, 4 * 800 * 1344 // (case.size[0] * case.size[1])))
    one, all_of_them = (Counting().count(replace(case, batch=batch)).total for batch in (1, many))
    return one, (all_of_them - one) / (many - 1)


def images_that_fit(case: Case) -> Row:
    """Images in a training step of a detector or backbone that fit on `CARDS`, counted."""
    row = case.row()
    one, each = memory_by_images(case)
    row.figures = {
        "one image": Figure(one / GIB, "GiB", COUNTED),
        "each further one": Figure(each / GIB, "GiB", COUNTED),
    }
    for card in CARDS:
        images = max(0, 1 + int((card * 1e9 - one) // each))
        row.figures[f"{card} GB"] = Figure(images, "images", COUNTED)
    return row


@dataclass(frozen=True)
class Preset:
    """What ``--preset`` runs.

    Attributes:
        title: of its table.
        cases: what is run.
        make_row: of each case, given the runner and ``--memory-limit`` in bytes.
        memory_limit: in bytes, where none is given; None if there is nothing to limit.
        measured_only: it is about time, which cannot be counted.
        against: the figure along the axis of its plot; None for what the cases sweep.
    """

    title: str
    cases: tuple[Case, ...]
    make_row: MakeRow = step
    memory_limit: int | None = None
    measured_only: bool = False
    against: str | None = None


def _cases(
    name: str, trainings: Sequence[str], size: int | tuple, batch: int, dtype: str, depths=(None,)
) -> tuple[Case, ...]:
    size = size if isinstance(size, tuple) else (size, size)
    model = (MODELS | STOCK_MODELS)[name]
    return tuple(
        Case(model.title, model, training, batch, size, dtype, depth)
        for depth in depths
        for training in trainings
    )


_KEPT = (CACHED, CHECKPOINT_KEPT, REVERSIBLE_KEPT)
_EVERY = (CACHED, DETECTRON2, CHECKPOINT, CHECKPOINT_KEPT, PAPER, REVERSIBLE_KEPT)
_VIT = tuple(training for training in _EVERY if training != PAPER)  # which it is, without transitions
_LIMIT = 16 * 10**9
_PAPERS = tuple(
    case
    for model in MODELS
    for case in _cases(model, (DETECTRON2, CACHED, CHECKPOINT, REVERSIBLE), 224, 1, "fp32")
)
_DEEP = _cases("rev_vit_b", (CACHED, CHECKPOINT, REVERSIBLE), 224, 1, "fp32", (12, 24, 48, 80))

_SIZES = {"vitdet_b": 1024, "vitdet_l": 1024, "vitdet_h": 1024}

PRESETS = {
    "low_memory": Preset(
        "Training step of Detectron2's own backbones, as they are and with low_memory",
        tuple(
            case
            for name in STOCK_MODELS
            for case in _cases(
                name, (CACHED, CHECKPOINT, LOW_MEMORY), _SIZES.get(name, (800, 1344)), 1, "bf16"
            )
        ),
    ),
    "detection": Preset(
        "Training step of a backbone at detection size",
        _cases("rev_mvit_b", _EVERY, (800, 1344), 2, "bf16", (16, 24))
        + _cases("rev_vit_b", _VIT, 1024, 1, "bf16"),
    ),
    "depth": Preset(
        "Rev-MViT-B of growing depth: training step of 2 images of 800x1344, bf16",
        _cases("rev_mvit_b", _KEPT, (800, 1344), 2, "bf16", (16, 24, 32, 48, 64, 80)),
    ),
    "table1": Preset("The paper's Table 1: 224x224, float32, 16 GB", _PAPERS, table1, _LIMIT),
    "figure1": Preset(
        "The paper's figure 1: memory of an image against its FLOPs, 224x224, float32",
        _PAPERS,
        memory_per_image,
        against="forward FLOPs",
    ),
    "figure3b": Preset(
        "The paper's figure 3b: ViT-B of growing depth, throughput at the largest batch in 16 GB",
        _DEEP,
        largest_batch,
        _LIMIT,
        measured_only=True,
    ),
    "figure3c": Preset("The paper's figure 3c: largest batch in 16 GB", _DEEP, largest_batch, _LIMIT),
}
