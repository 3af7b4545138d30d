"""Checks of a COCO-format file before anything is trained on it. Needs neither Detectron2 nor torch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from ..files import read_json

logger = logging.getLogger(__name__)

# Degenerate instances are dropped up to this share of all instances; above it the file is refused.
MAX_DEGENERATE_SHARE = 0.01
# Boxes at most this wide or high, in pixels, are empty: Detectron2's filter_empty_instances uses the same.
MIN_BOX_SIDE = 1e-5
# How many offenders a message names.
NUM_NAMED = 5
# Images of each file that are decoded before a run: enough to notice a wrong folder or kind of file.
NUM_SAMPLED = 8

# Images with a longer side, in pixels, or a larger ratio of sides, are looked at once the config is known.
_EXTREME_SIDE, _EXTREME_RATIO = 5000, 50
# A polygon's points may lie this many times the image's longer side away from its corner; what they enclose
# is drawn, and takes memory.
_FARTHEST = 10

# The fields everything else relies on, by the COCO section they belong to.
_FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}


@dataclass(frozen=True)
class CocoSummary:
    """What the checks found in a COCO-format file.

    Attributes:
        json_file: absolute path of the annotations.
        image_root: absolute path of the folder with the images.
        category_ids: the ids in the file, ascending; their positions are the contiguous class indices.
        classes: the class names, in the order of ``category_ids``.
        num_images: images in the file.
        num_instances: annotations that are kept, crowd regions included.
        num_masks: those of them that have a segmentation.
        num_rle: non-crowd instances whose segmentation is a run-length encoding.
        num_crowds: kept annotations that are crowd regions.
        sample: up to ``NUM_SAMPLED`` images spread over the file, as entries of Detectron2's dataset format
            that have what it takes to read them.
        extreme: images so large or narrow that it depends on the config whether they can be used, likewise.
        dropped: ids of the annotations left out of training and evaluation because they are degenerate.
    """

    json_file: str
    image_root: str
    category_ids: tuple[int, ...]
    classes: tuple[str, ...]
    num_images: int
    num_instances: int
    num_masks: int
    num_rle: int
    num_crowds: int
    sample: tuple[dict[str, Any], ...]
    extreme: tuple[dict[str, Any], ...]
    dropped: frozenset[int]


def is_valid_polygon(polygon: list[float]) -> bool:
    """Whether a flat list x0, y0, x1, y1, … has at least three points (what ``load_coco_json`` keeps)."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def check_coco_json(name: str, json_file: str, image_root: str) -> CocoSummary:
    """Read a COCO-format file and check everything that would otherwise fail, or pass silently, later on.

    Args:
        name: what messages call the dataset.
        json_file: the annotations.
        image_root: the folder that the images' ``file_name`` are relative to.

    Returns:
        what was found.

    Raises:
        FileNotFoundError: the file, the folder or some of the images do not exist.
        ValueError: the file cannot be read, is not COCO's instances format, or more than 1 % of its
            instances are degenerate.
    """
    where = f"dataset '{name}': {json_file}"
    if not os.path.isfile(json_file):
        problem = "is a folder, not a file" if os.path.isdir(json_file) else "does not exist"
        raise FileNotFoundError(f"{where} {problem}; give the path of a COCO-format annotation file")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"dataset '{name}': the image folder {image_root} does not exist; give the folder that the "
            f"file_name entries of {json_file} are relative to"
        )
    content = _read_json(where, json_file)
    _check_sections(where, content)
    images, categories, annotations = (content[key] for key in ("images", "categories", "annotations"))
    _check_references(where, images, categories, annotations)
    _check_image_files(name, json_file, image_root, images)
    num_masks, num_rle, dropped = _check_instances(where, images, annotations)
    kept = [annotation for annotation in annotations if annotation["id"] not in dropped]
    categories = sorted(categories, key=lambda category: category["id"])
    return CocoSummary(
        json_file=json_file,
        image_root=image_root,
        category_ids=tuple(category["id"] for category in categories),
        classes=tuple(category["name"] for category in categories),
        num_images=len(images),
        num_instances=len(kept),
        num_masks=num_masks,
        num_rle=num_rle,
        num_crowds=sum(annotation.get("iscrowd", 0) for annotation in kept),
        sample=tuple(_readable_entry(image, image_root) for image in _spread(images)),
        extreme=tuple(_readable_entry(image, image_root) for image in images if _is_extreme(image)),
        dropped=frozenset(dropped),
    )


