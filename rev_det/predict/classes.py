"""What a detector's classes are called, from the data it was trained on."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import shapes

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_SHAPES = ("shapes_train", "shapes_val")


@dataclass(frozen=True)
class Classes:
    """Names of classes and what COCO's format calls them, in the order of the model's class indices.

    Attributes:
        names: for people.
        ids: ``category_id`` of each.
        own: whether they are from data in COCO's format, and not known to Detectron2 by its name.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    own: bool = True

    @classmethod
    def numbered(cls, count: int) -> Classes:
        """Classes whose names are not known."""
        return cls(tuple(f"class {i}" for i in range(1, count + 1)), tuple(range(1, count + 1)))

    def indices(self, names: Sequence[str]) -> frozenset[int]:
        """The indices of some classes.

        Raises:
            ValueError: there is no class of such a name; the message has those that are similar.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.names, n=3)
            known = ", ".join(self.names[:10]) + (", …" if len(self.names) > 10 else "")
            hint = f"did you mean {' or '.join(close)}?" if close else f"the classes are {known}"
            raise ValueError(f"--classes: the detector has no class {unknown[0]!r}; {hint}")
        return frozenset(index for index, name in enumerate(self.names) if name in names)


def classes_from_json(path: str) -> Classes:
    """The categories of a file in COCO's format.

    Args:
        path: of annotations, or of anything else with ``categories``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or has no categories with id and name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist; it should be a file in COCO's format")
    try:
        with open(path, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        pairs = sorted((category["id"], category["name"]) for category in categories)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not in COCO's format: it needs categories, with id and name") from error
    if not pairs:
        raise ValueError(f"{path} has no categories")
    ids, names = zip(*pairs, strict=True)
    return Classes(names, ids)


def classes_of_config(cfg: CfgNode) -> Classes | None:
    """The classes of the first data set of ``DATASETS`` that is at hand; their images need not be.

    Args:
        cfg: a config with rev_det's keys.

    Returns:
        None if there is no such data set.
    """
    files = {entry[0]: entry[1] for entry in cfg.DATASETS.COCO_JSON}
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in files:
            path = os.path.expanduser(files[name])
            if os.path.isfile(path):
                return classes_from_json(path)
        elif name in _SHAPES:
            return Classes(shapes.CLASSES, tuple(range(1, len(shapes.CLASSES) + 1)))
        elif name in DatasetCatalog:
            metadata = MetadataCatalog.get(name)
            names = metadata.get("thing_classes")
            if names:
                ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
                return Classes(tuple(names), tuple(sorted(ids, key=ids.get)), own=False)
    return None
