"""What annotations in COCO's format must be, for training as for ``rev-det data check``."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from reprlib import repr as short_repr
from typing import Any

from ..files import read_json
from .findings import ERROR, WARNING, Findings, first

# Degenerate instances are dropped up to this share of all instances; above it the file is refused.
MAX_DEGENERATE_SHARE = 0.01
# Boxes at most this wide or high, in pixels, are empty: Detectron2's filter_empty_instances uses the same.
MIN_BOX_SIDE = 1e-5
# Images of each file that are decoded before a run: enough to notice a wrong folder or kind of file.
NUM_SAMPLED = 8

# Images with a longer side, in pixels, or a larger ratio of sides, are looked at once the config is known.
_EXTREME_SIDE, _EXTREME_RATIO = 5000, 50
# A polygon's points may lie this many times the image's longer side away from its corner; what they enclose
# is drawn, and takes memory.
_FARTHEST = 10
# No number of pixels is larger; products of two still fit into integers of 64 bits.
_LARGEST = 2**31


def are_numbers(values: list, limit: float = _LARGEST) -> bool:
    """Whether all are finite numbers, at most the limit away from 0; JSON's true and false are not."""
    if not set(map(type, values)) <= {int, float} or not max(map(abs, values), default=0) <= limit:
        return False
    return isfinite(sum(values))  # max passes over a NaN that is not the first


def is_unicode(text: Any) -> bool:
    """Whether a text can be written to files as UTF-8: JSON's \\ud800 is half of a character."""
    return type(text) is str and not any("\ud800" <= character <= "\udfff" for character in text)


_ID = ("an integer", lambda value: type(value) is int)  # and not isinstance: JSON's true is an int in Python
_SIDE = (
    f"a whole number of pixels from 1 to {_LARGEST}",
    lambda value: type(value) is int and 1 <= value <= _LARGEST,
)
# What the fields of a record must be, by section.
_FIELDS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {
        "id": _ID,
        "file_name": ("a text, and not empty", lambda value: type(value) is str and value != ""),
        "height": _SIDE,
        "width": _SIDE,
    },
    "categories": {"id": _ID, "name": ("a text in Unicode", is_unicode)},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (
            "four finite numbers x, y, width, height",
            lambda value: type(value) is list and len(value) == 4 and are_numbers(value),
        ),
        "area": (
            "a number of pixels of at least 0 (where it is left out, that of the mask or box is taken)",
            lambda value: type(value) in (int, float) and 0 <= value <= _LARGEST**2,
        ),
        "iscrowd": ("0 or 1", lambda value: value in (0, 1)),
        "ignore": ("0 (Detectron2 does not support it; use 'iscrowd')", lambda value: value == 0),
        "keypoints": (
            "a list of three finite numbers for each point",
            lambda value: type(value) is list and len(value) % 3 == 0 and are_numbers(value),
        ),
    },
}
_OPTIONAL = ("area", "iscrowd", "ignore", "keypoints")


