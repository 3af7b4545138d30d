"""Cases that are counted and measured, the presets, and how a command line names them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rev_det.comparison.cases import Case, Counting, Measuring, run_cases, without_baselines
from rev_det.comparison.models import (
    CACHED,
    CHECKPOINT,
    CHECKPOINT_KEPT,
    DETECTRON2,
    MODELS,
    REVERSIBLE,
    REVERSIBLE_KEPT,
    build,
    has_baselines,
    stages,
    trainings,
)
from rev_det.comparison.presets import CARDS, PRESETS, images_that_fit
from rev_det.memory.counting import GIB, MIB
from rev_det.modeling import RevMViT

VIT = MODELS["rev_vit_s"]
CPU = torch.device("cpu")


def case(training=REVERSIBLE_KEPT, **changes):
    arguments = {"batch": 1, "size": (32, 32), "dtype": "bf16", "depth": 2} | changes
    return Case("Rev-ViT-S", VIT, training, **arguments)


@pytest.fixture(scope="module")
def rows():
    return run_cases([case(CACHED), case(CHECKPOINT_KEPT), case()], Counting(listed=20).step)


def test_ratios_are_to_ordinary_autograd(rows):
    cached, _, reversible = (row.figures for row in rows)
    assert "peak memory, relative" not in cached
    for name, method in (("peak memory", "counted"), ("FLOPs", "counted"), ("estimated time", "estimated")):
        ratio = reversible[f"{name}, relative"]
        assert (ratio.unit, ratio.method) == ("x cached", method)
        assert ratio.value == pytest.approx(reversible[name].value / cached[name].value)


def test_the_split_adds_up_to_the_peak(rows):
    for row in rows:
        parts = {name: f.value for name, f in row.split.items()}
        whole = sum(parts.values())
        before = parts["weights"] + parts["optimizer state"]
        assert whole - before == pytest.approx(row.figures["peak memory"].value)
        images = 3 * 32 * 32 * 4 / GIB
        assert whole + images == pytest.approx(row.figures["in all"].value)
        # AdamW's two averages and a step number for each parameter.
        assert parts["optimizer state"] == pytest.approx(2 * parts["weights"], rel=1e-4)


def test_what_is_alive_at_the_peak_is_named_largest_first(rows):
    entries = rows[-1].at_peak
    sizes = [entry["bytes"] for entry in entries]
    assert len(sizes) == 20 and sizes == sorted(sizes, reverse=True)
    assert list(entries[0]) == ["bytes", "shape", "dtype", "operation", "module", "for"]
    assert any(entry["module"].startswith("blocks.") for entry in entries)
    assert rows[-1].peak.startswith("reached in aten.")


def test_a_case_is_measured_on_the_cpu():
    ticks = []
    runner = Measuring(CPU, 1, 3, progress=lambda: ticks.append(1))
    (row,) = run_cases([case(dtype="fp32")], runner.step)
    assert len(ticks) == 4
    assert set(row.figures) == {"time", "lower quartile", "upper quartile", "mean", "warm-up", "throughput"}
    assert {f.method for f in row.figures.values()} == {"measured"}
    assert runner.per_image(case(dtype="fp32")) == {}


@pytest.mark.parametrize("training", [CACHED, REVERSIBLE])
def test_the_counted_largest_batch_is_the_last_that_fits(training):
    wanted = case(training, dtype="fp32")
    limit = Counting().count(wanted).total + 20 * MIB
    batch = Counting().largest_batch(wanted, limit)
    assert batch > 8
    totals = [Counting().count(replace(wanted, batch=b)).total for b in (batch, batch + 1)]
    assert totals[0] <= limit < totals[1]
    assert Counting().largest_batch(wanted, 1000) == 0


@pytest.mark.parametrize("bound", [{"MOST_COUNTED": 8}, {"MOST_PIXELS": 8 * 32 * 32}])
def test_beyond_what_is_counted_the_largest_batch_is_extended_in_a_straight_line(monkeypatch, bound):
    for name, value in bound.items():
        monkeypatch.setattr(f"rev_det.comparison.cases.{name}", value)
    wanted = case(CACHED, dtype="fp32")
    low, high = (Counting().count(replace(wanted, batch=b)).total for b in (4, 8))
    counted = []
    count = Counting.count
    monkeypatch.setattr(Counting, "count", lambda self, c: counted.append(c.batch) or count(self, c))
    assert Counting().largest_batch(wanted, high + 100 * (high - low)) == 8 + 400
    assert max(counted) == 8


def test_the_measured_largest_batch_is_found_by_trying_two_steps_of_each(monkeypatch):
    def fake(step, batch, device, warm_up, steps, progress):
        assert (warm_up, steps) == (1, 1)
        if batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried.")
        return "result"

    monkeypatch.setattr("rev_det.comparison.cases.measure", fake)
    assert Measuring(CPU, 100, 400).largest_batch(case(), None) == 5


def test_what_does_not_fit_is_said_so(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried.")

    monkeypatch.setattr("rev_det.comparison.cases.measure", fail)
    runner = Measuring(CPU, 1, 1)
    assert [row.note for row in run_cases([case(CACHED), case()], runner.step)] == ["out of memory"] * 2
    # Nor what fitted when the batch was looked for.
    monkeypatch.setattr(runner, "largest_batch", lambda case, limit: 3)
    row = PRESETS["figure3b"].make_row(runner, case(CACHED, dtype="fp32"), None)
    assert (row.figures["largest batch"].value, row.note) == (3, "out of memory")


def test_throughput_at_the_largest_batch_is_measured_and_not_compared(monkeypatch):
    runner = Measuring(CPU, 1, 1)
    monkeypatch.setattr(runner, "largest_batch", lambda case, limit: 3)
    cases = [case(CACHED, dtype="fp32"), case(REVERSIBLE, dtype="fp32")]
    for row in run_cases(cases, lambda c: PRESETS["figure3b"].make_row(runner, c, None)):
        assert row.figures["largest batch"].value == 3
        assert row.figures["throughput"].unit == "images/s"
        # Each has a batch of its own.
        assert "time, relative" not in row.figures


def test_trainings_of_a_command_line():
    assert trainings(["reversible"], None, False) == [REVERSIBLE_KEPT]
    ours = ["cached", "checkpoint", "reversible"]
    assert trainings(ours, False, False) == [CACHED, CHECKPOINT, REVERSIBLE]
    peers = [CACHED, CHECKPOINT, CHECKPOINT_KEPT, DETECTRON2]
    assert trainings(["cached", "reversible"], None, True) == [*peers, REVERSIBLE_KEPT]
    with pytest.raises(ValueError, match="--activations must be some of .*cached.* got 'stored'"):
        trainings(["cached", "stored"], None, False)


def test_depths_of_rev_mvit_keep_the_shares_of_the_stages():
    assert stages(16) == (0, 2, 13, 15)  # as published
    assert stages(24) == (1, 4, 20, 23)
    assert stages(80) == (6, 16, 69, 79)
    for depth in range(7, 26):
        with torch.device("meta"):
            assert len(RevMViT(embed_dim=8, depth=depth, last_block_indexes=stages(depth)).blocks) == depth
    with pytest.raises(ValueError, match="--depth of a Rev-MViT must be at least 7 .* got 6"):
        stages(6)


def test_without_timm_detectron2s_models_are_left_out_with_a_line(monkeypatch):
    cases = [case(CACHED), case(DETECTRON2)]
    monkeypatch.setattr("rev_det.comparison.cases.has_baselines", lambda: False)
    left, line = without_baselines(cases)
    assert left == cases[:1]
    assert "timm" in line and "rev_det[baselines]" in line
    assert without_baselines(cases[:1]) == (cases[:1], "")


@pytest.mark.skipif(not has_baselines(), reason="needs timm")
@pytest.mark.parametrize("name", ["rev_vit_s", "rev_mvit_b"])
def test_detectron2s_models_have_our_sizes(name):
    theirs, ours = (build(MODELS[name], training, 8) for training in (DETECTRON2, CACHED))
    assert len(theirs.blocks) == 8
    outputs = theirs(torch.zeros(1, 3, 64, 64))
    for key, shape in ours.output_shape().items():
        # Ours are the concatenation of two streams.
        assert outputs[key].shape == (1, shape.channels // 2, 64 // shape.stride, 64 // shape.stride)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_compare_with_ordinary_autograd(name):
    compared = {c.training for c in PRESETS[name].cases}
    assert "cached" in compared and any(name.startswith(("reversible", "low_memory")) for name in compared)


@pytest.mark.parametrize("name", ["table1", "figure1", "figure3c"])
def test_presets_of_the_paper_make_rows_with_its_figures(name):
    wanted = case(REVERSIBLE, dtype="fp32")
    limit = Counting().count(wanted).total + 20 * MIB
    row = PRESETS[name].make_row(Counting(), wanted, limit)
    assert "images" not in row.labels
    figures = {key: (figure.value, figure.method) for key, figure in row.figures.items()}
    if name != "figure3c":
        assert figures["memory per image, published"] == (8.8, "published")
        assert figures["memory per image"][0] > 0 and figures["forward FLOPs"][1] == "counted"
    if name != "figure1":
        assert figures["largest batch"][0] > 1
    assert ("largest batch, published" in figures) == (name == "table1")


def test_images_that_fit_fill_the_card_and_no_more(monkeypatch):
    row = images_that_fit(case(CACHED, dtype="fp32", size=(224, 224)))
    images = [row.figures[f"{card} GB"].value for card in CARDS]
    assert images == sorted(images) and images[0] > 100
    one, each = (row.figures[name].value * GIB for name in ("one image", "each further one"))
    assert one == Counting().count(case(CACHED, dtype="fp32", size=(224, 224))).total
    for card, n in zip(CARDS, images, strict=True):
        assert one + (n - 1) * each <= card * 1e9 < one + n * each
    totals = {1: 10**9, 16: 16 * 10**9}
    monkeypatch.setattr(Counting, "count", lambda self, c: SimpleNamespace(total=totals[c.batch]))
    monkeypatch.setattr("rev_det.comparison.presets.CARDS", (0.9, 1, 2.5))
    assert [figure.value for figure in images_that_fit(case()).figures.values()][2:] == [0, 1, 2]
