"""The training report: what a run has left in its folder, as one HTML page without network or JavaScript."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, StrictUndefined
from PIL import Image

from . import __version__
from .config_files import default_config, flat, load_yaml
from .engine.metrics import read_metrics
from .engine.pictures import draw_curves
from .files import check_output, read_json, write_text

_SUFFIXES = (".html", ".htm")
_CONFIG = "config.yaml"
_TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}

_Content = TypeVar("_Content")
_Row = tuple[str, Sequence[str]]


class _Table(NamedTuple):
    """Rows of cells, each with its name in front."""

    caption: str
    head: Sequence[str]
    rows: Sequence[_Row]


class _Picture(NamedTuple):
    """An embedded picture: its address, which is its content, and its size in pixels."""

    address: str
    width: int
    height: int


def write_report(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Write the report of a training run that is complete, under way or killed.

    What is missing or damaged in the folder is named on the page.

    Args:
        folder: the ``OUTPUT_DIR`` of the run.
        path: of the page; None for ``report.html`` in the folder. It is written completely, or not at all.

    Returns:
        the path.

    Raises:
        FileNotFoundError: the folder is not that of a run, or the page's does not exist.
        ValueError: the page's name does not end with ``.html``.
        OSError: the page cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the OUTPUT_DIR of a training run")
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a training run: it has no {_CONFIG}, which a run writes first"
        )
    path = folder / "report.html" if path is None else Path(path)
    check_output(path, _SUFFIXES, "--output")
    # Names of files and text in JSON may hold what is not Unicode.
    write_text(str(path), _render(folder).encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def _render(folder: Path) -> str:
    """The page of a run, as HTML."""
    files = _Files(folder)
    config = files.read(_CONFIG, _read_config) or {}
    records, lost = files.read("metrics.json", _read_records) or ([], 0)
    iterations, summary = files.read("summary.json", _read_summary) or (None, [])
    results = [path.relative_to(folder) for path in folder.glob("inference/*/results.json")]
    results += [path.relative_to(folder) for path in folder.glob("TTA/inference/*/results.json")]
    evaluations = [files.read(name, _read_evaluation) or [] for name in sorted(results)]
    log = files.read("log.txt", _read_log)
    predictions = files.read("predictions.png", _embed)

    planned = config.get("SOLVER.MAX_ITER", iterations)
    # Iterations are numbered from 0; an evaluation after the last one is recorded under the number behind it.
    done = records[-1]["iteration"] + 1 if records else 0
    if isinstance(planned, int):
        done = min(done, planned)
    # A folder can hold the summary of an earlier run, which another one has begun to replace.
    if iterations != planned or (records and done != planned):
        summary = []
    notices = []
    if (folder / "non_finite.json").exists():
        notices.append(
            "A step was not finite: non_finite.json has its losses and images. The same command with "
            "--resume repeats it from model_last_good.pth, the state before it."
        )
    if not summary:
        notices.append(
            f"Training is not complete: {done} of {planned} iterations are recorded. If it is not still "
            "running, the same command with --resume continues it from the last checkpoint."
        )
    if not results:
        notices.append(f"There is no evaluation yet: TEST.EVAL_PERIOD is {config.get('TEST.EVAL_PERIOD')}.")
    for name in ("metrics.json", "log.txt", "predictions.png"):
        if not os.path.lexists(folder / name):
            notices.append(f"There is no {name} yet.")
    if lost:
        notices.append(f"Lines of metrics.json that are damaged or incomplete, and left out: {lost}.")
    template = (resources.files(__package__) / "report.html").read_text(encoding="utf-8")
    layout = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **layout)
    return environment.from_string(template).render(
        version=__version__,
        name=folder.resolve().name,
        folder=folder,
        complete=bool(summary),
        tables=[table for tables in evaluations for table in tables],
        curves=files.read("metrics.json", lambda _: _draw(records)) if records else None,
        predictions=predictions,
        summary=summary,
        last=_last_values(records),
        changed=_changed_keys(config),
        config_text=files.read(_CONFIG, _read_text),
        log=log,
        # Comes last: by now all files have been read.
        notices=[*notices, *files.damaged],
    )


class _Files:
    """Reads the files of a run.

    Attributes:
        damaged: what was wrong with those that could not be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.damaged: list[str] = []

    def read(self, name: str | Path, reader: Callable[[Path], _Content]) -> _Content | None:
        """What a reader makes of a file; None if it does not exist or is damaged."""
        path = self._folder / name
        if not os.path.lexists(path):
            return None
        try:
            if not path.is_file():  # reading a named pipe would wait forever
                raise ValueError("it is not a file")
            return reader(path)
        except Exception as error:  # files may hold anything, and Pillow raises errors of many kinds
            expected = isinstance(error, (OSError, ValueError))
            reason = str(error) if expected else "it is not what a training run writes"
            self.damaged.append(f"{name} cannot be used: {reason}")
            return None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_config(path: Path) -> dict[str, Any]:
    """The values by their key with dots; those that are not given are at their defaults."""
    given = load_yaml(_read_text(path), path.name)
    if not isinstance(given, dict):
        raise ValueError("it holds no keys")
    return dict(flat(default_config())) | dict(flat(given))