@dataclass(frozen=True)
class CocoSummary:
    """What the checks found in a COCO-format file."""

    json_file: str
    image_root: str
    category_ids: tuple[int, ...]  # ascending; their positions are the contiguous class indices
    classes: tuple[str, ...]  # names, in the order of the ids
    num_images: int
    num_instances: int  # annotations that are kept, crowd regions included
    num_masks: int  # those of them that have a segmentation
    num_rle: int  # non-crowd instances whose segmentation is a run-length encoding
    num_crowds: int
    # Images as entries of Detectron2's dataset format with what it takes to read them: some spread over the
    # file, and those so large or narrow that it depends on the config whether they can be used.
    sample: tuple[dict[str, Any], ...]
    extreme: tuple[dict[str, Any], ...]
    dropped: frozenset[int]  # ids of degenerate annotations, which training and evaluation leave out


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
    findings = Findings(f"dataset '{name}': {json_file}", raising=True)
    images, categories, annotations = read_records(findings, name, json_file, image_root)
    dropped = find_degenerate(findings, images, annotations)
    kept = [annotation for annotation in annotations if annotation["id"] not in dropped]
    masks = [annotation for annotation in kept if annotation.get("segmentation")]
    category_ids, classes = zip(*sorted((c["id"], c["name"]) for c in categories), strict=True)
    entries = [
        {"file_name": os.path.join(image_root, image["file_name"]), "image_id": image["id"]}
        | {side: image[side] for side in ("height", "width")}
        for image in images
    ]
    count = min(NUM_SAMPLED, len(entries))
    return CocoSummary(
        json_file=json_file,
        image_root=image_root,
        category_ids=category_ids,
        classes=classes,
        num_images=len(images),
        num_instances=len(kept),
        num_masks=len(masks),
        num_rle=sum(isinstance(a["segmentation"], dict) and not a.get("iscrowd", 0) for a in masks),
        num_crowds=sum(annotation.get("iscrowd", 0) for annotation in kept),
        sample=tuple(entries[i * (len(entries) - 1) // max(count - 1, 1)] for i in range(count)),
        extreme=tuple(e for e in entries if _is_extreme(*sorted((e["height"], e["width"])))),
        dropped=frozenset(dropped),
    )


def read_records(
    findings: Findings, name: str, json_file: str, image_root: str
) -> tuple[list[dict], list[dict], list[dict]]:
    """Read a file, and check its structure, its values, and that what it refers to exists.

    Args:
        findings: to which errors are added.
        name, json_file, image_root: as for `check_coco_json`.

    Returns:
        the images, categories and annotations that are as they should be.

    Raises:
        FileNotFoundError: the file or the folder does not exist.
        ValueError: the file cannot be read, or is no JSON object.
    """
    if not os.path.exists(json_file):
        raise FileNotFoundError(
            f"dataset '{name}': {json_file} does not exist; give the path of annotations in COCO's format"
        )
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"dataset '{name}': the image folder {image_root} does not exist; give the folder that the "
            f"file_name entries of {json_file} are relative to"
        )
    twice: list[str] = []
    try:
        content = read_json(json_file, lambda pairs: _object(pairs, twice), "utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset '{name}': {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"dataset '{name}': {json_file} holds a {type(content).__name__}, not an object with the keys "
            f"{', '.join(_FIELDS)}; a list of detections is a results file, not annotations"
        )
    if twice:
        findings.add(WARNING, f"{len(twice)} keys are given more than once, the last counts: {first(twice)}")
    images, categories, annotations = (_sound_records(findings, content, section) for section in _FIELDS)
    annotations = _placed(findings, images, categories, annotations)
    _check_image_files(findings, image_root, images)
    return images, categories, annotations


def find_degenerate(findings: Findings, images: list[dict], annotations: list[dict]) -> set[int]:
    """Check masks, and that of boxes and masks something is left inside of the image.

    An instance that loses some of its polygons and keeps others is degenerate, but not dropped.

    Args:
        findings: to which what is wrong is added.
        images, annotations: of `read_records`.

    Returns:
        the ids of the annotations to leave out, those with errors among them.
    """
    images_by_id = {image["id"]: image for image in images}
    faults: dict[str, list[str]] = defaultdict(list)
    degenerate: dict[int, str] = {}
    dropped: set[int] = set()
    without_mask: list[int] = []
    for annotation in annotations:
        key, image, problem = annotation["id"], images_by_id[annotation["image_id"]], ""
        x, y, width, height = annotation["bbox"]
        # Detectron2 clips boxes to the image and then throws the empty ones away without a word.
        sides = min(x + width, image["width"]) - max(x, 0), min(y + height, image["height"]) - max(y, 0)
        if min(sides) <= MIN_BOX_SIDE:
            problem = f"bbox {annotation['bbox']} is empty or outside the image"
            dropped.add(key)
        if segmentation := annotation.get("segmentation"):
            try:
                mask_problem, is_left = _mask_problem(segmentation, image)
            except ValueError as error:
                fault, found = error.args
                faults[fault].append(f"id {key} ({found}, image {image['file_name']})")
                dropped.add(key)
                continue
            problem = problem or mask_problem
            if not is_left:
                dropped.add(key)
        elif not problem:
            without_mask.append(key)
        if problem:
            degenerate[key] = f"{problem}, image {image['file_name']}"
    for fault, names in faults.items():
        findings.add_share(ERROR, names, len(annotations), f"annotations have a 'segmentation' {fault}")
    allowed = int(MAX_DEGENERATE_SHARE * len(annotations))
    if 0 < len(without_mask) <= allowed:
        # Where nearly all instances have masks, the few without are slips; where many have none, that
        # is how the set was made, and only MODEL.MASK_ON can say whether it matters.
        degenerate.update(dict.fromkeys(without_mask, "no segmentation"))
        dropped.update(without_mask)
    names = [f"id {key} ({problem})" for key, problem in degenerate.items()]
    if len(degenerate) > allowed:
        hint = f"more than {MAX_DEGENERATE_SHARE:.0%}: correct them or remove them from the file"
        findings.add_share(ERROR, names, len(annotations), "instances are degenerate", hint)
    else:
        hint = f"{len(dropped)} are left out of training and evaluation, the others keep their valid polygons"
        findings.add_share(WARNING, names, len(annotations), "instances are degenerate", hint)
    return dropped


def is_valid_polygon(polygon: list[float]) -> bool:
    """Whether a flat list x0, y0, x1, y1, … has at least three points (what ``load_coco_json`` keeps)."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def run_lengths(counts: Any) -> list[int] | None:
    """The lengths of a run-length encoding, compressed (text) or not (a list); None if it is damaged.

    COCO's text has digits of five bits, the lowest first, as characters from "0" on; bit 5 says that another
    one follows, bit 4 of the last one is the sign. From the fourth on, lengths are differences to the last
    but one. pycocotools reads it without looking: over the end of a damaged text, or for ever.
    """
    runs: list[int] = []
    if isinstance(counts, str):
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
        if shift:
            return None
    elif isinstance(counts, list):
        runs = counts
    return runs if runs and all(type(run) is int and run >= 0 for run in runs) else None


def _object(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    """A JSON object; keys that it has more than once are added to ``twice``."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        of = f" of id {short_repr(record['id'])}" if "id" in record else ""
        twice += [f"'{key}'{of}" for key, count in counts.items() if count > 1]
    return record


def _sound_records(findings: Findings, content: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """The records of a section that follow its rules."""
    records, fields = content.get(section), _FIELDS[section]
    if not (isinstance(records, list) and records):
        found = "empty" if records == [] else f"a {type(records).__name__}"
        found = found if section in content else f"missing, there are {', '.join(content) or 'no keys'}"
        findings.add(ERROR, f"'{section}' is {found}; COCO's format has a list of at least one record")
        return []
    sound, offenders = [], defaultdict(list)
    for index, record in enumerate(records):
        name = f"{section}[{index}]"
        if not isinstance(record, dict):
            offenders["are not objects"].append(f"{name} ({short_repr(record)})")
            continue
        wrong = [
            (key, form)
            for key, (form, is_valid) in fields.items()
            if not (is_valid(record[key]) if key in record else key in _OPTIONAL)
        ]
        for key, form in wrong:
            found = short_repr(record[key]) if key in record else "missing"
            offenders[f"have no '{key}' that is {form}"].append(f"{name} ({found})")
        if not wrong:
            sound.append(record)
    for what, names in offenders.items():
        findings.add_share(ERROR, names, len(records), f"{section} {what}")
    return sound


def _placed(
    findings: Findings, images: list[dict], categories: list[dict], annotations: list[dict]
) -> list[dict]:
    """The annotations of images and categories that are listed; ids and class names must be unique."""
    for section, records in (("images", images), ("categories", categories), ("annotations", annotations)):
        counts = Counter(record["id"] for record in records)
        twice = [short_repr(key) for key, count in counts.items() if count > 1]
        findings.add_share(ERROR, twice, len(records), f"ids of '{section}' are given more than once")
    counts = Counter(category["name"] for category in categories)
    twice = [name for name, count in counts.items() if count > 1]
    hint = "results could not tell them apart: rename them, or make them one"
    findings.add_share(ERROR, twice, len(categories), "class names are given more than once", hint)
    total = len(annotations)
    for key, section, records in (("image_id", "images", images), ("category_id", "categories", categories)):
        known = {record["id"] for record in records}
        lost = [f"id {a['id']} ({a[key]})" for a in annotations if a[key] not in known]
        what = f"annotations have a '{key}' that '{section}' lacks"
        findings.add_share(ERROR, lost, total, what, f"add the {section}, or remove these annotations")
        annotations = [annotation for annotation in annotations if annotation[key] in known]
    return annotations


def _check_image_files(findings: Findings, image_root: str, images: list[dict]) -> None:
    # One listing per folder: a stat of each of 118k images takes minutes on network file systems.
    listings: dict[str, set[str]] = {}
    missing = []
    for image in images:
        folder, file_name = os.path.split(os.path.join(image_root, image["file_name"]))
        if folder not in listings:
            listings[folder] = _files_in(folder)
        if file_name not in listings[folder]:
            missing.append(image["file_name"])
    what, hint = f"images are not files in {image_root}", "check the image folder"
    findings.add_share(ERROR, missing, len(images), what, hint, FileNotFoundError)


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # a name with a null character
        return set()


def _mask_problem(segmentation: Any, image: dict) -> tuple[str, bool]:
    """Why a segmentation is degenerate, if it is, and whether a usable part of it is left.

    Raises:
        ValueError: it is neither polygons nor a run-length encoding of the image's size; with what is wrong,
            and what was found.
    """
    height, width = image["height"], image["width"]
    if isinstance(segmentation, dict):
        size, runs = segmentation.get("size"), run_lengths(segmentation.get("counts"))
        if size != [height, width] or not all(type(side) is int for side in size):
            raise ValueError("whose 'size' is not its image's [height, width]", short_repr(size))
        if runs is None or sum(runs) != height * width:
            raise ValueError("whose 'counts' are damaged or do not cover the image", "run-length encoding")
        return ("", True) if any(runs[1::2]) else ("empty mask", False)
    if not isinstance(segmentation, list) or not all(type(polygon) is list for polygon in segmentation):
        raise ValueError(
            "that is neither a list of polygons [[x0, y0, x1, y1, …], …] nor a run-length encoding "
            '{"size": …, "counts": …}',
            short_repr(segmentation),
        )
    limit = _FARTHEST * max(height, width)
    for polygon in segmentation:
        if not are_numbers(polygon, limit):
            wrong = next((x for x in polygon if not are_numbers([x], limit)), polygon)
            raise ValueError(
                "with a coordinate that is not a number of pixels, or far outside of its image",
                f"{short_repr(wrong)} for {width}x{height} pixels",
            )
    num_valid = sum(map(is_valid_polygon, segmentation))
    if num_valid == len(segmentation):
        return "", True
    return "polygon with fewer than three points or an odd number of coordinates", num_valid > 0


def _is_extreme(shorter: int, longer: int) -> bool:
    return longer > _EXTREME_SIDE or longer > _EXTREME_RATIO * shorter
