"""Rows of figures, each with its unit and method, as a table on the terminal, JSON or CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .. import __version__
from ..files import write_whole

COUNTED, ESTIMATED, MEASURED, PUBLISHED = "counted", "estimated", "measured", "published"
# Labels of what stands beside each other; rows that differ in others may be in tables of their own.
_COMPARED = ("model", "training")


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


@dataclass
class Report:
    """A set of rows, and what is needed to make them again.

    Attributes:
        title: of the table.
        command: that made it.
        rows: the cases.
        machine: from `describe_machine`.
        definitions: what the figures mean.
    """

    title: str
    command: str
    rows: list[Row]
    machine: dict[str, Any]
    definitions: list[str]

    def print(self, console: Console) -> None:
        """Show the tables on a terminal."""
        print_rows(console, self.title, self.rows)
        for line in self.definitions:
            console.print(line, style="dim", highlight=False)

    def print_peaks(self, console: Console, count: int) -> None:
        """Show the ``count`` largest tensors alive at the peak of every row."""
        for row in self.rows:
            if not (count and row.at_peak):
                continue
            title = f"alive at the peak: {_name(row)}"
            table = Table(title=title, title_justify="left", caption=row.peak, caption_justify="left")
            for header in ("MiB", "shape", "dtype", "operation", "module", "for"):
                table.add_column(header, justify="right" if header == "MiB" else "left", overflow="fold")
            for entry in row.at_peak[:count]:
                table.add_row(
                    f"{entry['bytes'] / 2**20:.1f}",
                    " x ".join(map(str, entry["shape"])),
                    entry["dtype"],
                    entry["operation"],
                    entry["module"],
                    entry["for"],
                )
            console.print(table)

    def save_json(self, path: str) -> None:
        save_json(path, asdict(self))

    def save_csv(self, path: str) -> None:
        save_csv(path, self.rows)


def describe_machine(device: torch.device | None) -> dict[str, Any]:
    """The class of machine and the versions that figures come from; nothing that names this one.

    Args:
        device: where the steps ran; None if they were counted.
    """
    machine: dict[str, Any] = {"cpu": _cpu_model(), "cpu cores": os.cpu_count()}
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu memory (bytes)": properties.total_memory}
    machine |= {
        "rev_det": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device is not None and device.type == "cuda" else None,
    }
    for name in ("torchvision", "fvcore", "timm"):
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    return machine


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Show rows as one table, and their splits as another."""
    _print_figures(console, title, rows, lambda row: row.figures)
    if any(row.split for row in rows):
        _print_figures(console, "memory at the peak, and besides", rows, lambda row: row.split)
    for row in rows:
        if row.note:
            console.print(f"{_name(row)}: {row.note}", highlight=False)


def print_table(console: Console, table: Table) -> None:
    """Show a table; where there is little room, words stay whole and the columns of numbers are narrow."""
    if _extent(console, table).maximum > console.width:
        for column in table.columns:
            if not column.no_wrap:
                words = " ".join(map(str, (column.header, *column.cells))).split()
                column.min_width = max(map(len, words), default=None)
                column.max_width = column.min_width if column.justify == "right" else None
    console.print(table)


