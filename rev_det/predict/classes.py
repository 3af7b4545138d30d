"""What a detector's classes are called, from the data it was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..data import shapes
from ..files import read_json
from ..rules import is_whole

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def named_classes(names: Iterable[str], ids: Iterable[int] | None = None) -> Metadata:
    """Classes as Detectron2's data sets describe theirs.

    Args:
        names: in the order of the model's class indices.
        ids: ``category_id`` of each in COCO's format; None for 1, 2, 3 and so on.
    """
    names = list(names)
    ids = range(1, len(names) + 1) if ids is None else ids
    indices = {number: index for index, number in enumerate(ids)}
    return Metadata(thing_classes=names, thing_dataset_id_to_contiguous_id=indices)


def coco_names(path: str, section: str, key: str = "name") -> dict[int, str]:
    """What the records in a section of a file in COCO's format are called, by their ids in ascending order.

    Args:
        path: of annotations, or of anything else with the section.
        section: "categories" or "images"; without it there are no records.
        key: of the name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or a record has no whole id of its own or no name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist; it should be a file in COCO's format")
    try:
        records = read_json(path).get(section, [])
        names = {record["id"]: record[key] for record in records}
        valid = len(names) == len(records) and all(
            is_whole(number) and isinstance(name, str) and name for number, name in names.items()
        )
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            f"{path} is not in COCO's format: each of its {section} needs a whole number of its own as id, "
            f"and a text as {key}"
        )
    return dict(sorted(names.items()))


def classes_of_json(path: str) -> Metadata:
    """The categories of a file in COCO's format.

    Raises:
        FileNotFoundError, ValueError: see `coco_names`; or there are no categories.
    """
    names = coco_names(path, "categories")
    if not names:
        raise ValueError(f"{path} has no categories, which a file in COCO's format lists with id and name")
    return named_classes(names.values(), names)


def classes_of_config(cfg: CfgNode) -> Metadata | None:
    """The classes of the first data set of ``DATASETS`` that is at hand; their images need not be.

    Args:
        cfg: a config with rev_det's keys; relative paths are of the current folder.

    Returns:
        None if there is no such data set. Data that Detectron2 knows by their name have one here, too.
    """
    files = {entry[0]: os.path.expanduser(entry[1]) for entry in cfg.DATASETS.COCO_JSON}
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if os.path.isfile(files.get(name, "")):
            return classes_of_json(files[name])
        if name in ("shapes_train", "shapes_val"):
            return named_classes(shapes.CLASSES)
        if name in DatasetCatalog and name not in files and MetadataCatalog.get(name).get("thing_classes"):
            return MetadataCatalog.get(name)
    return None
