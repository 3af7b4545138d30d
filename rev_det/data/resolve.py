"""What a config says about datasets: registering them, and the keys that follow from their content."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..rules import check_choice
from .coco import register_coco_json, registered_summary
from .findings import first
from .shapes import generate_shapes

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Detectron2's default of both NUM_CLASSES keys, which cannot be told from an explicit 80.
_DEFAULT_NUM_CLASSES = 80
# The generated sets and their splits.
_SHAPES = {"shapes_train": "train", "shapes_val": "val"}


def register_datasets(cfg: CfgNode) -> None:
    """Register the datasets of ``DATASETS.COCO_JSON`` and, where they are used, the generated shapes.

    To be called in every process; a second call does nothing. ``shapes_train`` and ``shapes_val`` are
    drawn once, below ``$DETECTRON2_DATASETS/shapes`` (``datasets/shapes`` if that is not set).

    Args:
        cfg: a config with rev_det's keys.

    Raises:
        FileNotFoundError: annotations or images do not exist.
        ValueError: an entry is malformed, or its annotations are not valid.
    """
    entries = [_checked_entry(entry) for entry in cfg.DATASETS.COCO_JSON]
    for entry in entries:
        register_coco_json(*entry)
    used = _dataset_names(cfg)
    for name, split in _SHAPES.items():
        if name in used:
            root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "shapes")
            register_coco_json(name, *generate_shapes(root, split))
    for name, *_ in entries:
        if name not in used:
            logger.warning("Dataset '%s' is registered, but DATASETS.TRAIN and .TEST do not name it", name)


def class_names(dataset_names: Sequence[str]) -> list[str]:
    """The class names that registered datasets share, in the order of the model's class indices.

    Args:
        dataset_names: names of registered datasets, at least one.

    Raises:
        ValueError: a dataset is not registered, has no class names, or has others than the first; or
            there is none.
    """
    if not dataset_names:
        raise ValueError("no dataset given; set DATASETS.TRAIN or DATASETS.TEST")
    lists = {}
    for name in dataset_names:
        _require_registered(name)
        lists[name] = MetadataCatalog.get(name).get("thing_classes")
        if not lists[name]:
            raise ValueError(f"dataset '{name}' has no class names (thing_classes in its metadata)")
    first = next(iter(lists))
    for name, classes in lists.items():
        if classes != lists[first]:
            raise ValueError(
                f"datasets '{first}' and '{name}' have different classes: {_listed(lists[first])} against "
                f"{_listed(classes)}; DATASETS.TRAIN and DATASETS.TEST must share one list of categories. "
                "Set both on the command line: what is not set there are the sets of the config"
            )
    return list(lists[first])


def resolve_num_classes(cfg: CfgNode) -> None:
    """Take the number of classes from the data, or check it against them (in place).

    Datasets that Detectron2 itself registers are left to it. As soon as ``DATASETS.TRAIN`` or ``.TEST``
    names one registered by ``register_datasets``, all must have the same classes. When all are, the
    default 80 of ``MODEL.ROI_HEADS.NUM_CLASSES`` and ``MODEL.RETINANET.NUM_CLASSES`` counts as unset.

    Args:
        cfg: a config, after ``register_datasets``.

    Raises:
        ValueError: a dataset is not registered, classes differ, or a key disagrees with the data.
    """
    names = _dataset_names(cfg)
    for name in names:
        _require_registered(name)
    ours = [name for name in names if registered_summary(name) is not None]
    if not ours:
        return
    classes = class_names(names)
    for head in ("ROI_HEADS", "RETINANET"):
        node = cfg.MODEL[head]
        key, value = f"MODEL.{head}.NUM_CLASSES", node.NUM_CLASSES
        if value == len(classes):
            continue
        if value != _DEFAULT_NUM_CLASSES or len(ours) < len(names):
            raise ValueError(
                f"{key} is {value}, but dataset '{ours[0]}' has {_listed(classes)}; set it to "
                f"{len(classes)}, or leave it out to have it taken from the data"
            )
        node.NUM_CLASSES = len(classes)
        logger.info("%s = %d, from dataset '%s'", key, len(classes), ours[0])


def resolve_mask_format(cfg: CfgNode) -> None:
    """Check that there are masks to train and evaluate, and choose the format that can hold them (in place).

    Polygons cannot be made from run-length encodings, so ``INPUT.MASK_FORMAT`` becomes "bitmask" when a
    training set registered by ``register_datasets`` has one on a non-crowd instance.

    Args:
        cfg: a config, after ``register_datasets``.

    Raises:
        ValueError: ``INPUT.MASK_FORMAT`` is unknown; ``MODEL.MASK_ON``, but instances have no segmentation.
    """
    check_choice("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT, ("polygon", "bitmask"))
    if not cfg.MODEL.MASK_ON:
        return
    for name in _dataset_names(cfg):
        summary = registered_summary(name)
        if summary is None:
            continue
        without = summary.num_instances - summary.num_masks
        if without:
            raise ValueError(
                f"MODEL.MASK_ON is True, but {without} of the {summary.num_instances} instances of dataset "
                f"'{name}' have no segmentation; set MODEL.MASK_ON False to train boxes alone, or add the "
                f"masks to {summary.json_file}"
            )
        if summary.num_rle and name in cfg.DATASETS.TRAIN and cfg.INPUT.MASK_FORMAT == "polygon":
            cfg.INPUT.MASK_FORMAT = "bitmask"
            logger.info(
                "INPUT.MASK_FORMAT = bitmask: %d instances of dataset '%s' have run-length encoded masks",
                summary.num_rle,
                name,
            )


def _dataset_names(cfg: CfgNode) -> list[str]:
    """The datasets of ``DATASETS.TRAIN`` and ``.TEST``, each once."""
    return list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))


def _require_registered(name: str) -> None:
    if name not in DatasetCatalog:
        raise ValueError(
            f"dataset '{name}' is not registered; give --dataset {name}=JSON:IMAGES or an entry of "
            "DATASETS.COCO_JSON, or use one of Detectron2's names"
        )


def _checked_entry(entry: object) -> tuple[str, str, str]:
    form = isinstance(entry, list | tuple) and len(entry) == 3
    if not form or not all(isinstance(text, str) and text for text in entry):
        raise ValueError(
            f"DATASETS.COCO_JSON has the entry {entry!r}; expected [[NAME, JSON, IMAGES], …], for example "
            "[['cats', 'train.json', 'images']]"
        )
    if entry[0] in _SHAPES:
        raise ValueError(
            f"DATASETS.COCO_JSON: the name '{entry[0]}' belongs to a generated set; choose another"
        )
    return tuple(entry)


def _listed(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({first(classes)})"
