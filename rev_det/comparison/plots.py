"""Pictures of rows of figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..files import write_whole
from ..memory.table import PUBLISHED, Row, common_labels, label_text
from .models import (
    CACHED,
    CHECKPOINT,
    CHECKPOINT_KEPT,
    DETECTRON2,
    PAPER,
    REVERSIBLE,
    REVERSIBLE_KEPT,
)

SUFFIXES = (".png", ".pdf", ".svg")
# Told apart by colour-blind readers too (Okabe and Ito), and by their markers; ours is the strong blue.
_STYLES = {
    CACHED: ("#8c8c8c", "s"),
    CHECKPOINT: ("#e69f00", "^"),
    CHECKPOINT_KEPT: ("#d55e00", "v"),
    PAPER: ("#56b4e9", "o"),
    REVERSIBLE: ("#0072b2", "o"),
    REVERSIBLE_KEPT: ("#0072b2", "o"),
    DETECTRON2: ("#333333", "D"),
}
_OTHER_STYLE = ("#009e73", "P")
# Figures worth a panel of their own, in this order, if there are any.
_PANELS = (
    *("peak memory", "FLOPs", "estimated time", "time", "throughput"),
    *("memory per image", "largest batch", "images that fit"),
)
# Labels that rows can differ by along an axis, and its name.
_SWEEPS = {
    "depth": "depth (blocks)",
    "images": "images in a step",
    "size": "image size (pixels)",
    "GB": "memory of the GPU (GB)",
}
# An axis on which the largest figure is so many times the smallest is logarithmic.
_LOGARITHMIC_FROM = 30


def save_plot(title: str, rows: Sequence[Row], path: str, against: str | None = None) -> None:
    """Draw lines along what the rows sweep (depth, images, size or GB), or bars if they sweep nothing.

    Args:
        title: of the picture.
        rows: with figures.
        path: of a file with one of `SUFFIXES`.
        against: a figure to draw the others along, instead.

    Raises:
        ValueError: there is nothing to draw.
        UnwritableError: the file cannot be written.
    """
    rows = [row for row in rows if row.figures and (against is None or against in row.figures)]
    panels = [name for name in _PANELS if any(name in row.figures for row in rows)]
    if not panels:
        raise ValueError("--plot: there are no figures to draw")
    along = against or next((name for name in _SWEEPS if _is_swept(rows, name)), None)
    height = 4.8 if along else 1.6 + 0.3 * len(rows)
    # Outside pyplot's global state, which other code may be using.
    canvas = Canvas((max(8, 4.6 * len(panels) + 3), height), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(1, len(panels), squeeze=False, sharey=not along)[0]
    for axes, name in zip(grid, panels, strict=True):
        _lines(axes, rows, name, along) if along else _bars(axes, rows, name)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if along:
        lines, labels = grid[0].get_legend_handles_labels()
        canvas.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    common = [label_text(*label) for label in common_labels(rows).items()]
    canvas.suptitle("\n".join(filter(None, (title, ", ".join(x for x in common if x not in title)))))
    write_whole(path, lambda part: canvas.savefig(part, dpi=130))


def _is_swept(rows: Sequence[Row], name: str) -> bool:
    """Whether some model, trained in some way, appears at several values of a label and with nothing else."""
    groups: dict[str, set] = {}
    for row in rows:
        others = {n: value for n, value in row.labels.items() if n != name}
        groups.setdefault(str(others), set()).add(row.labels.get(name))
    return max((len(values) for values in groups.values()), default=0) > 2


def _bars(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """One for each row, with the paper's figure as a mark, and the quartiles of a time."""
    same = common_labels(rows)
    for place, row in enumerate(rows):
        if name not in row.figures:
            continue
        figure = row.figures[name]
        bar = axes.barh(place, figure.value, color=_style(row)[0], height=0.76)
        axes.bar_label(bar, labels=[str(figure)], padding=3, fontsize="small")
        if name == "time":
            edges = [row.figures[quartile].value for quartile in ("lower quartile", "upper quartile")]
            axes.plot(edges, [place, place], color="black", linewidth=1.5)
        if f"{name}, {PUBLISHED}" in row.figures:
            axes.plot(row.figures[f"{name}, {PUBLISHED}"].value, place, "kd", markersize=5)
    names = [[label_text(n, v) for n, v in row.labels.items() if n not in same] for row in rows]
    axes.set_yticks(range(len(rows)), [", ".join(words) for words in names])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(_with_unit(rows, name), fontsize="medium")
    axes.margins(x=0.16)
    axes.grid(alpha=0.25, axis="x")


def _lines(axes: Axes, rows: Sequence[Row], name: str, along: str) -> None:
    """One for each way of training and whatever else rows differ by, along a label or a figure."""
    is_label = along in _SWEEPS
    same = {**common_labels(rows), along: None}
    if not is_label:  # the models, which the points are named after
        same |= {"model": None, "depth": None}
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if name in row.figures:
            words = [label_text(n, value) for n, value in row.labels.items() if n not in same]
            lines.setdefault(", ".join(words), []).append(row)
    published = f"{name}, {PUBLISHED}"
    for label, chosen in lines.items():
        colour, marker = _style(chosen[0])
        chosen = sorted(chosen, key=lambda row: _position(row, along))
        points = [(_position(row, along), row.figures[name].value) for row in chosen]
        style = {"marker": marker, "color": colour, "linestyle": "-" if is_label else ""}
        axes.plot(*zip(*points, strict=True), label=label, **style)
        marks = [
            (x, row.figures[published].value)
            for (x, _), row in zip(points, chosen, strict=True)
            if published in row.figures
        ]
        if marks:
            axes.plot(*zip(*marks, strict=True), marker="_", color=colour, linestyle="", markersize=12)
        if not is_label:
            for point, row in zip(points, chosen, strict=True):
                axes.annotate(f"  {row.labels['model']}", point, fontsize="x-small", va="center")
    ticks = {_position(row, along): row.labels[along] for row in rows} if is_label else {}
    if 0 < len(ticks) <= 8:
        axes.set_xticks(list(ticks), [str(tick) for tick in ticks.values()])
    axes.set(xlabel=_SWEEPS.get(along) or _with_unit(rows, along), ylabel=_with_unit(rows, name))
    values = [row.figures[name].value for row in rows if name in row.figures]
    if min(values) > 0 and max(values) > _LOGARITHMIC_FROM * min(values):
        axes.set_yscale("log")
        # Numbers as they are instead of powers of ten.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, None)
    axes.grid(alpha=0.25)


def _position(row: Row, along: str) -> float:
    if along not in _SWEEPS:
        return row.figures[along].value
    height, _, width = str(row.labels[along]).partition("x")
    return float(height) * float(width or 1)


def _with_unit(rows: Sequence[Row], name: str) -> str:
    figure = next(row.figures[name] for row in rows if name in row.figures)
    return f"{name} ({figure.unit}, {figure.method})"


def _style(row: Row) -> tuple[Any, str]:
    """Colour and marker."""
    return _STYLES.get(str(row.labels["training"]), _OTHER_STYLE)
