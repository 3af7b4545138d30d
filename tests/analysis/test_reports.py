"""Tables, files and pictures of figures; the cases and presets behind them."""

import csv
import json

import matplotlib.image
import pytest
import torch
from rich.console import Console

from rev_det.analysis import peers
from rev_det.analysis.cases import Case, Counting, Measuring, run_cases, without_baselines
from rev_det.analysis.counting import MIB
from rev_det.analysis.peers import (
    CACHED,
    CHECKPOINT,
    CHECKPOINT_KEPT,
    DETECTRON2,
    MODELS,
    REVERSIBLE,
    REVERSIBLE_KEPT,
    build,
    schemes,
    stages,
)
from rev_det.analysis.plots import save_plot, save_scatter
from rev_det.analysis.presets import PRESETS
from rev_det.analysis.report import (
    Figure,
    Report,
    Row,
    describe_machine,
    format_value,
    print_rows,
)
from rev_det.files import write_whole
from rev_det.modeling import RevMViT

VIT = MODELS["rev_vit_s"]


def case(scheme=REVERSIBLE_KEPT, **changes):
    arguments = {"batch": 1, "size": (32, 32), "dtype": "bf16", "depth": 2} | changes
    return Case("Rev-ViT-S", VIT, scheme, **arguments)


def report(rows, title="a title"):
    return Report(title, "rev-det bench --model rev_vit_s", rows, describe_machine(None), ["What it means."])


@pytest.fixture(scope="module")
def rows():
    return run_cases([case(CACHED), case(CHECKPOINT_KEPT), case()], Counting())


def shown(made):
    console = Console(width=300, record=True, file=open("/dev/null", "w"))
    made.print(console)
    made.print_peaks(console, 2)
    return console.export_text()


def test_every_figure_has_unit_and_method_in_table_json_and_csv(rows, tmp_path):
    made = report(rows)
    text = shown(made)
    for kind in ("GiB, counted", "TFLOP, counted", "GB, counted", "kernels, counted", "ms, estimated"):
        assert kind in text
    assert "x cached, counted" in text and "x cached, estimated" in text
    made.save_json(str(tmp_path / "a.json"))
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["command"] == "rev-det bench --model rev_vit_s"
    figures = [f for row in content["rows"] for part in ("figures", "split") for f in row[part].values()]
    assert len(figures) >= 3 * 11
    assert all(set(f) == {"value", "unit", "method"} for f in figures)
    assert {f["method"] for f in figures} == {"counted", "estimated"}
    made.save_csv(str(tmp_path / "a.csv"))
    lines = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(lines) == len(figures)
    assert [line["method"] for line in lines] == [f["method"] for f in figures]
    assert [float(line["value"]) for line in lines] == [f["value"] for f in figures]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


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
        assert whole - parts["weights"] - parts["optimizer state"] == pytest.approx(
            row.figures["peak memory"].value
        )
        images = 3 * 32 * 32 * 4 / 2**30
        assert whole + images == pytest.approx(row.figures["in all"].value)
        named = {"gradients", "outputs", "backbone: kept for backward", "backbone: working memory"}
        assert named < set(parts)
        # AdamW's two averages and a step number for each parameter.
        assert row.split["optimizer state"].value == pytest.approx(2 * row.split["weights"].value, rel=1e-4)


def test_what_is_alive_at_the_peak_is_named_largest_first(rows):
    entries = rows[-1].at_peak
    sizes = [entry["bytes"] for entry in entries]
    assert sizes == sorted(sizes, reverse=True)
    assert {"operation", "shape", "module", "dtype", "for"} < set(entries[0])
    assert any(entry["module"].startswith("blocks.") for entry in entries)
    text = shown(report(rows))
    assert "alive at the peak: Rev-ViT-S, reversible, attention kept, depth 2" in text
    assert "reached in aten." in text


def test_labels_that_are_the_same_everywhere_are_in_the_title(rows):
    text = shown(report(rows))
    assert text.splitlines()[0].startswith("a title: Rev-ViT-S, depth 2, 32x32, 1 image, bf16")


