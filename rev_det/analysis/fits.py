"""How many images a GPU trains on, for each way of keeping activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .cases import Case, Counting
from .counting import GIB
from .report import COUNTED, Figure, Row

# Sizes that cards are sold by. N GB are taken as N * 10^9 bytes; most have some per cent more, which are left
# to CUDA itself, the workspaces of kernels, and fragmentation.
CARDS = (12, 16, 24, 40, 80, 141)
DEFINITION = (
    "What fits: weights, gradients, optimizer state and activations of a whole training step, counted at two "
    "batches and extended in a straight line; a card of N GB is taken as N * 10^9 bytes, the rest is left to "
    "CUDA, workspaces and fragmentation."
)


def images_that_fit(cases: Sequence[Case], done: Callable[[], Any] = lambda: None) -> list[Row]:
    """One row for each case: images per GPU on `CARDS`.

    Args:
        cases: whole detectors or backbones; their ``batch`` is not used.
        done: called after every count; there are two for each case.
    """
    rows = []
    for case in cases:
        totals, batches = [], (1, _enough(case.size))
        for batch in batches:
            totals.append(Counting().count(replace(case, batch=batch)).total)
            done()
        each = (totals[1] - totals[0]) / (batches[1] - batches[0])
        row = Row({name: value for name, value in case.labels.items() if name != "images"})
        row.figures = {
            "one image": Figure(totals[0] / GIB, "GiB", COUNTED),
            "each further one": Figure(each / GIB, "GiB", COUNTED),
        }
        for card in CARDS:
            images = 1 + int((card * 1e9 - totals[0]) // each)
            row.figures[f"{card} GB"] = Figure(max(0, images), "images", COUNTED)
        rows.append(row)
    return rows


def _enough(size: tuple[int, int]) -> int:
    """Images that make activations outweigh the gradients, from where on memory grows evenly with each.

    Four images of detection size, more if they are smaller, but not so many that counting takes long.
    """
    return min(16, max(4, 4 * 800 * 1344 // (size[0] * size[1])))
