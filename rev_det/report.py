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
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from tabulate import tabulate

from . import __version__
from .config_files import default_config, flat, load_yaml
from .engine.metrics import read_metrics
from .engine.pictures import draw_curves
from .files import check_output, read_json, write_text

_CONFIG = "config.yaml"
_Content = TypeVar("_Content")


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
    check_output(path, (".html", ".htm"), "--output")
    # Names of files and text in JSON may hold what is not Unicode.
    write_text(str(path), _render(folder).encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def _render(folder: Path) -> str:
    """The page of a run, as HTML."""
    files = _Files(folder)
    config = files.read(_CONFIG, _read_config) or {}
    records, lost = files.read("metrics.json", _read_records) or ([], 0)
    iterations, summary = files.read("summary.json", _read_summary) or (None, "")
    results = [path.relative_to(folder) for path in folder.glob("inference/*/results.json")]
    results += [path.relative_to(folder) for path in folder.glob("TTA/inference/*/results.json")]
    evaluations = [files.read(name, _read_evaluation) or "" for name in sorted(results)]
    log = files.read("log.txt", _read_log)
    predictions = files.read("predictions.png", _embed)

    planned = config.get("SOLVER.MAX_ITER", iterations)
    # Iterations are numbered from 0; an evaluation after the last one is recorded under the number behind it.
    done = records[-1]["iteration"] + 1 if records else 0
    if isinstance(planned, int):
        done = min(done, planned)
    # A folder can hold the summary of an earlier run, which another one has begun to replace.
    if iterations != planned or (records and done != planned):
        summary = ""
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
    curves = last = ""
    if records:
        curves = files.read("metrics.json", lambda _: _draw(records))
        last = files.read("metrics.json", lambda _: _last_values(records))
    config_text = files.read(_CONFIG, _read_text)
    template = (resources.files(__package__) / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        version=__version__,
        name=folder.resolve().name,
        folder=folder,
        state="complete" if summary else "not complete",
        notices=[*notices, *files.damaged],
        # Title, content, and whether it is unfolded.
        sections=[
            ("Average precision, from 0 to 100", Markup().join(evaluations), True),
            ("Curves", curves, True),
            ("Predictions beside the ground truth", predictions, True),
            ("Summary", summary, True),
            ("Last values of all metrics", last, False),
            ("Config keys that are not at their defaults", _changed_keys(config), True),
            ("Whole config", Markup("<pre>{}</pre>").format(config_text), False),
            ("Command line and environment", log, False),
        ],
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


def _read_summary(path: Path) -> tuple[Any, Markup]:
    """How many iterations the run had, and a table of all but the metrics, which other tables have."""
    content = dict(flat(read_json(path)))
    rows = [
        {"name": key.replace("_", " "), "value": value}
        for key, value in content.items()
        if not key.startswith(("metrics.", "last_losses."))
    ]
    return content["iterations"], _table(rows)


def _read_evaluation(path: Path) -> Markup:
    """Tables with the metrics of each task and the AP of each class, of a ``results.json``."""
    content = read_json(path)
    name = str(content.get("dataset", path.parent.name))
    name += ", test-time augmentation" if "TTA" in path.parts[-4:-3] else ""
    tables = [
        _table([{title: row, **values} for row, values in (content.get(key) or {}).items()])
        for key, title in (("metrics", "task"), ("per_class", "class"))
    ]
    return Markup("<h3>{}</h3>{}{}").format(name, *tables)


def _read_log(path: Path) -> Markup:
    """Of the last start in a log: the arguments, and the environment as Detectron2 describes it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", _read_text(path))  # without colours
    arguments = re.findall(r"Command line arguments: (.*)", text)
    environments = re.findall(r"Environment info:\n(.+?)\n(?=\n|\[|\Z)", text, re.DOTALL)
    return Markup("<pre>{}</pre>").format("\n\n".join([*arguments[-1:], *environments[-1:]]))


def _embed(path: Path) -> Markup:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
        kind, (width, height) = image.get_format_mimetype(), image.size
    address = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(
        address, width, height, f"The picture {path.name} of this run"
    )


def _draw(records: Sequence[Mapping[str, float]]) -> Markup:
    """The curves as in ``curves.png``, which a run writes only at its end."""
    with tempfile.TemporaryDirectory() as scratch:
        metrics, picture = Path(scratch, "metrics.json"), Path(scratch, "curves.png")
        metrics.write_text("\n".join(map(json.dumps, records)))
        draw_curves(str(metrics), str(picture))
        return _embed(picture)


def _last_values(records: Sequence[Mapping[str, float]]) -> Markup:
    last = {name: (value, record["iteration"]) for record in records for name, value in record.items()}
    rows = [{"metric": name, "value": value, "iteration": i} for name, (value, i) in sorted(last.items())]
    return _table([row for row in rows if row["metric"] != "iteration"])


def _changed_keys(config: Mapping[str, Any]) -> Markup:
    known = dict(flat(default_config()))
    return _table(
        [
            {"key": key, "value": repr(value), "default": repr(known[key]) if key in known else "none"}
            for key, value in config.items()
            if key not in known or value != known[key]
        ]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Rows by the titles of their columns; text is escaped, and what cannot be computed is a dash."""
    # Of the first column nothing is taken for a number.
    style = {"floatfmt": ".4g", "missingval": "–", "disable_numparse": [0]}
    return Markup(tabulate(rows, headers="keys", tablefmt="html", **style)) if rows else Markup()
