"""The page: what a run has left, in words, tables and pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..config_files import default_config, flat
from ..files import check_output, write_text
from .charts import draw_charts
from .run import Evaluation, Run, split_metric

SUFFIXES = (".html", ".htm")
_TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
_PICTURE = "predictions.png"
# Files that are listed; of those below folders with many there is only a count.
_LISTED = 60
_FILES = {
    "config.yaml": "the config, complete",
    "log.txt": "log, with the environment",
    "metrics.json": "losses, learning rate, AP by iteration",
    "summary.json": "what the run was and what came of it",
    "curves.png": "curves",
    _PICTURE: "predictions beside the ground truth",
    "last_checkpoint": "name of the checkpoint that --resume takes",
    "model_final.pth": "the trained detector",
    "model_best.pth": "the detector of the best evaluation",
    "model_last_good.pth": "state before a step that was not finite",
    "non_finite.json": "losses and images of a step that was not finite",
    "results.json": "metrics, AP of each class",
    "coco_instances_results.json": "detections in COCO's format",
    "instances_predictions.pth": "detections, as Detectron2 keeps them",
}


@dataclass(frozen=True)
class Figure:
    """A headline figure: what it is, its value, and a remark."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Difference:
    """A key of the config that is not at its default."""

    key: str
    value: str
    default: str


@dataclass(frozen=True)
class Picture:
    """An embedded picture: its address, which is its content, and its size in pixels."""

    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Table:
    """Rows of cells, each row with a header cell in front; numbers are to be aligned."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def write_report(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Write the report of a training run: one file, which needs neither network nor JavaScript.

    Args:
        folder: the ``OUTPUT_DIR`` of a run; it may be incomplete, and the report then says what is missing.
        path: of the page; None for ``report.html`` in the folder. It is written completely, or not at all.

    Returns:
        the path.

    Raises:
        FileNotFoundError: the folder is not that of a run, or the page's does not exist.
        ValueError: the page's name does not end with ``.html``, or a file of the run is damaged.
    """
    run = Run.read(folder)
    path = run.folder / "report.html" if path is None else Path(path)
    check_output(path, SUFFIXES, "--output")
    write_text(str(path), render(run))
    return path


def render(run: Run) -> str:
    """The page of a run, as HTML."""
    here = resources.files(__package__)
    layout = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **layout)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    picture = _read_picture(run.folder / _PICTURE)
    return template.render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        version=__version__,
        run=run,
        name=run.folder.resolve().name,
        missing=_missing(run, picture),
        figures=_figures(run),
        charts=draw_charts(run),
        evaluations=[
            (evaluation, _metrics_table(evaluation), _class_table(evaluation))
            for evaluation in run.evaluations
        ],
        memory=_memory(run),
        picture=picture,
        differences=_differences(run.config),
        environment=_environment(run),
        files=_files(run.folder),
    )


def _missing(run: Run, picture: Picture | None) -> Iterator[str]:
    if not run.complete:
        yield (
            f"Training is not complete: {run.done} of {run.planned} iterations are recorded. If it is not "
            "still running, the same command with --resume continues it from the last checkpoint."
        )
    if not run.records:
        yield "No metrics.json with records: nothing is known of losses, speed and memory."
    if not run.evaluations:
        period, tests = run.config.TEST.EVAL_PERIOD, run.config.DATASETS.TEST
        when = f"every {period} iterations" if period else "at the end of training (TEST.EVAL_PERIOD is 0)"
        yield f"No evaluation yet: it comes {when}." if tests else "No evaluation: DATASETS.TEST is empty."
    if picture is None:
        state = "cannot be read" if (run.folder / _PICTURE).exists() else "is not there"
        yield f"No picture of predictions: {_PICTURE}, drawn at each evaluation, {state}."
    if not run.log.environment:
        yield "No environment: log.txt, which describes it, is missing or incomplete."


