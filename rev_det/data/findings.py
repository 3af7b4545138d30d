"""What is wrong with a data set: the first error for training, everything for ``rev-det data check``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..files import printable

logger = logging.getLogger(__name__)

# Training stops, or its result means nothing; training goes on, but hardly as it was meant; worth knowing.
ERROR, WARNING, NOTE = "error", "warning", "note"
# How many offenders a message names.
_NUM_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """Something about a data set.

    Attributes:
        severity: `ERROR`, `WARNING` or `NOTE`.
        text: what it is, how often, and the first that have it.
    """

    severity: str
    text: str


class Findings(list[Finding]):
    """A list to which every check adds what it finds.

    Args:
        where: what messages begin with, such as the name of the data set.
        raising: raise the first error and log warnings, as training needs it, instead of collecting all.
    """

    def __init__(self, where: str = "", raising: bool = False):
        super().__init__()
        self.where, self.raising = where, raising

    def add(self, severity: str, text: str, error: type[Exception] = ValueError) -> None:
        """Add a finding; ``error`` is the exception that it is for training."""
        finding = Finding(severity, printable(text))
        if self.raising and severity == ERROR:
            raise error(f"{self.where}: {finding.text}")
        if self.raising and severity == WARNING:
            logger.warning("%s: %s", self.where, finding.text)
        self.append(finding)

    def add_share(
        self,
        severity: str,
        offenders: Sequence[str],
        total: int,
        what: str,
        hint: str = "",
        error: type[Exception] = ValueError,
    ) -> None:
        """Add something that ``offenders`` of ``total`` have; nothing if there are none."""
        if offenders:
            percent = 100 * len(offenders) / total
            share = f"{len(offenders)} of {total} ({percent:{'.2g' if percent < 99.5 else '.0f'}} %)"
            self.add(severity, f"{share} {what}: {first(offenders)}{f'; {hint}' if hint else ''}", error)


def first(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
