"""What ``log.txt`` alone knows of a training run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

# Colours, in which Detectron2 shows the config file.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RULE = re.compile(r"-{5,}\s+-{5,}")
_PEAK = re.compile(r"\bmax_mem: (\d+)M")


@dataclass
class Log:
    """What is read from a log; of a resumed run, from its last start.

    Attributes:
        environment: the table of Detectron2's ``collect_env``.
        arguments: the command line, as Detectron2 shows it; empty if it is not there.
        peak_memory_mib: the largest that Detectron2 has printed, which it does on CUDA alone.
    """

    environment: dict[str, str] = field(default_factory=dict)
    arguments: str = ""
    peak_memory_mib: int | None = None

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read a file, which need not exist."""
        log = cls()
        if not path.is_file():
            return log
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = (_COLOUR.sub("", line).rstrip("\n") for line in file)
            for line in lines:
                peak = _PEAK.search(line)
                if peak:
                    log.peak_memory_mib = max(int(peak[1]), log.peak_memory_mib or 0)
                elif line.endswith("Environment info:"):
                    log.environment = dict(_table(lines))
                elif "Command line arguments: " in line:
                    log.arguments = line.partition("Command line arguments: ")[2]
        return log


def _table(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """The rows between two rules."""
    if not _RULE.fullmatch(next(lines, "").strip()):
        return
    for row in takewhile(lambda line: line.strip() and not _RULE.fullmatch(line.strip()), lines):
        name, _, value = row.partition("  ")
        yield name.strip(), value.strip()