@pytest.mark.parametrize("width", [80, 100])
def test_where_there_is_little_room_no_word_is_broken(width):
    schemes = ("cached", "checkpoint, attention kept", "reversible, attention kept")
    wide = {name: Figure(1.234, "GiB", "counted") for name in ("one image", "each further one")}
    wide |= {f"{size} GB": Figure(25, "images", "counted") for size in (12, 16, 24, 40, 80, 141)}
    many = {name: Figure(1.234, "GiB", "counted") for name in ("peak memory", "in all")}
    many |= {name: Figure(0.5, "x cached", "counted") for name in ("peak memory, relative", "time, relative")}
    for figures, rows in ((wide, schemes), (many, schemes * 3)):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))
        print_rows(console, "a title", [Row({"training": scheme}, figures) for scheme in rows])
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        words = " ".join([*rows, *figures, "counted) training"]).split()
        assert not set(words) - set(text.split())


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_however_little_room_there_is_every_figure_is_shown(width):
    names = ("peak memory", "in all", "FLOPs", "memory, relative", "FLOPs, relative", "backbone: working")
    trainings = ("cached", "Detectron2's own", "checkpoint, attention kept", "reversible, attention kept")
    rows = []
    for size in ("800x1344", "1024x1024"):
        for training in trainings:
            values = [200.5 + 10 * len(rows) + index for index in range(len(names))]
            figures = {n: Figure(v, "GiB", "counted") for n, v in zip(names, values, strict=True)}
            figures["FLOPs"] = Figure(values[2], "TFLOP", "counted")
            rows.append(Row({"model": "Rev-MViT-B", "training": training, "size": size}, figures))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    print_rows(console, "a title", rows)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for row in rows:
        for figure in row.figures.values():
            assert text.split().count(f"{figure.value:.1f}") == 1
    assert set(" ".join((*names, *trainings)).replace(",", "").split()) <= set(text.replace(",", "").split())


def test_nothing_half_written_is_left(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("before")

    def fail(part):
        with open(part, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(str(target), fail)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_the_machine_is_described_by_class_and_not_by_name():
    machine = describe_machine(None)
    assert machine["torch"] == torch.__version__
    assert machine["cpu cores"] >= 1 and machine["cpu"]
    assert "gpu" not in machine
    import platform

    assert not platform.node() or platform.node() not in json.dumps(machine)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (12, "12"), (0.12345, "0.123"), (1.2345, "1.234"), (12.345, "12.35"), (123.45, "123.5")],
)
def test_figures_show_the_digits_that_count(value, text):
    assert format_value(Figure(value, "GiB", "counted")) == text


def test_errors_show_their_order_of_magnitude():
    assert format_value(Figure(3.456e-7, "relative", "measured")) == "3.5e-07"


def drawn(path):
    picture = matplotlib.image.imread(path)
    assert picture[..., :3].std() > 0.05, "an empty picture"
    return picture.shape


def test_bars_lines_and_scatter_are_drawn(rows, tmp_path):
    save_plot(report(rows), str(tmp_path / "bars.png"))
    deep = [
        Row({"model": "m", "training": t, "depth": d}, {"peak memory": Figure(d * f, "GiB", "counted")})
        for t, f in (("cached", 1.0), ("reversible", 0.1))
        for d in (4, 8, 16)
    ]
    save_plot(report(deep), str(tmp_path / "lines.png"))
    sizes = [
        Row({"model": "m", "training": "cached", "size": s}, {"FLOPs": Figure(v, "TFLOP", "counted")})
        for s, v in (("32x32", 1.0), ("64x32", 2.0), ("64x64", 4.0))
    ]
    save_plot(report(sizes), str(tmp_path / "sizes.png"))
    points = [
        Row(row.labels, row.figures | {"FLOPs": Figure(1.0 + row.labels["depth"], "TFLOP", "counted")})
        for row in deep
    ]
    save_scatter(report(points), str(tmp_path / "scatter.png"), "FLOPs", "peak memory")
    for name in ("bars", "lines", "sizes", "scatter"):
        assert min(drawn(tmp_path / f"{name}.png")[:2]) > 150
    # Three bars in each of two panels are wider than a line plot with one.
    assert drawn(tmp_path / "bars.png")[1] > drawn(tmp_path / "lines.png")[1]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture
def canvas(monkeypatch):
    """What would have been saved."""
    made = []
    monkeypatch.setattr("rev_det.analysis.plots._save", lambda canvas, path: made.append(canvas))
    return lambda: made[-1]


def measured_row(model, training, seconds, **labels):
    figures = {"time": seconds, "lower quartile": 0.9 * seconds, "upper quartile": 1.2 * seconds}
    figures = {name: Figure(value, "s", "measured") for name, value in figures.items()}
    return Row({"model": model, "training": training, "images": 2} | labels, figures)


def test_bars_stand_in_groups_of_what_can_be_compared(canvas):
    rows = [
        measured_row(model, training, 1.0, depth=depth)
        for depth in (16, 24)
        for model, training in (("Rev-M", "cached"), ("M", "Detectron2's own"), ("Rev-M", "reversible"))
    ]
    rows[0].figures["time, published"] = Figure(2.0, "s", "published")
    save_plot(report(rows), "a.png")
    (axes,) = canvas().axes
    names = ["cached", "Detectron2's own M", "reversible"]
    labels = axes.get_yticklabels()
    headings = ["depth 16", "depth 24"]
    assert [label.get_text() for label in labels] == [headings[0], *names, "", headings[1], *names]
    assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == headings
    assert canvas().get_suptitle() == "a title\nRev-M, 2 images"
    quartiles = [line for line in axes.lines if list(line.get_xdata()) == [0.9, 1.2]]
    assert len(quartiles) == 6
    assert [text.get_text() for text in canvas().legends[0].get_texts()] == ["the paper's figure"]


def test_a_scatter_names_each_model_once_and_marks_the_papers_figures(canvas):
    def row(model, training, y, **more):
        figures = {"FLOPs": Figure(4.0, "GMAC", "counted"), "memory per image": Figure(y, "MiB", "counted")}
        return Row({"model": model, "training": training}, figures | more)

    published = {"memory per image, published": Figure(60.0, "MiB", "published")}
    rows = [
        row("M", "Detectron2's own", 70.0, **published),
        row("Rev-M", "cached", 50.0),
        row("Rev-M", "reversible", 3.0),
    ]
    save_scatter(report(rows), "a.png", "FLOPs", "memory per image")
    (axes,) = canvas().axes
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("M", (4.0, 70.0))]
    marked = [c.get_offsets().tolist() for c in axes.collections if c.get_label() == "the paper's figure"]
    assert marked == [[[4.0, 60.0]]]


@pytest.mark.parametrize("factor, scale", [(2.0, "linear"), (100.0, "log")])
def test_lines_far_apart_are_on_a_logarithmic_axis_under_one_legend(canvas, factor, scale):
    rows = [
        Row({"model": "m", "training": t, "depth": d}, {"largest batch": Figure(f * d, "images", "counted")})
        for t, f in (("cached", 1.0), ("reversible", factor))
        for d in (10, 11, 12)
    ]
    save_plot(report(rows), "a.png")
    (axes,) = canvas().axes
    assert axes.get_yscale() == scale
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "11", "12"]
    assert [text.get_text() for text in canvas().legends[0].get_texts()] == ["cached", "reversible"]


def test_nothing_to_draw_is_an_error(tmp_path):
    for save in (save_plot, lambda *args: save_scatter(*args, "FLOPs", "time")):
        with pytest.raises(ValueError, match="--plot: there are no figures to draw"):
            save(
                report([Row({"model": "m", "training": "cached"}, note="out of memory")]),
                str(tmp_path / "a.png"),
            )
    assert not list(tmp_path.iterdir())