def _read_records(path: Path) -> tuple[list[dict[str, float]], int]:
    """The records, and how many lines are none."""
    return read_metrics(str(path)), sum(not _is_record(line) for line in _read_text(path).splitlines())


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "iteration" in record


def _read_summary(path: Path) -> tuple[Any, list[_Row]]:
    """How many iterations the run had, and all but the metrics, which other tables have, in words."""
    content = dict(flat(read_json(path)))
    shown = {key: value for key, value in content.items() if not key.startswith(("metrics.", "last_losses."))}
    rows = [(key.replace("_", " ").replace(".", ": "), [_shown(value)]) for key, value in shown.items()]
    return content["iterations"], rows


def _read_evaluation(path: Path) -> list[_Table]:
    """The metrics of each task, and the AP of each class, of a ``results.json``."""
    content = read_json(path)
    name = str(content.get("dataset", path.parent.name))
    name += ", test-time augmentation" if "TTA" in path.parts[-4:-3] else ""
    tables = {"metrics": (f"Metrics on {name}", "task"), "per_class": (f"AP on {name}", "class")}
    return [_table(*titles, content[key]) for key, titles in tables.items() if content.get(key)]


def _table(caption: str, first: str, rows: Mapping[str, Mapping[str, Any]]) -> _Table:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return _Table(
        caption,
        [first, *(_TASKS.get(name, name) for name in names)],
        [(_TASKS.get(key, key), [_shown(row.get(name)) for name in names]) for key, row in rows.items()],
    )


def _read_log(path: Path) -> str:
    """Of the last start in a log: the arguments, and the environment as Detectron2 describes it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", _read_text(path))  # without colours
    arguments = re.findall(r"Command line arguments: (.*)", text)
    environments = re.findall(r"Environment info:\n(.+?)\n(?=\n|\[|\Z)", text, re.DOTALL)
    return "\n".join([*arguments[-1:], *environments[-1:]])


def _embed(path: Path) -> _Picture:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
        kind, (width, height) = image.get_format_mimetype(), image.size
    return _Picture(f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}", width, height)


def _draw(records: Sequence[Mapping[str, float]]) -> _Picture:
    """The curves as in ``curves.png``, which a run writes only at its end."""
    with tempfile.TemporaryDirectory() as scratch:
        metrics, picture = Path(scratch, "metrics.json"), Path(scratch, "curves.png")
        metrics.write_text("\n".join(map(json.dumps, records)))
        draw_curves(str(metrics), str(picture))
        return _embed(picture)


def _last_values(records: Sequence[Mapping[str, float]]) -> list[_Row]:
    """Of each metric the last value and its iteration."""
    last = {name: (value, record["iteration"]) for record in records for name, value in record.items()}
    last.pop("iteration", None)
    return [(name, [_shown(value), str(iteration)]) for name, (value, iteration) in sorted(last.items())]


def _changed_keys(config: Mapping[str, Any]) -> list[_Row]:
    """Value and default of each key where these two differ."""
    known = dict(flat(default_config()))
    return [
        (key, [repr(value), repr(known[key]) if key in known else "none"])
        for key, value in config.items()
        if key not in known or value != known[key]
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
