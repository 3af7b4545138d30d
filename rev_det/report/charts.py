"""Curves as SVG whose colours are the page's, so that they are legible on a light and a dark background."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, ScalarFormatter

from .run import Run, split_metric

# Colours that stand for variables of the page's style sheet.
_SERIES = tuple(f"#0000{i:02x}" for i in range(1, 9))
_TEXT, _GRID = "#000100", "#000200"
_VARIABLES = {
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)},
    _TEXT: "currentColor",
    _GRID: "var(--line)",
}
# Lines are told apart by these too.
_DASHES = ("-", "--", "-.", ":")
_TASKS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
# With fewer points each is marked.
_MARKED_UP_TO = 30
# Inches; an inch is 72 units of the picture.
_SIZE = (6.4, 3.6)


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        label: what it shows.
        points: iteration and value, by rising iteration.
    """

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A picture with its description in words.

    Attributes:
        title: what it shows.
        svg: an ``svg`` element for a page of HTML.
        text: first and last values, for who cannot see it.
    """

    title: str
    svg: Markup
    text: str


def draw_charts(run: Run) -> list[Chart]:
    """Losses, AP, learning rate, throughput, memory, inversion error: those that are recorded.

    Args:
        run: with any number of records.
    """
    names = run.names()

    def series(labels: dict[str, str]) -> list[Series]:
        return [Series(label, run.values(name)) for name, label in labels.items() if name in names]

    losses = {name: name.replace("_", " ") for name in names if name.startswith("loss")}
    memory = [
        Series("resident", [(i, mib / 2**10) for i, mib in run.values("[metric]max_rss_mib")]),
    ]
    inversion = {name: name.partition("/")[2] for name in names if name.startswith("inversion_error/")}
    charts = (
        ("total loss", series({"total_loss": "total loss"}), {}),
        ("losses", series(losses), {}),
        ("COCO AP", [Series(label, run.values(name)) for name, label in _ap_names(names).items()], {}),
        ("learning rate", series({"lr": "learning rate"}), {}),
        ("images per second", series({"[metric]images_per_s": "images/s"}), {}),
        ("peak memory, GiB", memory, {}),
        ("relative error of rebuilt inputs", series(inversion), {"log": True}),
    )
    drawn = []
    for title, lines, options in charts:
        lines = [line for line in lines if line.points]
        if lines:
            drawn.append(_draw(title, lines, f"chart{len(drawn)}", **options))
    return drawn


def _ap_names(names: Sequence[str]) -> dict[str, str]:
    """The AP over all classes, of each task and data set."""
    found = {}
    for name in names:
        parts = split_metric(name)
        if parts and parts[2] == "AP":
            dataset, task, _ = parts
            found[name] = f"{dataset}: {_TASKS[task]}" if dataset else _TASKS[task]
    return found


def _draw(title: str, lines: Sequence[Series], prefix: str, log: bool = False) -> Chart:
    settings = {
        "svg.fonttype": "none",  # text remains text
        "svg.hashsalt": prefix,  # the same run, the same page
        "font.family": "sans-serif",
        "font.size": 12,
        "text.color": _TEXT,
        **{f"axes.{key}": _TEXT for key in ("labelcolor", "titlecolor")},
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "axes.edgecolor": _GRID,
        "grid.color": _GRID,
        "text.parse_math": False,  # names of data sets may have a $
    }
    with matplotlib.rc_context(settings):
        figure = Figure(_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for i, line in enumerate(lines):
            axes.plot(
                *zip(*line.points, strict=True),
                label=line.label,
                color=_SERIES[i % len(_SERIES)],
                linestyle=_DASHES[i // 2 % len(_DASHES)],
                marker="o" if len(line.points) <= _MARKED_UP_TO else None,
                markersize=4,
                linewidth=1.8,
                clip_on=False,  # or a line at 0 is half hidden
            )
        axes.set_xlabel("iteration")
        axes.set_xlim(0, 1.01 * max(line.points[-1][0] for line in lines) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if log and all(value > 0 for line in lines for _, value in line.points):
            axes.set_yscale("log")
            # matplotlib's own are formulas, which stay formulas where text remains text.
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
            values = [value for line in lines for _, value in line.points]
            # Within a decade or two there are hardly any powers of ten; at all digits labels would overlap.
            few = max(values) < 100 * min(values)
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if few else ""))
        else:
            # A little above the largest: lines and marks have a width.
            axes.set_ylim(0, 1.06 * max(value for line in lines for _, value in line.points) or 1)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(_plain_formatter())
        axes.grid(linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=11)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    text = "; ".join(map(_in_words, lines))
    return Chart(title, _inline(file.getvalue(), prefix, f"{title}: {text}"), text)


def _plain_formatter() -> ScalarFormatter:
    formatter = ScalarFormatter(useOffset=False, useMathText=False)
    formatter.set_powerlimits((-4, 6))
    return formatter


def _in_words(line: Series) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.label} {start:.4g} at iteration {first:g}"
    return f"{line.label} from {start:.4g} at iteration {first:g} to {end:.4g} at {last:g}"


def _inline(svg: str, prefix: str, description: str) -> Markup:
    """The element alone, without addresses, with the page's colours and with ids that no other chart has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    start = rf'<svg \1 role="img" {_label(description)}>'
    svg = re.sub(r"""<svg\b[^>]*?(viewBox="[^"]+")[^>]*>""", start, svg)
    svg = re.sub(r'\bid="', rf'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg.strip())


def _label(description: str) -> str:
    # A backslash would be read as a group of the pattern.
    return f'aria-label="{escape(description)}"'.replace("\\", r"\\")
