"""The file ``metrics.json`` of a training run."""

from __future__ import annotations

import json
import os


def read_metrics(path: str) -> list[dict[str, float]]:
    """The records of a ``metrics.json``, by rising iteration.

    A run writes behind the records of earlier ones in the same folder. Where its progress begins anew, be it
    at 0 or at a checkpoint, the earlier records from there on belong to a run that was given up. The last
    line of a run that was killed may be incomplete; it is left out.

    Args:
        path: a file as Detectron2's ``JSONWriter`` makes it, one JSON object per line; there are no records
            in one that does not exist.
    """
    if not os.path.isfile(path):
        return []
    records: dict[int, dict[str, float]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            iteration = record["iteration"]
            # What is measured now and then is written after the progress of later iterations.
            if "lr" in record:
                records = {i: known for i, known in records.items() if i < iteration}
            records[iteration] = {**records.get(iteration, {}), **record}
    return [records[iteration] for iteration in sorted(records)]


def end_last_line(path: str) -> None:
    """Let the next record begin on a line of its own, behind what a killed run may have left unfinished."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")
