"""What a training run has left in its folder, complete or not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config_files import default_config, load_yaml
from ..engine.metrics import read_metrics
from ..files import read_json
from ..rules import is_finite
from .log import Log

_CONFIG = "config.yaml"
# What the page takes from JSON files: see `_has_form`.
_NUMBER = int | float | None
_SUMMARY = {
    "precision": str,
    "peak_memory_mib_by_process": [int | float],
    "peak_memory_is": str,
    "seconds_since_start_or_resume": _NUMBER,
    "versions": {...: str},
    "datasets": {...: [str]},
    "best": ({"iteration": int, "value": int | float}, type(None)),
}
_RESULTS = {"metrics": {...: {...: _NUMBER}}, "per_class": {...: {...: _NUMBER}}}
# One metric of an evaluation: the data set, if there are several; the task; what was measured.
_METRIC = re.compile(r"(?:(?P<dataset>.+)/)?(?P<task>bbox|segm|keypoints)(?P<tta>_TTA)?/(?P<name>[^/]+)")


@dataclass(frozen=True)
class Evaluation:
    """The last evaluation on a data set.

    Attributes:
        dataset: its name.
        metrics: of each task ("bbox", "segm", …) the metrics by name, from 0 to 100; None for what cannot be
            computed.
        per_class: for each class AP by task and, under "instances", how many there are, if that is known.
        augmented: whether with test-time augmentation.
    """

    dataset: str
    metrics: Mapping[str, Mapping[str, float | None]]
    per_class: Mapping[str, Mapping[str, float | None]]
    augmented: bool = False


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        config: its config, complete.
        config_text: the same, as it was written.
        summary: ``summary.json``, if it is that of this training, which then is complete.
        records: of ``metrics.json``, by rising iteration.
        evaluations: of each data set the last.
        log: what ``log.txt`` says.
        non_finite: ``non_finite.json``, which a step with infinite or NaN losses leaves.
    """

    folder: Path
    config: CfgNode
    config_text: str
    summary: Mapping[str, Any] | None
    records: tuple[Mapping[str, float], ...]
    evaluations: tuple[Evaluation, ...]
    log: Log
    non_finite: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Run:
        """Read a folder; all but the config may be missing.

        Args:
            folder: the ``OUTPUT_DIR`` of a run of ``rev-det train``, under way, killed or complete.

        Raises:
            FileNotFoundError: there is no such folder, or it is not that of a run.
            ValueError: a file of it is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; name the OUTPUT_DIR of a training run")
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(
                f"{folder} is not the folder of a training run: it has no {_CONFIG}, which a run writes first"
            )
        text, config = _read_config(folder / _CONFIG)
        records = tuple(read_metrics(str(folder / "metrics.json")))
        summary = _read_json(folder / "summary.json", _SUMMARY)
        evaluations = tuple(_read_evaluations(folder)) or tuple(_evaluations_of(records))
        run = cls(
            folder=folder,
            config=config,
            config_text=text,
            summary=summary,
            records=records,
            evaluations=evaluations,
            log=Log.read(folder / "log.txt"),
            non_finite=_read_json(folder / "non_finite.json", {}),
        )
        return run if run._summary_is_of_these_records() else replace(run, summary=None)

    @property
    def planned(self) -> int:
        """Iterations from the start to the end of training."""
        return self.config.SOLVER.MAX_ITER

    @property
    def done(self) -> int:
        """Iterations that are recorded."""
        # Numbered from 0; the evaluation after the last is recorded under the number behind it.
        last = self.records[-1]["iteration"] + 1 if self.records else 0
        return min(int(last), self.planned)

    @property
    def complete(self) -> bool:
        return self.summary is not None

    def values(self, name: str) -> list[tuple[float, float]]:
        """Iteration and value wherever a metric is recorded as a finite number."""
        return [(r["iteration"], r[name]) for r in self.records if is_finite(r.get(name))]

    def names(self) -> list[str]:
        """All that is recorded."""
        return sorted({name for record in self.records for name in record})

    def _summary_is_of_these_records(self) -> bool:
        # A folder can hold the summary of an earlier run, which another has begun to replace.
        return self.summary is None or (
            self.summary.get("iterations") == self.planned and (not self.records or self.done >= self.planned)
        )


def split_metric(name: str) -> tuple[str, str, str] | None:
    """Data set (or ""), task and metric of a name such as "bbox/AP50"; None for another name."""
    match = _METRIC.fullmatch(name)
    return (match["dataset"] or "", match["task"], match["name"]) if match and not match["tta"] else None


def _read_evaluations(folder: Path) -> list[Evaluation]:
    found = []
    for parent in (folder, folder / "TTA"):
        for path in sorted(parent.glob("inference/*/results.json")):
            content = _read_json(path, _RESULTS)
            found.append(
                Evaluation(
                    str(content.get("dataset", path.parent.name)),
                    content.get("metrics") or {},
                    content.get("per_class") or {},
                    augmented=parent != folder,
                )
            )
    return found


def _evaluations_of(records: tuple[Mapping[str, float], ...]) -> list[Evaluation]:
    """From the records, for evaluators that write no ``results.json``."""
    datasets: dict[str, tuple[dict, dict]] = {}
    for record in records:
        for key, value in record.items():
            parts = split_metric(key)
            if parts is None:
                continue
            dataset, task, name = parts
            metrics, per_class = datasets.setdefault(dataset, ({}, {}))
            value = value if is_finite(value) else None
            if name.startswith("AP-"):
                per_class.setdefault(name.removeprefix("AP-"), {})[task] = value
            else:
                metrics.setdefault(task, {})[name] = value
    return [Evaluation(name, *tables) for name, tables in datasets.items()]


def _read_config(path: Path) -> tuple[str, CfgNode]:
    """A config's text, and its keys over the defaults; it may have keys of other projects."""
    cfg = default_config()
    cfg.set_new_allowed(True)
    try:
        text = path.read_text(encoding="utf-8")
        config = load_yaml(text, str(path))
        if not isinstance(config, dict) or "SOLVER" not in config:
            raise ValueError("it has no SOLVER")
        cfg.merge_from_other_cfg(CfgNode(_without_none(config)))
    except (ValueError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} is not the config of a training run: {error}") from error
    return text, cfg


def _without_none(node: Any) -> Any:
    """Yacs takes None for any value, of which none is at its default."""
    if not isinstance(node, dict):
        return node
    return {str(key): _without_none(value) for key, value in node.items() if value is not None}


def _read_json(path: Path, form: Any) -> dict[str, Any] | None:
    """An object of the given form (see `_has_form`); None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        if not isinstance(content, dict) or not _has_form(content, form):
            raise ValueError(f"{path} is not what a training run writes")
    except ValueError as error:
        raise ValueError(f"{error}: it is damaged; remove it to make a report without it") from error
    return content


def _has_form(value: Any, form: Any) -> bool:
    """Whether JSON is of a type, or one of several; a list of such; an object whose (known) keys are."""
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            _has_form(item, form.get(key, form.get(..., object))) for key, item in value.items()
        )
    if isinstance(form, tuple):
        return any(_has_form(value, one) for one in form)
    return isinstance(value, form)
