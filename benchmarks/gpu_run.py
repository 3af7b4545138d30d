"""What a part of benchmarks/gpu.py runs in: rows saved as they come, failures noted, time shared out."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from rev_det.comparison.cases import Case, run_cases, without_baselines
from rev_det.memory.table import MEASURED, Figure, Row, describe_machine, save_json

# A case is not begun with fewer seconds left.
LEAST_SECONDS = 5


@dataclass
class Run:
    """One run of a part, which saves every row as it comes.

    Attributes:
        path: of the JSON file.
        device: where to measure.
        quick: whether small models and images are to show that the part works.
        deadline: on the clock ``time.monotonic``.
        data: folder with ``images`` and annotations in COCO's format.
        rows: the results.
        remarks: lines to be read with them.
        further: plain data that is stored besides.
    """

    path: str
    device: torch.device
    quick: bool
    deadline: float
    data: str
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    further: dict[str, Any] = field(default_factory=dict)

    def save(self, error: str = "") -> None:
        content = {"error": error, "remarks": self.remarks, "rows": self.rows}
        save_json(self.path, content | self.further)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        self.save()
        shown = (f"{name} {figure.value:.4g} {figure.unit}" for name, figure in row.figures.items())
        words = [*map(str, row.labels.values()), *shown, row.note]
        sys.stdout.write(", ".join(filter(None, words)) + "\n")
        sys.stdout.flush()
        return row

    def attempt(self, labels: dict[str, Any], work: Callable[[], Row]) -> Row:
        """Add the row that ``work`` makes; where it fails, a row that says so, and the others go on."""
        row = Row(labels)
        if self.deadline - time.monotonic() < LEAST_SECONDS:
            row.note = "not reached in the time of this part"
        else:
            try:
                row = work()
            except Exception as error:
                traceback.print_exc(limit=-3)
                row.note = f"failed: {in_one_line(error)}"
        gc.collect()
        torch.cuda.empty_cache()
        return self.add(row)

    def compare(self, cases: Iterable[Case], step: Callable[[Run, Case, float], Row]) -> None:
        """Run ``step`` on every case with its share of the seconds that are left; add ratios to cached."""
        cases, left_out = without_baselines(list(cases))
        self.remarks += filter(None, [left_out])
        done = len(self.rows)

        def make_row(case: Case) -> Row:
            share = (self.deadline - time.monotonic()) / (len(cases) - len(self.rows) + done)
            return self.attempt(case.labels, lambda: step(self, case, share))

        run_cases(cases, make_row)
        self.save()


@dataclass(frozen=True)
class Part:
    """What one part measures.

    Attributes:
        work: measures it.
        minutes: it gets at most.
        title: what it is about.
        note: how to read the figures.
        columns: the figures that the page shows; none for all.
        needs_data: it trains on real images.
    """

    work: Callable[[Run], None]
    minutes: float
    title: str
    note: str = ""
    columns: tuple[str, ...] = ()
    needs_data: bool = False


PARTS: dict[str, Part] = {}


def part(minutes: float, title: str, note: str = "", **more) -> Callable:
    """Make a function a part, of the function's name."""

    def register(work: Callable[[Run], None]) -> Callable[[Run], None]:
        PARTS[work.__name__] = Part(work, minutes, title, note, **more)
        return work

    return register


def in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measured(value: float, unit: str) -> Figure:
    return Figure(value, unit, MEASURED)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as every result states it.

    Raises:
        ValueError: there is no such device.
    """
    if device.type != "cuda":
        return describe_machine(device)
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu --quick tries whether the parts run")
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = next(iter(subprocess.run(query, capture_output=True, text=True).stdout.split()), None)
    cudnn = torch.backends.cudnn.version()
    return describe_machine(device) | {"gpus": torch.cuda.device_count(), "cudnn": cudnn, "driver": driver}