def _read_json(where: str, json_file: str) -> dict[str, Any]:
    try:
        content = read_json(json_file)
    except ValueError as error:
        raise ValueError(f"{where.removesuffix(json_file)}{error}") from error
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{where} holds a {type(content).__name__}, not an object with the keys {', '.join(_FIELDS)}; "
            "a list of detections is a results file, not annotations"
        )
    return content


def _check_sections(where: str, content: dict[str, Any]) -> None:
    """Check that the sections exist, are not empty, and that every record has its required fields."""
    missing = [key for key in _FIELDS if key not in content]
    if missing:
        raise ValueError(
            f"{where} is not in COCO's instances format: missing {_quoted(missing)}, found "
            f"{_quoted(content) or 'nothing'}; it needs {_quoted(_FIELDS)}"
        )
    for section, fields in _FIELDS.items():
        records = content[section]
        if not isinstance(records, list) or not records:
            found = "empty" if isinstance(records, list) else f"a {type(records).__name__}"
            raise ValueError(f"{where}: '{section}' is {found}, expected a list of at least one record")
        for index, record in enumerate(records):
            if type(record) is not dict:
                raise ValueError(
                    f"{where}: {section}[{index}] is a {type(record).__name__}, expected an object"
                )
            for key, kind in fields.items():
                # type() and not isinstance: JSON's true is an int in Python.
                if type(record.get(key)) is not kind:
                    found = f"{record[key]!r}" if key in record else "missing"
                    raise ValueError(
                        f"{where}: '{key}' of {section}[{index}] is {found}, expected {_kind_name(kind)}"
                    )
    for index, image in enumerate(content["images"]):
        if not image["file_name"] or image["height"] < 1 or image["width"] < 1:
            raise ValueError(
                f"{where}: images[{index}] has file_name {image['file_name']!r}, height {image['height']}, "
                f"width {image['width']}; the name must not be empty and the sizes at least 1 pixel"
            )


def _check_references(
    where: str, images: list[dict], categories: list[dict], annotations: list[dict]
) -> None:
    """Check that ids are unique and that every annotation belongs to a listed image and category."""
    for section, records in (("images", images), ("categories", categories), ("annotations", annotations)):
        counts = Counter(record["id"] for record in records)
        if len(counts) < len(records):
            twice = [str(key) for key, count in counts.items() if count > 1]
            raise ValueError(f"{where}: '{section}' has duplicate ids ({_first(twice)}); ids must be unique")
    twice = [name for name, count in Counter(c["name"] for c in categories).items() if count > 1]
    if twice:
        raise ValueError(
            f"{where}: class names are given more than once ({_first(twice)}); results could not tell these "
            "'categories' apart: rename them, or make them one"
        )
    for key, section, records in (("image_id", "images", images), ("category_id", "categories", categories)):
        known = {record["id"] for record in records}
        unknown = {annotation[key] for annotation in annotations} - known
        if unknown:
            raise ValueError(
                f"{where}: annotations have a '{key}' that '{section}' lacks "
                f"({_first([str(value) for value in sorted(unknown)])}); the {len(known)} ids there go from "
                f"{min(known)} to {max(known)}; add the {section} or remove these annotations"
            )