def _figures(run: Run) -> Iterator[Figure]:
    summary = run.summary or {}
    for evaluation in run.evaluations:
        for task, metrics in evaluation.metrics.items():
            if "AP" in metrics:
                where = f"{evaluation.dataset}{', test-time augmentation' if evaluation.augmented else ''}"
                yield Figure(f"{_task(task)} AP", _ap(metrics["AP"]), where)
    best = _best(run)
    if best:
        yield best
    done = f"{run.done:,} of {run.planned:,}" if not run.complete else f"{run.planned:,}"
    yield Figure("iterations", done, f"{run.config.SOLVER.IMS_PER_BATCH} images each")
    rates = sorted(value for _, value in run.values("[metric]images_per_s"))
    if rates:
        yield Figure("images/s", _rate(rates[len(rates) // 2]), "median")
    peak = _peak(run)
    if peak:
        yield Figure("peak memory", *peak)
    yield Figure("precision", *_precision(run))
    backbone = run.config.MODEL.BACKBONE.NAME
    if "rev_" in backbone:
        name = backbone.removeprefix("build_").removesuffix("_backbone")
        yield Figure("activations", run.config.MODEL.REV.ACTIVATIONS, name)
    seconds = summary.get("seconds_since_start_or_resume")
    if seconds:
        resumed = summary.get("resumed_at_iteration")
        remark = f"since it was resumed at iteration {resumed}" if resumed else "with evaluations"
        yield Figure("time", _duration(seconds), remark)


def _best(run: Run) -> Figure | None:
    """From the summary, else from the records: what the checkpoint of the best evaluation has reached."""
    metric = run.config.TEST.BEST_METRIC
    found = max(run.values(metric), key=lambda point: point[1], default=None)
    best = (run.summary or {}).get("best")
    if best:
        found = (best["iteration"], best["value"])
    if found is None:
        return None
    parts = split_metric(metric)
    name = f"best {_task(parts[1])} {parts[2]}" if parts else f"best {metric}"
    saved = ", model_best.pth" if (run.folder / "model_best.pth").is_file() else ""
    # As with `Run.done`, the evaluation after the last iteration has the number behind it.
    done = min(found[0] + 1, run.planned)
    return Figure(name, _ap(found[1]), f"after iteration {done:g}{saved}")


def _peak(run: Run) -> tuple[str, str] | None:
    if run.summary and run.summary.get("peak_memory_mib_by_process"):
        mib, what = max(run.summary["peak_memory_mib_by_process"]), run.summary.get("peak_memory_is", "")
    elif run.log.peak_memory_mib is not None:
        mib, what = run.log.peak_memory_mib, "allocated on CUDA"
    else:
        mib, what = max((value for _, value in run.values("[metric]max_rss_mib")), default=None), "resident"
    return None if mib is None else (_gib(mib), what)


def _precision(run: Run) -> tuple[str, str]:
    if run.summary and "precision" in run.summary:
        precision, _, device = str(run.summary["precision"]).partition(" on ")
        return precision, f"on {device}"
    amp = run.config.SOLVER.AMP
    return (f"mixed, {amp.DTYPE}" if amp.ENABLED else "float32"), f"on {run.config.MODEL.DEVICE}"


def _memory(run: Run) -> Table | None:
    summary = run.summary or {}
    peaks = summary.get("peak_memory_mib_by_process")
    if not peaks:
        return None
    rows = [(f"process {i}", (_gib(peak),)) for i, peak in enumerate(peaks)]
    return Table(("", f"peak, {summary.get('peak_memory_is', '')}"), rows)


def _metrics_table(evaluation: Evaluation) -> Table:
    names = list(dict.fromkeys(name for metrics in evaluation.metrics.values() for name in metrics))
    rows = [
        (_task(task), [_ap(metrics.get(name)) for name in names])
        for task, metrics in evaluation.metrics.items()
    ]
    return Table(("", *names), rows)


def _class_table(evaluation: Evaluation) -> Table | None:
    if not evaluation.per_class:
        return None
    columns = list(dict.fromkeys(name for values in evaluation.per_class.values() for name in values))
    titles = [column if column == "instances" else f"{_task(column)} AP" for column in columns]
    rows = [
        (name, [str(values.get(c, "–")) if c == "instances" else _ap(values.get(c)) for c in columns])
        for name, values in evaluation.per_class.items()
    ]
    return Table(("class", *titles), rows)


def _differences(config: Mapping[str, Any]) -> list[Difference]:
    known = dict(flat(default_config()))
    return [
        Difference(key, _shown(value), _shown(known[key]) if key in known else "none")
        for key, value in flat(config)
        if key not in known or value != known[key]
    ]


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _environment(run: Run) -> dict[str, str]:
    summary = run.summary or {}
    found = {"rev_det": summary.get("versions", {}).get("rev_det"), "device": summary.get("device")}
    sets = run.config.DATASETS
    data = summary.get("datasets") or {"train": sets.TRAIN, "test": sets.TEST}
    found |= {f"data, {name}": ", ".join(map(str, names)) for name, names in data.items()}
    if summary:
        found["processes"] = str(summary.get("processes", ""))
    return {**{name: value for name, value in found.items() if value}, **run.log.environment}


def _read_picture(path: Path) -> Picture | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            width, height = image.size
            kind = image.get_format_mimetype()
    except Exception:  # a damaged file makes Pillow raise errors of many kinds
        return None
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(f"data:{kind};base64,{content}", width, height)


def _files(folder: Path) -> list[tuple[str, str, str]]:
    """Path, size and meaning of the files; those of an earlier report are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    rows = [
        (path.relative_to(folder).as_posix(), _size(path.stat().st_size), _meaning(path.name))
        for path in paths[:_LISTED]
    ]
    if len(paths) > _LISTED:
        rows.append((f"and {len(paths) - _LISTED} more", "", ""))
    return rows


def _meaning(name: str) -> str:
    if name.startswith("events.out.tfevents"):
        return "the same for tensorboard"
    if name.startswith("model_") and name.endswith(".pth"):
        return _FILES.get(name, "checkpoint")
    return _FILES.get(name, "")


def _task(task: str) -> str:
    return _TASKS.get(task, task)


def _ap(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _gib(mib: float) -> str:
    return f"{mib / 2**10:.2f} GiB"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _size(count: int) -> str:
    exponent = min(max(count.bit_length() - 1, 0) // 10, 3)
    unit = ("B", "KiB", "MiB", "GiB")[exponent]
    return f"{count / 2 ** (10 * exponent):.1f} {unit}" if exponent else f"{count} B"
