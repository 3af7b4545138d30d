"""The file ``metrics.json`` of a training run."""

from __future__ import annotations

import functools
import json
import logging
import os

from detectron2.utils.events import EventWriter, JSONWriter

from ..files import naming
from ..rules import is_whole

logger = logging.getLogger(__name__)


class MetricsWriter(EventWriter):
    """Detectron2's ``JSONWriter``, which touches its file with the first record, and names it in errors.

    Args:
        path: of a ``metrics.json``; a run goes on behind what earlier ones have written.
    """

    def __init__(self, path: str):
        self._path = path

    @functools.cached_property
    def _writer(self) -> JSONWriter:
        end_last_line(self._path)
        return JSONWriter(self._path)

    def write(self) -> None:
        with naming(self._path):
            self._writer.write()

    def close(self) -> None:
        with naming(self._path):
            self._writer.close()


def read_metrics(path: str) -> list[dict[str, float]]:
    """The records of a ``metrics.json``, by rising iteration.

    A run writes behind the records of earlier ones in the same folder. Where its progress begins anew, be it
    at 0 or at a checkpoint, the earlier records from there on belong to a run that was given up. The last
    line of a run that was killed may be incomplete; lines that are no records are left out, with a warning.

    Args:
        path: a file as Detectron2's ``JSONWriter`` makes it, one JSON object per line; there are no records
            in one that does not exist.
    """
    if not os.path.isfile(path):
        return []
    records: dict[int, dict[str, float]] = {}
    damaged = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _record(line)
            if record is None:
                damaged += 1
                continue
            iteration = record["iteration"]
            # What is measured now and then is written after the progress of later iterations.
            if "lr" in record:
                records = {i: known for i, known in records.items() if i < iteration}
            records[iteration] = {**records.get(iteration, {}), **record}
    if damaged:
        logger.warning("%s: %d lines are damaged or incomplete, and left out", path, damaged)
    return [records[iteration] for iteration in sorted(records)]


def _record(line: str) -> dict[str, float] | None:
    """The numbers in a line; None if it is none of a training run."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_whole(record.get("iteration")):
        return None
    return {name: value for name, value in record.items() if type(value) in (int, float)}


def end_last_line(path: str) -> None:
    """Let the next record begin on a line of its own, behind what a killed run may have left unfinished."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")
