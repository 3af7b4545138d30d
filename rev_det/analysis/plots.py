"""Pictures of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ..files import write_whole
from .peers import DETECTRON2
from .report import PUBLISHED, Report, Row, common_labels, format_value, label_text

SUFFIXES = (".png", ".pdf", ".svg")
# Told apart by colour-blind readers too (Okabe and Ito), and by their markers; ours is the strong blue.
_STYLES = {
    "cached": ("#8c8c8c", "s"),
    "checkpoint": ("#e69f00", "^"),
    "checkpoint, attention kept": ("#d55e00", "v"),
    "reversible as published": ("#56b4e9", "o"),
    "reversible": ("#0072b2", "o"),
    "reversible, attention kept": ("#0072b2", "o"),
    DETECTRON2.name: ("#333333", "D"),
}
_OTHER_STYLE = ("#009e73", "P")
# Figures worth a panel of their own, in this order, if a report has them.
_PANELS = (
    *("peak memory", "FLOPs", "estimated time", "time", "throughput"),
    *("memory per image", "largest batch"),
)
# What rows can differ by along an axis, and its name.
_SWEEPS = {"depth": "depth (blocks)", "images": "images in a step", "size": "image size (pixels)"}
# An axis on which the largest figure is so many times the smallest is logarithmic.
_LOGARITHMIC_FROM = 30


def save_plot(report: Report, path: str) -> None:
    """Draw lines along what the rows sweep (depth, images or size), or bars if they sweep nothing.

    Args:
        report: with figures.
        path: of a file with one of `SUFFIXES`.

    Raises:
        ValueError: there is nothing to draw.
        FileNotFoundError: the folder does not exist.
    """
    rows = [row for row in report.rows if row.figures]
    panels = [name for name in _PANELS if any(name in row.figures for row in rows)]
    if not panels:
        raise ValueError("--plot: there are no figures to draw")
    sweep = next((name for name in _SWEEPS if _is_swept(rows, name)), None)
    canvas = _swept(rows, panels, sweep) if sweep else _compared(rows, panels)
    canvas.suptitle(_title(report.title, rows), fontsize="large")
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
    canvas = _canvas(8.5, 5.5)
    axes = canvas.subplots()
    for training in _trainings(rows):
        points = [row for row in rows if row.labels["training"] == training]
        values = [(row.figures[x].value, row.figures[y].value) for row in points]
        colour, marker = _style(training)
        axes.scatter(*zip(*values, strict=True), color=colour, marker=marker, label=training, s=45, zorder=3)
    published = [(row.figures[x].value, row.figures.get(f"{y}, {PUBLISHED}")) for row in rows]
    published = [(value, figure.value) for value, figure in published if figure is not None]
    if published:
        axes.scatter(
            *zip(*published, strict=True), color="black", marker="_", s=120, label="the paper's figure"
        )
    # A model's name stands once above all ways of training it, unless they are far apart.
    highest: dict[tuple[str, str], tuple[float, float]] = {}
    for row in map(_of_family, rows):
        point = (row.figures[x].value, row.figures[y].value)
        key = (row.labels["model"], f"{point[0]:.1e}")
        highest[key] = max(point, highest.get(key, point), key=lambda p: p[1])
    for (model, _), point in highest.items():
        axes.annotate(model, point, textcoords="offset points", xytext=(0, 8), ha="center", fontsize="small")
    axes.set(xlabel=_axis_title(rows, x), ylabel=_axis_title(rows, y), xscale="log", yscale="log")
    _plain_ticks(axes, "x")
    _plain_ticks(axes, "y")
    axes.grid(alpha=0.25)
    axes.margins(x=0.1, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=len(_trainings(rows)) + 1, frameon=False)
    canvas.suptitle(report.title, fontsize="large")
    _save(canvas, path)


def save_fits(title: str, rows: Sequence[Row], path: str) -> None:
    """Draw how many images fit on each card, a bar for every way of training.

    Args:
        rows: of `rev_det.analysis.fits.images_that_fit`; figures in images have cards as names.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    cards = [name for name, figure in rows[0].figures.items() if figure.unit == "images"]
    canvas = _canvas(1.6 * len(cards) + 1, 4.4)
    axes = canvas.subplots()
    width = 0.84 / len(rows)
    for i, row in enumerate(rows):
        places = [place + (i - (len(rows) - 1) / 2) * width for place in range(len(cards))]
        values = [row.figures[card].value for card in cards]
        training = row.labels["training"]
        bars = axes.bar(places, values, width * 0.94, color=_style(training)[0], label=training)
        axes.bar_label(bars, fontsize="small", padding=2)
    axes.set_xticks(range(len(cards)), cards)
    axes.set(xlabel="memory of the GPU", ylabel=f"images in a step ({rows[0].figures[cards[0]].method})")
    axes.margins(y=0.1)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=len(rows), frameon=False)
    canvas.suptitle(_title(title, rows), fontsize="large")
    _save(canvas, path)


def _is_swept(rows: Sequence[Row], name: str) -> bool:
    """Whether some model, trained in some way, appears at several values of a label and with nothing else."""
    others = [n for n in ("model", "training", *_SWEEPS) if n != name]
    groups: dict[tuple, set] = {}
    for row in rows:
        groups.setdefault(tuple(row.labels.get(n) for n in others), set()).add(row.labels.get(name))
    return max((len(values) for values in groups.values()), default=0) > 2