def test_a_case_is_measured_on_the_cpu():
    ticks = []
    runner = Measuring(torch.device("cpu"), 1, 3, progress=lambda: ticks.append(1))
    (row,) = run_cases([case(dtype="fp32")], runner)
    assert len(ticks) == 4
    assert set(row.figures) == {"time", "lower quartile", "upper quartile", "mean", "warm-up", "throughput"}
    assert {f.method for f in row.figures.values()} == {"measured"}
    assert runner.per_image(case(dtype="fp32"), (1, 2)) == {}


def test_what_does_not_fit_is_said_so(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried.")

    monkeypatch.setattr("rev_det.analysis.cases.measure", fail)
    rows = run_cases([case(CACHED), case()], Measuring(torch.device("cpu"), 1, 1))
    assert [row.note for row in rows] == ["out of memory"] * 2
    assert "out of memory" in shown(report(rows))


@pytest.mark.parametrize("scheme", [CACHED, REVERSIBLE], ids=lambda s: s.name)
def test_the_counted_largest_batch_is_the_last_that_fits(scheme):
    wanted = case(scheme, dtype="fp32")
    limit = Counting().count(wanted).total + 20 * MIB
    batch = Counting().largest_batch(wanted, limit)
    assert batch > 8
    totals = [Counting().count(case(scheme, dtype="fp32", batch=b)).total for b in (batch, batch + 1)]
    assert totals[0] <= limit < totals[1]
    assert Counting().largest_batch(wanted, 1000) == 0


def test_a_counted_largest_batch_beyond_what_is_counted_is_extended_in_a_straight_line(monkeypatch):
    monkeypatch.setattr("rev_det.analysis.cases.MOST_COUNTED", 8)
    wanted = case(CACHED, dtype="fp32")
    low, high = (Counting().count(case(CACHED, dtype="fp32", batch=b)).total for b in (4, 8))
    limit = high + 100 * (high - low)
    monkeypatch.setattr(Counting, "count", refuse_more_than(8, Counting.count))
    assert Counting().largest_batch(wanted, limit) == 8 + 400


def refuse_more_than(most, count):
    def counted(self, case):
        assert case.batch <= most
        return count(self, case)

    return counted


def test_the_measured_largest_batch_is_found_by_trying(monkeypatch):
    def fake(run, release, batch, *args):
        if batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried.")

    monkeypatch.setattr("rev_det.analysis.cases.measure", lambda *args: fake(*args) or "result")
    assert Measuring(torch.device("cpu"), 1, 1).largest_batch(case(), None) == 5


def test_a_batch_is_tried_with_two_steps_however_many_are_to_be_timed(monkeypatch):
    tried = []

    def fake(run, release, batch, device, warm_up, steps, *args):
        tried.append((warm_up, steps))
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried.")

    monkeypatch.setattr("rev_det.analysis.cases.measure", lambda *args: fake(*args) or "result")
    assert Measuring(torch.device("cpu"), 100, 400).largest_batch(case(), None) == 1
    assert set(tried) == {(1, 1)}


def test_schemes_of_a_command_line():
    assert schemes(["reversible"], None, False) == [REVERSIBLE_KEPT]
    assert schemes(["cached", "checkpoint", "reversible"], False, False) == [CACHED, CHECKPOINT, REVERSIBLE]
    assert schemes(["cached", "reversible"], None, True) == [
        CACHED,
        CHECKPOINT,
        CHECKPOINT_KEPT,
        DETECTRON2,
        REVERSIBLE_KEPT,
    ]
    with pytest.raises(ValueError, match="--activations must be some of .*cached.* got 'stored'"):
        schemes(["cached", "stored"], None, False)


@pytest.mark.parametrize(
    "depth, last", [(7, (0, 2, 4, 6)), (16, (0, 2, 13, 15)), (24, (1, 4, 20, 23)), (80, (6, 16, 69, 79))]
)
def test_depths_of_rev_mvit_keep_the_shares_of_the_stages(depth, last):
    assert stages(depth) == last


def test_every_depth_of_rev_mvit_can_be_built():
    for depth in range(7, 26):
        with torch.device("meta"):
            assert len(RevMViT(embed_dim=8, depth=depth, last_block_indexes=stages(depth)).blocks) == depth
    with pytest.raises(ValueError, match="--depth of a Rev-MViT must be at least 7 .* got 6"):
        stages(6)


def test_without_timm_detectron2s_models_are_left_out_with_a_line(monkeypatch):
    cases = [case(CACHED), case(DETECTRON2)]
    monkeypatch.setattr("rev_det.analysis.cases.has_baselines", lambda: False)
    left, line = without_baselines(cases)
    assert left == cases[:1]
    assert "timm" in line and "rev_det[baselines]" in line
    assert without_baselines(cases[:1]) == (cases[:1], "")


@pytest.mark.skipif(not peers.has_baselines(), reason="needs timm")
@pytest.mark.parametrize("name", ["rev_vit_s", "rev_mvit_b"])
def test_detectron2s_models_have_our_sizes(name):
    theirs = build(MODELS[name], DETECTRON2, 8)
    ours = build(MODELS[name], CACHED, 8)
    assert len(theirs.blocks) == 8
    outputs = theirs(torch.zeros(1, 3, 64, 64))
    for key, shape in ours.output_shape().items():
        # Ours are the concatenation of two streams.
        assert outputs[key].shape == (1, shape.channels // 2, 64 // shape.stride, 64 // shape.stride)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_compare_with_ordinary_autograd(name):
    preset = PRESETS[name]
    assert {c.scheme.name for c in preset.cases} >= {"cached"}
    assert any(c.scheme.name.startswith("reversible") for c in preset.cases)


@pytest.mark.parametrize("name", ["table1", "figure1", "figure3c"])
def test_presets_of_the_paper_make_rows_with_its_figures(name, monkeypatch):
    chosen = [
        c
        for c in PRESETS[name].cases
        if c.scheme in (CACHED, REVERSIBLE) and c.model in (VIT, MODELS["rev_vit_b"])
    ]
    cases = [Case(c.title, c.model, c.scheme, 1, (32, 32), "fp32", 2) for c in chosen[:2]]
    # Weights, gradients and optimizer state of the first model, and some more.
    limit = Counting().count(cases[0]).total + 20 * MIB
    done = []
    rows = PRESETS[name].run(cases, Counting(), limit, lambda: done.append(1))
    assert len(rows) == len(done) == 2
    for row in rows:
        assert "images" not in row.labels
        if name != "figure3c":
            assert row.figures["memory per image"].unit == "MiB"
            assert row.figures["forward FLOPs"].method == "counted"
        if name != "figure1":
            assert row.figures["largest batch"].value > 1
    if name != "figure3c":
        published = rows[1].figures["memory per image, published"]
        assert (published.value, published.method) == (8.8, "published")


def test_a_largest_batch_that_does_not_fit_when_it_is_timed_is_said_so(monkeypatch):
    runner = Measuring(torch.device("cpu"), 1, 1)
    monkeypatch.setattr(runner, "largest_batch", lambda case, limit: 3)
    monkeypatch.setattr(runner, "try_measure", lambda case, warm_up, steps: None)
    (row,) = PRESETS["figure3b"].run([case(CACHED, dtype="fp32")], runner, None, lambda: None)
    assert (row.figures["largest batch"].value, row.note) == (3, "out of memory")


def test_throughput_at_the_largest_batch_is_measured(monkeypatch):
    cases = [case(CACHED, dtype="fp32"), case(REVERSIBLE, dtype="fp32")]
    runner = Measuring(torch.device("cpu"), 1, 1)
    monkeypatch.setattr(runner, "largest_batch", lambda case, limit: 3)
    rows = PRESETS["figure3b"].run(cases, runner, None, lambda: None)
    assert [row.figures["largest batch"].value for row in rows] == [3, 3]
    assert all(row.figures["throughput"].unit == "images/s" for row in rows)
