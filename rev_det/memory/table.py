"""Rows of figures, each with its unit and method, as a table on the terminal, JSON or CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..files import write_text, write_whole

COUNTED, ESTIMATED, MEASURED, PUBLISHED = "counted", "estimated", "measured", "published"


@dataclass(frozen=True)
class Figure:
    """A number with what it takes to read it.

    Attributes:
        value: the number.
        unit: "GiB", "TFLOP", "s", "x cached", ...
        method: "counted" (exact, without running the step on a device), "estimated" (from what was counted,
            with assumed rates), "measured" (on a device), or "published" (the paper's).
    """

    value: float
    unit: str
    method: str

    def __str__(self) -> str:
        """Three or four digits that count; errors by their order of magnitude."""
        if self.unit == "relative":
            return f"{self.value:.1e}"
        size = abs(self.value)
        if size == 0 or float(size).is_integer() and size < 1e6:
            return f"{self.value:.0f}"
        return f"{self.value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"


@dataclass
class Row:
    """One case.

    Attributes:
        labels: what was run.
        figures: the results, by name.
        split: parts of a result, shown in a table of their own.
        at_peak: what is alive at the peak of memory, largest first.
        peak: where the peak is reached.
        note: why there are no figures.
    """

    labels: dict[str, str | int]
    figures: dict[str, Figure] = field(default_factory=dict)
    split: dict[str, Figure] = field(default_factory=dict)
    at_peak: list[dict[str, Any]] = field(default_factory=list)
    peak: str = ""
    note: str = ""

    def __str__(self) -> str:
        return ", ".join(label_text(*label) for label in self.labels.items())


def common_labels(rows: Sequence[Row]) -> dict[str, str | int]:
    """The labels that are the same in all rows."""
    return {n: v for n, v in rows[0].labels.items() if all(row.labels.get(n) == v for row in rows)}


def label_text(name: str, value: str | int) -> str:
    """A label as it can stand by itself."""
    if name == "images":
        return f"{value} image{'' if value == 1 else 's'}"
    return value if isinstance(value, str) else f"{name} {value}"


def grid(rows: Sequence[Row], part: str = "figures") -> list[list[str]]:
    """The cells of a table: a line of headers, then one for each row; what all have in common is left out.

    Args:
        part: "figures" or "split".
    """
    same = common_labels(rows) if len(rows) > 1 else {}
    labels = [n for n in dict.fromkeys(n for row in rows for n in row.labels) if n not in same]
    kinds = {n: (f.unit, f.method) for row in rows for n, f in getattr(row, part).items()}
    lines = [[*labels, *(f"{name} ({unit}, {method})" for name, (unit, method) in kinds.items())]]
    for row in rows:
        figures = getattr(row, part)
        cells = [str(figures.get(name, "-")) for name in kinds]
        lines.append([*(str(row.labels.get(n, "")) for n in labels), *cells])
    return lines


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Show rows as a table, their splits as another, and their notes."""
    common = [label_text(*label) for label in common_labels(rows).items() if len(rows) > 1]
    title = ": ".join(filter(None, (title, ", ".join(common))))
    for part, heading in (("figures", title), ("split", "memory at the peak, and besides")):
        if any(getattr(row, part) for row in rows):
            _print_grid(console, heading, grid(rows, part))
    for row in rows:
        if row.note:
            console.print(f"{row}: {row.note}", highlight=False)


def _print_grid(console: Console, title: str, lines: list[list[str]]) -> None:
    """A line for each row or, where that is too wide, a column; several tables if these are too many."""
    table = _table(title, lines)
    if console.measure(table, options=console.options.update(max_width=10_000)).minimum > console.width:
        turned = [list(column) for column in zip(*lines, strict=True)]
        # The names of the figures take half of the width.
        fit = max(1, console.width // 26)
        for first in range(1, len(lines), fit):
            console.print(_table(title, [[line[0], *line[first : first + fit]] for line in turned]))
        return
    console.print(table)


def _table(title: str, lines: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for header, cell in zip(lines[0], lines[1], strict=True):
        is_number = re.fullmatch(r"-|[-\d.e+]*\d", cell) is not None
        table.add_column(
            header.replace(" (", "\n("), justify="right" if is_number else "left", overflow="fold"
        )
    for line in lines[1:]:
        table.add_row(*line)
    return table


def print_peaks(console: Console, rows: Sequence[Row], count: int) -> None:
    """Show the ``count`` largest tensors alive at the peak of every row."""
    for row in rows:
        if count and row.at_peak:
            title = f"alive at the peak: {row}"
            table = Table(title=title, title_justify="left", caption=row.peak, caption_justify="left")
            for header in ("MiB", *list(row.at_peak[0])[1:]):
                table.add_column(header, overflow="fold")
            for entry in row.at_peak[:count]:
                nbytes, shape, *words = entry.values()
                table.add_row(f"{nbytes / 2**20:.1f}", " x ".join(map(str, shape)), *words)
            console.print(table)


def describe_machine(device: torch.device | None) -> dict[str, Any]:
    """The class of machine and the versions that figures come from; nothing that names this one.

    Args:
        device: where the steps ran; None if they were counted.
    """
    machine: dict[str, Any] = {"cpu": _cpu_model(), "cpu cores": os.cpu_count()}
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu memory (bytes)": properties.total_memory}
    machine |= {
        "rev_det": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }
    for name in ("torchvision", "fvcore", "timm"):
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    return machine


def save_json(path: str, content: dict[str, Any]) -> None:
    """Write JSON with one figure a line, short to read and to compare; rows among the values, too."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=asdict)
    for innermost in (r"\[[^\[\]{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, _on_one_line, text)
    write_text(path, text + "\n")


def save_csv(path: str, rows: Sequence[Row]) -> None:
    """Write one line for each figure: the labels, then name, value, unit and method."""
    names = list(dict.fromkeys(name for row in rows for name in row.labels))

    def write(part: str) -> None:
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "figure", "value", "unit", "method"])
            for row in rows:
                labels = [row.labels.get(name, "") for name in names]
                for name, figure in (row.figures | row.split).items():
                    writer.writerow([*labels, name, figure.value, figure.unit, figure.method])

    write_whole(path, write)


def _on_one_line(match: re.Match) -> str:
    opening, *inside, closing = match[0]
    return opening + re.sub(r"\s*\n\s*", " ", "".join(inside)).strip() + closing


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