def _compared(rows: Sequence[Row], panels: Sequence[str]) -> Canvas:
    """Bars, one panel for each figure, in groups that differ by nothing but the way of training."""
    same = common_labels([_of_family(row) for row in rows]) | {"training": None}

    def differing(row: Row) -> dict[str, str | int]:
        return {name: value for name, value in row.labels.items() if name not in same}

    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(differing(_of_family(row)).values()), []).append(row)
    names, places, headings = [], [], []
    for group in groups.values():
        if len(groups) > 1:
            headings.append(len(names))
            names.append(", ".join(label_text(*label) for label in differing(group[0]).items()))
        for row in group:
            places.append((len(names), row))
            names.append(_bar_name(row))
        names.append("")
    names.pop()
    canvas = _canvas(3.4 + 3.4 * len(panels), 1.3 + 0.27 * len(names))
    grid = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, name in zip(grid, panels, strict=True):
        _bars(axes, places, name)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    for i, label in enumerate(grid[0].get_yticklabels()):
        label.set_fontweight("bold" if i in headings else "normal")
    if any(f"{name}, {PUBLISHED}" in row.figures for row in rows for name in panels):
        mark = Line2D([], [], color="black", marker="d", linestyle="", label="the paper's figure")
        canvas.legend(handles=[mark], loc="outside lower right", frameon=False)
    return canvas


def _bars(axes: Axes, places: Sequence[tuple[int, Row]], name: str) -> None:
    for place, row in places:
        if name not in row.figures:
            continue
        figure, (colour, _) = row.figures[name], _style(row.labels["training"])
        bar = axes.barh(place, figure.value, color=colour, height=0.76)
        axes.bar_label(bar, labels=[format_value(figure)], padding=3, fontsize="small")
        if name == "time":  # with its quartiles
            edges = [row.figures[quartile].value for quartile in ("lower quartile", "upper quartile")]
            axes.plot(edges, [place, place], color="black", linewidth=1.5)
        published = row.figures.get(f"{name}, {PUBLISHED}")
        if published is not None:
            axes.plot(published.value, place, "kd", markersize=5)
    axes.set_title(_axis_title([row for _, row in places], name), fontsize="medium")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.16)
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _swept(rows: Sequence[Row], panels: Sequence[str], sweep: str) -> Canvas:
    """Lines along a label, one panel for each figure, with one legend."""
    canvas = _canvas(1 + 4.6 * len(panels), 4.8)
    grid = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axes, name in zip(grid, panels, strict=True):
        _lines(axes, rows, name, sweep)
    handles, labels = grid[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return canvas


def _lines(axes: Axes, rows: Sequence[Row], name: str, sweep: str) -> None:
    same = common_labels(rows)
    others = [n for n in ("model", *_SWEEPS) if n in rows[0].labels and n not in (sweep, *same)]
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        if name in row.figures:
            lines.setdefault(tuple(row.labels.get(n) for n in (*others, "training")), []).append(row)
    for (*others_of_line, training), chosen in lines.items():
        points = sorted((_along(row, sweep), row.figures[name].value) for row in chosen)
        colour, marker = _style(training)
        texts = [label_text(n, value) for n, value in zip(others, others_of_line, strict=True)]
        label = ", ".join((*texts, training))
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, linewidth=1.8)
    ticks = {_along(row, sweep): row.labels[sweep] for row in rows}
    if len(ticks) <= 8:
        axes.set_xticks(list(ticks), [str(tick) for tick in ticks.values()])
    axes.set(xlabel=_SWEEPS[sweep], ylabel=_axis_title(rows, name))
    values = [row.figures[name].value for row in rows if name in row.figures]
    if min(values) > 0 and max(values) > _LOGARITHMIC_FROM * min(values):
        axes.set_yscale("log")
        _plain_ticks(axes, "y")
    else:
        axes.set_ylim(0, None)
        axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _along(row: Row, sweep: str) -> float:
    value = row.labels[sweep]
    if isinstance(value, str):
        height, _, width = value.partition("x")
        return float(height) * float(width)
    return float(value)


def _of_family(row: Row) -> Row:
    """The row under the name that Detectron2's model and the reversible one of its sizes have in common."""
    return replace(row, labels=row.labels | {"model": str(row.labels["model"]).removeprefix("Rev-")})


def _bar_name(row: Row) -> str:
    training = str(row.labels["training"])
    return f"{training} {row.labels['model']}" if training == DETECTRON2.name else training


def _title(title: str, rows: Sequence[Row]) -> str:
    """With a second line for what all rows have in common."""
    ours = [row for row in rows if row.labels["training"] != DETECTRON2.name] or rows
    texts = [label_text(name, value) for name, value in common_labels(ours).items() if name != "training"]
    return "\n".join(filter(None, (title, ", ".join(text for text in texts if text not in title))))


def _axis_title(rows: Sequence[Row], name: str) -> str:
    figure = next(row.figures[name] for row in rows if name in row.figures)
    return f"{name} ({figure.unit}, {figure.method})"


def _trainings(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.labels["training"]) for row in rows))


def _style(training: Any) -> tuple[str, str]:
    """Colour and marker."""
    return _STYLES.get(str(training), _OTHER_STYLE)


def _plain_ticks(axes: Axes, which: str) -> None:
    """Numbers as they are instead of powers of ten on a logarithmic axis."""
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _canvas(width: float, height: float) -> Canvas:
    """A figure (inches) outside pyplot's global state, which other code may be using."""
    canvas = Canvas((width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _save(canvas: Canvas, path: str) -> None:
    write_whole(path, lambda part: canvas.savefig(part, dpi=130))
