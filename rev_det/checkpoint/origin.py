"""What a checkpoint was made by: kept in it as plain data, and compared when it is used again."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import detectron2
import torch
from detectron2.data import MetadataCatalog

from .. import __version__
from ..config_files import flat
from .loading import LoadMode, name_some

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Of a config what makes a model what it is; not where it runs, what follows from the data, and the paths of
# these, which are nobody else's business.
_EVALUATED = ("MODEL.", "INPUT.")
_SECTIONS = (*_EVALUATED, "DATASETS.TRAIN", "SOLVER.")
_LEFT_OUT = (
    "INPUT.MASK_FORMAT",
    "MODEL.DEVICE",
    "MODEL.REV.STRICT_CLASSES",
    "MODEL.REV.STRICT_WEIGHTS",
    "MODEL.WEIGHTS",
)
_KINDS = {"classes": list | None, "versions": Mapping, "config": Mapping}
_SHOWN = 8  # differences that a warning names


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "rev_det": __version__,
        "detectron2": detectron2.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def origin_of(cfg: CfgNode, datasets: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint keeps of the run that writes it.

    Args:
        cfg: of the run.
        datasets: names; their classes are those of the first.

    Returns:
        ``classes``, their names in the order of the model's class indices, or None if they are not known;
        ``versions``; ``config``, some of its values by key, as text.
    """
    classes = MetadataCatalog.get(datasets[0]).get("thing_classes") if datasets else None
    return {
        "classes": classes and [str(name) for name in classes],
        "versions": versions(),
        "config": {
            key: str(value) for key, value in flat(cfg) if key.startswith(_SECTIONS) and key not in _LEFT_OUT
        },
    }


def compare_origins(
    saved: Any, present: Mapping[str, Any], name: str, mode: LoadMode, strict: bool = True
) -> None:
    """Name what differs between what made a checkpoint and what uses it.

    Args:
        saved: what the checkpoint keeps; of an older or other one nothing is known.
        present: as `origin_of` returns it, or a part of it.
        name: of the checkpoint, for messages.
        mode: resuming and evaluation need the classes of the training; resuming goes on with its config.
        strict: ``MODEL.REV.STRICT_CLASSES``; if not, other classes are a warning.

    Raises:
        ValueError: the classes differ.
    """
    if not _is_origin(saved):
        return
    before, now = saved["classes"], present.get("classes")
    if before and now and before != now:
        differing = [
            f"{index}: {a or 'none'}, now {b or 'none'}"
            for index, (a, b) in enumerate(zip_longest(before, now))
            if a != b
        ]
        problem = f"{name} was trained on other classes than the data have ({name_some(differing)})"
        if strict and (mode.resume or mode.evaluation):
            raise ValueError(
                f"{problem}: one would be taken for another. Give data with the classes of the training, in "
                "its order; MODEL.REV.STRICT_CLASSES False goes on all the same"
            )
        logger.warning("%s", problem)
    if mode.resume or mode.evaluation:
        sections = ("",) if mode.resume else _EVALUATED
        changed = [
            f"{key} {old[key]}, now {new[key]}"
            for old, new in ((saved[part], present.get(part, {})) for part in ("versions", "config"))
            for key in new
            if key.startswith(sections) and key in old and old[key] != new[key]
        ]
        if changed:
            logger.warning("%s was made with %s", name, name_some(changed, _SHOWN))


def classes_of_origin(saved: Any) -> list[str] | None:
    """The names of the classes that a checkpoint was trained on, if it keeps them."""
    return saved["classes"] if _is_origin(saved) else None


def _is_origin(saved: Any) -> bool:
    return (
        isinstance(saved, Mapping)
        and all(isinstance(saved.get(key), kind) for key, kind in _KINDS.items())
        and all(isinstance(name, str) for name in saved["classes"] or ())
    )
