"""What a detector's classes are called, from the data it was trained on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import shapes
from ..files import read_json
from ..rules import is_whole

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
    content = read_json(path)
    try:
        pairs = sorted((category["id"], category["name"]) for category in content["categories"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not in COCO's format: it needs categories, with id and name") from error
    if not all(is_whole(key) and isinstance(name, str) for key, name in pairs):
        raise ValueError(f"{path} is not in COCO's format: ids of categories are integers, names are texts")
    if not pairs:
        raise ValueError(f"{path} has no categories")
    ids, names = zip(*pairs, strict=True)
    return Classes(names, ids)


def training_folder(output_dir: str, run: str) -> str | None:
    """The folder that a training was started in, which the relative paths of its config are of.

    Args:
        output_dir: ``OUTPUT_DIR``, as the config has it.
        run: the folder that it is.

    Returns:
        None if it cannot be told: ``output_dir`` is absolute, or the run was moved.
    """
    parts = Path(os.path.normpath(output_dir)).parts
    found = Path(os.path.abspath(run))
    start = len(found.parts) - len(parts)
    return str(Path(*found.parts[:start])) if start > 0 and found.parts[start:] == parts else None


def files_of_config(cfg: CfgNode, folders: Sequence[str] = ("",)) -> dict[str, list[str]]:
    """Where the annotations of each data set may be that a config gives by its file.

    Args:
        cfg: a config with rev_det's keys.
        folders: those that relative paths may be of; "" is the current one.

    Returns:
        paths to try in this order, by the data set's name.
    """
    paths = {entry[0]: os.path.expanduser(entry[1]) for entry in cfg.DATASETS.COCO_JSON}
    return {
        name: list(dict.fromkeys(os.path.abspath(os.path.join(folder, path)) for folder in folders))
        for name, path in paths.items()
    }


def classes_of_config(cfg: CfgNode, folders: Sequence[str] = ("",)) -> Classes | None:
    """The classes of the first data set of ``DATASETS`` that is at hand; their images need not be.

    Args:
        cfg: a config with rev_det's keys.
        folders: as `files_of_config`'s.

    Returns:
        None if there is no such data set.
    """
    files = files_of_config(cfg, folders)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in files:
            path = next(filter(os.path.isfile, files[name]), None)
            if path is not None:
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
