"""Pictures of rows: what they draw of them."""

import matplotlib.image
import pytest
from matplotlib.figure import Figure as Canvas

from rev_det.comparison.plots import save_plot
from rev_det.memory.table import Figure, Row


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """A function that draws rows and returns the canvas."""
    canvases = []
    save = Canvas.savefig
    noting = lambda canvas, *args, **options: canvases.append(canvas) or save(canvas, *args, **options)  # noqa: E731
    monkeypatch.setattr(Canvas, "savefig", noting)

    def draw(rows, against=None):
        save_plot("a title", rows, str(tmp_path / "a.png"), against)
        picture = matplotlib.image.imread(tmp_path / "a.png")
        assert picture[..., :3].std() > 0.03 and min(picture.shape[:2]) > 150, "an empty picture"
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        return canvases[-1]

    return draw


def rows_of(name, unit, value, **sweep):
    """Rows of two ways of training, the second ten times better, along one label."""
    ((label, places),) = sweep.items()
    return [
        Row({"model": "M", "training": t, label: at}, {name: Figure(value(i) / f, unit, "counted")})
        for t, f in (("cached", 1.0), ("reversible", 10.0))
        for i, at in enumerate(places)
    ]


@pytest.mark.parametrize("name", ["time", "peak memory"])
def test_bars_name_what_differs_and_mark_what_was_published(draw, name):
    rows = []
    for model, training in (("Rev-M", "cached"), ("M", "Detectron2's own"), ("Rev-M", "reversible")):
        values = {name: 1.0, "lower quartile": 0.9, "upper quartile": 1.2}
        figures = {n: Figure(value, "s", "measured") for n, value in values.items()}
        rows.append(Row({"model": model, "training": training, "images": 2}, figures))
    rows[0].figures[f"{name}, published"] = Figure(2.0, "s", "published")
    canvas = draw([*rows, Row({"model": "M", "training": "cached"}, note="out of memory")])
    (axes,) = canvas.axes
    labels = ["Rev-M, cached", "M, Detectron2's own", "Rev-M, reversible"]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert canvas.get_suptitle() == "a title\n2 images"
    assert axes.get_title() == f"{name} (s, measured)"
    quartiles = [line for line in axes.lines if list(line.get_xdata()) == [0.9, 1.2]]
    assert len(quartiles) == (3 if name == "time" else 0)
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "d"] == [[2.0]]


@pytest.mark.parametrize(
    "sweep, ticks",
    [
        ({"depth": (10, 12, 24)}, [10, 12, 24]),
        ({"size": ("32x32", "64x32", "64x64")}, [1024, 2048, 4096]),
        ({"GB": (12, 16, 80)}, [12, 16, 80]),
    ],
)
@pytest.mark.parametrize("growth, scale", [(1, "linear"), (2, "log")])
def test_lines_run_along_what_is_swept(draw, sweep, ticks, growth, scale):
    canvas = draw(rows_of("largest batch", "images", lambda i: 10.0 * (1 + i) ** growth, **sweep))
    (axes,) = canvas.axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [ticks, ticks]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(map(str, *sweep.values()))
    assert axes.get_yscale() == scale
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["cached", "reversible"]


def test_a_figure_can_be_drawn_against_another(draw):
    rows = rows_of("memory per image", "MiB", lambda i: 50.0 + i, model=("S", "B"))
    for row, flops in zip(rows, (4.0, 17.0, 4.0, 17.0), strict=True):
        row.figures["forward FLOPs"] = Figure(flops, "GMAC per image", "counted")
    rows[0].figures["memory per image, published"] = Figure(60.0, "MiB", "published")
    (axes,) = draw(rows, "forward FLOPs").axes
    curves = [line for line in axes.lines if line.get_label() in ("cached", "reversible")]
    assert [line.get_xdata().tolist() for line in curves] == [[4, 17], [4, 17]]
    assert [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "_"] == [[60]]
    assert {text.get_text().strip() for text in axes.texts} == {"S", "B"}
    assert axes.get_xlabel() == "forward FLOPs (GMAC per image, counted)"


def test_nothing_to_draw_is_an_error(tmp_path):
    row = Row({"model": "m", "training": "cached"}, note="out of memory")
    with pytest.raises(ValueError, match="--plot: there are no figures to draw"):
        save_plot("a title", [row], str(tmp_path / "a.png"))
    assert not list(tmp_path.iterdir())
