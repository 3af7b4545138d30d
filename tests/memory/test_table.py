"""Rows of figures on the terminal, in JSON and in CSV."""

import csv
import json
import platform

import pytest
import torch
from rich.console import Console

from rev_det.memory.table import (
    Figure,
    Row,
    describe_machine,
    grid,
    print_peaks,
    print_rows,
    save_csv,
    save_json,
)

NAMES = ("peak memory", "in all", "FLOPs", "memory, relative", "FLOPs, relative", "backbone: working")


@pytest.fixture
def rows():
    made = []
    for size in ("800x1344", "1024x1024"):
        for training in ("cached", "Detectron2's own", "checkpoint, attention kept"):
            values = [200.5 + 10 * len(made) + index for index in range(len(NAMES))]
            figures = {n: Figure(v, "GiB", "counted") for n, v in zip(NAMES, values, strict=True)}
            made.append(Row({"model": "Rev-MViT-B", "training": training, "size": size}, figures))
    return made


def shown(show, width=300):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    show(console)
    return console.export_text()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_however_little_room_there_is_every_figure_is_shown(rows, width):
    text = shown(lambda console: print_rows(console, "a title", rows), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for row in rows:
        for figure in row.figures.values():
            assert text.split().count(f"{figure.value:.1f}") == 1
    assert text.startswith("a title: Rev-MViT-B"), "what all have in common is in the title"


def test_a_grid_has_units_methods_and_gaps(rows):
    del rows[0].figures["in all"]
    header, first, *_ = grid(rows)
    assert header[:3] == ["training", "size", "peak memory (GiB, counted)"]
    assert first[:2] == ["cached", "800x1344"] and "-" in first


def test_notes_and_what_is_alive_at_the_peak_are_shown():
    entry = {"bytes": 2**21, "shape": [4, 5], "dtype": "float32", "operation": "aten.mm", "module": "a.b"}
    row = Row({"model": "M", "images": 1}, at_peak=[entry | {"for": "outputs"}] * 3, note="out of memory")
    row.peak = "reached in aten.mm"
    text = shown(lambda console: (print_rows(console, "it", [row]), print_peaks(console, [row], 2)))
    assert "M, 1 image: out of memory" in text and "alive at the peak: M, 1 image" in text
    assert text.count("4 x 5") == 2 and "2.0" in text and "reached in aten.mm" in text


def test_files_hold_every_figure_with_unit_and_method(rows, tmp_path):
    save_json(str(tmp_path / "a.json"), {"title": "a title", "rows": rows})
    content = json.loads((tmp_path / "a.json").read_text())
    figures = [figure for row in content["rows"] for figure in row["figures"].values()]
    assert all(set(figure) == {"value", "unit", "method"} for figure in figures)
    assert [figure["value"] for figure in figures] == [
        figure.value for row in rows for figure in row.figures.values()
    ]
    save_csv(str(tmp_path / "a.csv"), rows)
    lines = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [float(line["value"]) for line in lines] == [figure["value"] for figure in figures]
    assert {(line["unit"], line["method"]) for line in lines} == {("GiB", "counted")}
    assert lines[0]["training"] == "cached"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_the_machine_is_described_by_class_and_not_by_name():
    machine = describe_machine(None)
    assert machine["torch"] == torch.__version__
    assert machine["cpu cores"] >= 1 and machine["cpu"] and "gpu" not in machine
    assert not platform.node() or platform.node() not in json.dumps(machine)


@pytest.mark.parametrize(
    "value, unit, text",
    [
        *[(0, "GiB", "0"), (12, "GiB", "12"), (0.12345, "GiB", "0.123"), (1.2345, "GiB", "1.234")],
        *[(12.345, "GiB", "12.35"), (123.45, "GiB", "123.5"), (3.456e-7, "relative", "3.5e-07")],
    ],
)
def test_figures_show_the_digits_that_count(value, unit, text):
    assert str(Figure(value, unit, "counted")) == text
