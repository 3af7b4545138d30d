"""What became of every tensor of a weight file and of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_SHOWN = 4


@dataclass
class LoadReport:
    """The result of loading weights into a model.

    Attributes:
        source: where the weights came from.
        layout: "pyslowfast", "mmpretrain" or "rev_det".
        loaded: tensors of the model that were loaded.
        expected: tensors of the model that the source should hold: all but ``initialised``.
        resized: loaded after interpolation to another grid (position embeddings).
        dropped: of the source, for which the model has no use: a classifier's head, the norm of a scale that
            is not returned, a detector's heads where the model is a backbone.
        initialised: of the model, that keep their values because no file of this kind holds them: a pyramid,
            heads, norms of other scales; heads for another number of classes.
        missing: of the model, that the source should hold and does not, or not in this shape.
        unexpected: of the source, that have no place in the model.
        notes: what else there is to know, a sentence each.
    """

    source: str
    layout: str
    loaded: int = 0
    expected: int = 0
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded}/{self.expected} tensors loaded ({self.layout} layout)"]
        for name in ("resized", "dropped", "initialised", "missing", "unexpected"):
            if keys := getattr(self, name):
                lines.append(f"  {name}: {name_some(keys)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def name_some(items: Iterable[str], shown: int = _SHOWN) -> str:
    """The first of many names, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