def _check_image_files(name: str, json_file: str, image_root: str, images: list[dict]) -> None:
    # One listing per folder: a stat of each of 118k images takes minutes on network file systems.
    listings: dict[str, set[str]] = {}
    missing = []
    for image in images:
        folder, file_name = os.path.split(os.path.join(image_root, image["file_name"]))
        if folder not in listings:
            listings[folder] = _files_in(folder)
        if file_name not in listings[folder]:
            missing.append(image["file_name"])
    if missing:
        raise FileNotFoundError(
            f"dataset '{name}': {len(missing)} of the {len(images)} images of {json_file} are not in "
            f"{image_root}: {_first(missing)}; check the image folder"
        )


def _spread(images: list[dict]) -> list[dict]:
    """Up to ``NUM_SAMPLED`` images, from the first to the last."""
    count = min(NUM_SAMPLED, len(images))
    return [images[index * (len(images) - 1) // max(count - 1, 1)] for index in range(count)]


def _is_extreme(image: dict) -> bool:
    shorter, longer = sorted((image["height"], image["width"]))
    return longer > _EXTREME_SIDE or longer > _EXTREME_RATIO * shorter


def _readable_entry(image: dict, image_root: str) -> dict[str, Any]:
    return {
        "file_name": os.path.join(image_root, image["file_name"]),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
    }


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _check_instances(where: str, images: list[dict], annotations: list[dict]) -> tuple[int, int, set[int]]:
    """Check boxes and masks.

    Returns:
        the number of kept instances with a mask, of kept non-crowd instances with a run-length
        encoding, and the ids of the instances to drop.
    """
    images_by_id = {image["id"]: image for image in images}
    # id -> what is wrong. An instance that loses some of its polygons and keeps others is degenerate
    # but not dropped.
    degenerate: dict[int, str] = {}
    dropped: set[int] = set()
    without_mask: list[int] = []
    num_masks = num_rle = 0
    for index, annotation in enumerate(annotations):
        image = images_by_id[annotation["image_id"]]
        try:
            box_problem = _box_problem(annotation["bbox"], image)
            segmentation = annotation.get("segmentation")
            if annotation.get("ignore", 0):
                raise ValueError("'ignore' is not supported by Detectron2; use 'iscrowd' or remove it")
            if annotation.get("iscrowd", 0) not in (0, 1):
                raise ValueError(f"'iscrowd' is {annotation['iscrowd']!r}, expected 0 or 1")
            area = annotation.get("area", 0)
            if type(area) not in (int, float) or not 0 <= area < inf:
                raise ValueError(
                    f"'area' is {area!r}, expected a number of pixels of at least 0; "
                    "where it is left out, that of the mask or box is taken"
                )
            mask_problem, mask_left = _mask_problem(segmentation, image) if segmentation else (None, True)
        except ValueError as error:
            raise ValueError(f"{where}: annotations[{index}] (id {annotation['id']}): {error}") from error
        if box_problem or mask_problem:
            degenerate[annotation["id"]] = f"{box_problem or mask_problem}, image {image['file_name']}"
        if box_problem or not mask_left:
            dropped.add(annotation["id"])
        elif segmentation:
            num_masks += 1
            num_rle += isinstance(segmentation, dict) and not annotation.get("iscrowd", 0)
        else:
            without_mask.append(annotation["id"])
    allowed = int(MAX_DEGENERATE_SHARE * len(annotations))
    if num_masks and 0 < len(without_mask) <= allowed:
        # Where nearly all instances have masks, the few without are slips; where many have none, that
        # is how the set was made, and only MODEL.MASK_ON can say whether it matters.
        degenerate.update(dict.fromkeys(without_mask, "no segmentation"))
        dropped.update(without_mask)
    if degenerate:
        named = _first([f"id {key} ({problem})" for key, problem in degenerate.items()])
        if len(degenerate) > allowed:
            raise ValueError(
                f"{where}: {len(degenerate)} of {len(annotations)} instances are degenerate, more than "
                f"{MAX_DEGENERATE_SHARE:.0%}: {named}; correct them or remove them from the file"
            )
        logger.warning(
            "%s: %d of %d instances are degenerate: %s. %d are left out of training and evaluation, "
            "the others keep their valid polygons.",
            where,
            len(degenerate),
            len(annotations),
            named,
            len(dropped),
        )
    return num_masks, num_rle, dropped


def _box_problem(box: list, image: dict) -> str | None:
    """What is wrong with an x, y, width, height box; raises ValueError if it is no box at all."""
    if len(box) != 4 or not are_numbers(box):
        raise ValueError(f"'bbox' is {box!r}, expected four finite numbers x, y, width, height")
    x, y, width, height = box
    # Detectron2 clips boxes to the image and then throws the empty ones away without a word.
    clipped_width = min(x + width, image["width"]) - max(x, 0)
    clipped_height = min(y + height, image["height"]) - max(y, 0)
    if min(clipped_width, clipped_height) <= MIN_BOX_SIDE:
        return f"bbox {box} is empty or outside the image"
    return None


def are_numbers(values: list) -> bool:
    """Whether all are finite numbers, which JSON's true and false are not."""
    try:
        return set(map(type, values)) <= {int, float} and isfinite(sum(values))
    except OverflowError:  # an integer beyond all floating point numbers
        return False


def _mask_problem(segmentation: Any, image: dict) -> tuple[str | None, bool]:
    """What is wrong with a segmentation, and whether a usable part of it is left.

    Raises:
        ValueError: it is neither polygons nor a run-length encoding of the image's size.
    """
    if isinstance(segmentation, dict):
        empty = _rle_area(segmentation, image) == 0
        return ("empty mask" if empty else None), not empty
    if not isinstance(segmentation, list) or not all(type(polygon) is list for polygon in segmentation):
        raise ValueError(
            "'segmentation' must be a list of polygons [[x0, y0, x1, y1, …], …] or a run-length encoding "
            '{"size": …, "counts": …}'
        )
    if not all(are_numbers(polygon) for polygon in segmentation):
        raise ValueError("'segmentation' has a coordinate that is not a finite number")
    limit = _FARTHEST * max(image["height"], image["width"])
    farthest = max((max(max(polygon), -min(polygon)) for polygon in segmentation if polygon), default=0)
    if farthest > limit:
        raise ValueError(
            f"'segmentation' has a coordinate of {farthest:g}, but image {image['file_name']} is "
            f"{image['width']}x{image['height']}; coordinates are in pixels"
        )
    num_valid = sum(map(is_valid_polygon, segmentation))
    if num_valid == len(segmentation):
        return None, True
    return "polygon with fewer than three points or an odd number of coordinates", num_valid > 0


def _rle_area(rle: dict, image: dict) -> int:
    """Pixels in a run-length encoding, compressed (text) or not (a list); ValueError if it is broken."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [image["height"], image["width"]] or not all(type(side) is int for side in size):
        raise ValueError(
            f"'size' of its run-length encoding is {size}, but image {image['file_name']} has height "
            f"{image['height']} and width {image['width']}"
        )
    # pycocotools and what counts like it read without looking: over the end of a damaged text, or for ever.
    runs = _runs(counts) if isinstance(counts, str) else counts
    if isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs):
        if sum(runs) == size[0] * size[1]:
            return sum(runs[1::2])
    raise ValueError("'counts' of its run-length encoding is damaged or does not cover the image")


def _runs(counts: str) -> list[int] | None:
    """The lengths in the text of a compressed run-length encoding; None if it is none.

    COCO's format: digits of five bits, the lowest first, as characters from "0" on; bit 5 says that another
    one follows, bit 4 of the last one is the sign. From the fourth on, lengths are differences to the last
    but one.
    """
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - ord("0") for character in counts):
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift or not runs else runs


def _kind_name(kind: type) -> str:
    return {int: "an integer", str: "a text", list: "a list"}[kind]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _first(items: list[str]) -> str:
    more = len(items) - NUM_NAMED
    return ", ".join(items[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
