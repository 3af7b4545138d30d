"""COCO-format datasets that need no code: registration by name, annotation file and image folder."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .annotations import CocoSummary, check_coco_json

logger = logging.getLogger(__name__)

# What registration found, by dataset name. Detectron2's catalogs are as global, and hold the rest.
_SUMMARIES: dict[str, CocoSummary] = {}


def parse_dataset_argument(text: str, option: str = "--dataset") -> tuple[str, str, str]:
    """Split the value of ``--dataset``, or what a command calls it.

    The name ends at the first ``=``. The paths part at the last ``:``, so that the path of the
    annotations may hold colons; an image folder with a colon needs ``DATASETS.COCO_JSON``.

    Args:
        text: ``NAME=JSON:IMAGES``.
        option: what the error calls it.

    Returns:
        the name, the path of the annotations and the folder of the images.

    Raises:
        ValueError: one of the three parts is missing.
    """
    name, _, paths = text.partition("=")
    json_file, _, image_root = paths.rpartition(":")
    parts = name.strip(), json_file.strip(), image_root.strip()
    if not all(parts):
        raise ValueError(
            f"{option} {text!r}: expected NAME=JSON:IMAGES, for example "
            "cats=annotations/instances_train.json:images/train"
        )
    return parts


def register_coco_json(name: str, json_file: str, image_root: str) -> None:
    """Check a COCO-format dataset and register it with Detectron2 (once; again with the same paths is fine).

    Like ``register_coco_instances``, except that the whole file is checked first, the class names are
    known at once, and degenerate instances (at most 1 %, see ``check_coco_json``) are left out.

    Args:
        name: the name that ``DATASETS.TRAIN`` and ``DATASETS.TEST`` use.
        json_file: annotations in COCO's instances format; relative to the working directory.
        image_root: the folder that the images' ``file_name`` are relative to.

    Raises:
        FileNotFoundError: the annotations, the folder or some images do not exist.
        ValueError: the name is taken or unusable, or the annotations are not valid.
    """
    # The evaluation writes into a folder of this name.
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"dataset name {name!r} must be a plain name without '/'")
    json_file, image_root = (os.path.abspath(os.path.expanduser(path)) for path in (json_file, image_root))
    if name in DatasetCatalog:
        summary = registered_summary(name)
        if summary is None:
            raise ValueError(f"dataset name '{name}' is already registered by Detectron2; choose another")
        if (summary.json_file, summary.image_root) != (json_file, image_root):
            raise ValueError(
                f"dataset '{name}' is already registered with {summary.json_file} and {summary.image_root}, "
                f"now given with {json_file} and {image_root}; choose another name for one of them"
            )
        return
    summary = check_coco_json(name, json_file, image_root)
    DatasetCatalog.register(name, functools.partial(_load, name, summary))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        # The values load_coco_json sets when the data are first read: evaluation may come before that.
        thing_classes=list(summary.classes),
        thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(summary.category_ids)},
    )
    _SUMMARIES[name] = summary
    logger.info(
        "Registered dataset '%s': %d images, %d instances, %d classes, from %s",
        name,
        summary.num_images,
        summary.num_instances,
        len(summary.classes),
        json_file,
    )


def registered_summary(name: str) -> CocoSummary | None:
    """What ``register_coco_json`` found in a dataset; None for datasets registered by other means."""
    return _SUMMARIES.get(name) if name in DatasetCatalog else None


def _load(name: str, summary: CocoSummary) -> list[dict[str, Any]]:
    """The dataset in Detectron2's format, without the degenerate instances."""
    records = load_coco_json(summary.json_file, summary.image_root, name, extra_annotation_keys=["id"])
    for record in records:
        record["annotations"] = [
            annotation for annotation in record["annotations"] if annotation.pop("id") not in summary.dropped
        ]
    return records