def save_json(path: str, content: Any) -> None:
    """Write JSON with one figure a line, short to read and to compare."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    for innermost in (r"\[[^\[\]{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, _on_one_line, text)
    write_whole(path, lambda part: Path(part).write_text(text + "\n", encoding="utf-8"))


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


def common_labels(rows: Sequence[Row]) -> dict[str, str | int]:
    """The labels that are the same in all rows."""
    return {
        name: value
        for name, value in rows[0].labels.items()
        if all(row.labels.get(name) == value for row in rows)
    }


def label_text(name: str, value: str | int) -> str:
    """A label as it can stand by itself."""
    if name == "images":
        return f"{value} image{'' if value == 1 else 's'}"
    return value if isinstance(value, str) else f"{name} {value}"


def format_value(figure: Figure) -> str:
    """Three or four digits that count; errors by their order of magnitude."""
    value = figure.value
    if figure.unit == "relative":
        return f"{value:.1e}"
    if value == 0 or float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}"


def _print_figures(
    console: Console, title: str, rows: Sequence[Row], part: Callable[[Row], dict[str, Figure]]
) -> None:
    for table in _fitting(console, title, rows, part):
        print_table(console, table)


def _fitting(
    console: Console, title: str, rows: Sequence[Row], part: Callable[[Row], dict[str, Figure]]
) -> list[Table]:
    """One table, or several if it is too wide both ways: Rich leaves out columns that find no room."""
    table = _table(title, rows, part)
    for whole in (table, _turned(table)):
        if _fits(console, whole):
            return [whole]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        settings = (item for item in row.labels.items() if item[0] not in _COMPARED)
        groups.setdefault(tuple(settings), []).append(row)
    if len(groups) > 1:
        return [small for group in groups.values() for small in _fitting(console, title, group, part)]
    pieces: list[Table] = []
    chosen: list[str] = []
    for name in dict.fromkeys(name for row in rows for name in part(row)):
        wider = _narrow(_table(title, rows, part, (*chosen, name)))
        if pieces and _fits(console, wider):
            pieces[-1] = wider
            chosen.append(name)
        else:
            chosen = [name]
            pieces.append(_narrow(_table(title, rows, part, chosen)))
    return pieces


def _fits(console: Console, table: Table) -> bool:
    return _extent(console, table).minimum <= console.width


def _extent(console: Console, table: Table) -> Measurement:
    """Between whole words and no wrapping, whatever room there is."""
    return console.measure(table, options=console.options.update(max_width=10_000))


def _turned(table: Table) -> Table:
    """A table whose rows are the columns of another: for many figures of few cases."""
    turned = Table(title=table.title, title_justify="left")
    labels = [column for column in table.columns if column.justify != "right"]
    turned.add_column(", ".join(str(column.header) for column in labels))
    for values in zip(*(column.cells for column in labels), strict=True):
        turned.add_column(", ".join(map(str, values)), justify="right")
    for column in table.columns:
        if column.justify == "right":
            turned.add_row(" ".join(str(column.header).split()), *column.cells)
    return turned


def _narrow(table: Table) -> Table:
    """The same with all labels in one column."""
    narrow = Table(title=table.title, title_justify="left")
    labels = [column for column in table.columns if column.justify != "right"]
    figures = [column for column in table.columns if column.justify == "right"]
    narrow.add_column(", ".join(str(column.header) for column in labels))
    for column in figures:
        narrow.add_column(column.header, justify="right")
    joined = [", ".join(map(str, cells)) for cells in zip(*(column.cells for column in labels), strict=True)]
    for label, *values in zip(joined, *(column.cells for column in figures), strict=True):
        narrow.add_row(label, *values)
    return narrow


def _table(
    title: str,
    rows: Sequence[Row],
    part: Callable[[Row], dict[str, Figure]],
    figures: Sequence[str] | None = None,
) -> Table:
    """Labels to the left, figures to the right; what is the same everywhere goes into the title."""
    labels = list(dict.fromkeys(name for row in rows for name in row.labels))
    names = figures or list(dict.fromkeys(name for row in rows for name in part(row)))
    kinds = {name: _kinds(part(row)[name] for row in rows if name in part(row)) for name in names}
    same = common_labels(rows)
    common = [label_text(name, value) for name, value in same.items() if len(rows) > 1]
    if len(set(kinds.values())) == 1:
        common += kinds.values()
    table = Table(
        title=": ".join(filter(None, (title, ", ".join(dict.fromkeys(common))))), title_justify="left"
    )
    shown = [name for name in labels if name not in same or len(rows) == 1]
    for name in shown:
        table.add_column(name)
    for name in names:
        header = name if len(set(kinds.values())) == 1 else f"{name}\n({kinds[name]})"
        table.add_column(header, justify="right")
    for row in rows:
        values = [format_value(part(row)[name]) if name in part(row) else "-" for name in names]
        table.add_row(*(str(row.labels.get(name, "")) for name in shown), *values)
    return table


def _kinds(figures: Iterable[Figure]) -> str:
    return ", ".join(dict.fromkeys(f"{figure.unit}, {figure.method}" for figure in figures))


def _name(row: Row) -> str:
    return ", ".join(label_text(name, value) for name, value in row.labels.items())


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
