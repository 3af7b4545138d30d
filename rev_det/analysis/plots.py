"""Pictures of reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from .report import PUBLISHED, Report, Row, format_value, write_whole

# Told apart by colour-blind readers too (Okabe and Ito); ours is the strong blue.
_COLOURS = {
    "cached": "#999999",
    "checkpoint": "#e69f00",
    "checkpoint, attention kept": "#d55e00",
    "reversible as published": "#56b4e9",
    "reversible": "#0072b2",
    "reversible, attention kept": "#0072b2",
    "Detectron2's own": "#444444",
}
_OTHER_COLOUR = "#009e73"
# Figures worth a panel of their own, in this order, if a report has them.
_PANELS = ("peak memory", "FLOPs", "time", "throughput", "memory per image", "largest batch")
# What rows can differ by along an axis, and its name.
_SWEEPS = {"depth": "depth (blocks)", "images": "images in a step", "size": "image size (pixels)"}


def save_plot(report: Report, path: str) -> None:
    """Draw lines along what the rows sweep (depth, images or size), or bars if they sweep nothing.

    Args:
        report: with figures.
        path: of a PNG (or what else matplotlib knows by the suffix).

    Raises:
        ValueError: there is nothing to draw.
        FileNotFoundError: the folder does not exist.
    """
    rows = [row for row in report.rows if row.figures]
    panels = [name for name in _PANELS if any(name in row.figures for row in rows)]
    if not panels:
        raise ValueError("--plot: there are no figures to draw")
    sweep = next((name for name in _SWEEPS if _is_swept(rows, name)), None)
    if sweep is None:
        height = 1.4 + 0.34 * len(rows)
        canvas = _canvas(6 + 3.4 * len(panels), height)
        grid = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, name in zip(grid, panels, strict=True):
            _bars(axes, rows, name)
        grid[0].set_yticks(range(len(rows)), [_name(row, rows) for row in rows])
        grid[0].invert_yaxis()
    else:
        canvas = _canvas(1 + 5.2 * len(panels), 4.4)
        for axes, name in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _lines(axes, rows, name, sweep)
    canvas.suptitle(report.title, fontsize="medium")
    _save(canvas, path)


def save_scatter(report: Report, path: str, x: str, y: str) -> None:
    """Draw one figure of each row against another, as the paper's figure 1 does.

    Raises:
        ValueError: no row has both figures.
        FileNotFoundError: the folder does not exist.
    """
    rows = [row for row in report.rows if x in row.figures and y in row.figures]
    if not rows:
        raise ValueError("--plot: there are no figures to draw")
    canvas = _canvas(7, 4.6)
    axes = canvas.subplots()
    for training in dict.fromkeys(row.labels["training"] for row in rows):
        points = [row for row in rows if row.labels["training"] == training]
        values = [(row.figures[x].value, row.figures[y].value) for row in points]
        axes.scatter(*zip(*values, strict=True), color=_colour(training), label=training, s=40)
        for row, point in zip(points, values, strict=True):
            axes.annotate(
                row.labels["model"], point, textcoords="offset points", xytext=(6, 3), fontsize="small"
            )
    axes.set(
        xlabel=_axis_title(rows, x),
        ylabel=_axis_title(rows, y),
        yscale="log",
        title=report.title,
    )
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.14)
    axes.legend(fontsize="small")
    _save(canvas, path)


def _is_swept(rows: Sequence[Row], name: str) -> bool:
    """Whether some model, trained in some way, appears at several values of a label and with nothing else."""
    others = [n for n in ("model", "training", *_SWEEPS) if n != name]
    groups: dict[tuple, set] = {}
    for row in rows:
        groups.setdefault(tuple(row.labels.get(n) for n in others), set()).add(row.labels.get(name))
    return max((len(values) for values in groups.values()), default=0) > 2


def _bars(axes: Axes, rows: Sequence[Row], name: str) -> None:
    for i, row in enumerate(rows):
        if name not in row.figures:
            continue
        figure = row.figures[name]
        bar = axes.barh(i, figure.value, color=_colour(row.labels["training"]), height=0.72)
        axes.bar_label(bar, labels=[format_value(figure)], padding=3, fontsize="small")
        published = row.figures.get(f"{name}, {PUBLISHED}")
        if published is not None:
            axes.plot(published.value, i, "kd", markersize=5)
    axes.set_title(_axis_title(rows, name), fontsize="small")
    axes.margins(x=0.16)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Axes, rows: Sequence[Row], name: str, sweep: str) -> None:
    def along(row: Row) -> float:
        value = row.labels[sweep]
        if isinstance(value, str):
            height, _, width = value.partition("x")
            return float(height) * float(width)
        return float(value)

    several = len({row.labels["model"] for row in rows}) > 1
    for model, training in dict.fromkeys((row.labels["model"], row.labels["training"]) for row in rows):
        chosen = [row for row in rows if (row.labels["model"], row.labels["training"]) == (model, training)]
        points = sorted((along(row), row.figures[name].value) for row in chosen if name in row.figures)
        if points:
            label = f"{model}, {training}" if several else training
            axes.plot(*zip(*points, strict=True), marker="o", color=_colour(training), label=label)
    axes.set(xlabel=_SWEEPS[sweep], ylabel=_axis_title(rows, name), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _axis_title(rows: Sequence[Row], name: str) -> str:
    figure = next(row.figures[name] for row in rows if name in row.figures)
    return f"{name} ({figure.unit}, {figure.method})"


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The labels by which a row differs from others."""
    differing = [name for name in ("model", "depth") if len({r.labels.get(name) for r in rows}) > 1]
    words = [f"depth {row.labels[name]}" if name == "depth" else row.labels[name] for name in differing]
    return ": ".join(filter(None, (", ".join(words), row.labels["training"])))


def _colour(training: Any) -> str:
    return _COLOURS.get(str(training), _OTHER_COLOUR)


def _canvas(width: float, height: float) -> Canvas:
    """A figure (inches) outside pyplot's global state, which other code may be using."""
    canvas = Canvas((width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _save(canvas: Canvas, path: str) -> None:
    save: Callable[[str], Any] = lambda part: canvas.savefig(part, dpi=110)  # noqa: E731
    write_whole(path, save)
