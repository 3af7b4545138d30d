"""All that is wrong with COCO-format data, and how bad it is; `validation` stops at the first thing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..files import read_json
from .images import read_rgb
from .validation import MIN_BOX_SIDE, NUM_NAMED, are_numbers, check_coco_json, is_valid_polygon

# Training stops, or its result means nothing; training goes on, but hardly as it was meant; worth knowing.
ERROR, WARNING, NOTE = "error", "warning", "note"
# How `validation` words what is counted here, too.
_COUNTED = ("has duplicate ids", "class names are given", "annotations have a '", "check the image folder")
# Pixels that a box or mask may reach over the border, as rounding does.
_BORDER = 1.0
# A mask's extent may differ from its box by this many pixels, or this share of the box's side.
_EXTENT_PIXELS, _EXTENT_SHARE = 3.0, 0.1


@dataclass(frozen=True)
class Finding:
    """Something about a data set.

    Attributes:
        severity: `ERROR`, `WARNING` or `NOTE`.
        text: what it is, how often, and the first that have it.
    """

    severity: str
    text: str


@dataclass
class DataReport:
    """What was found in a data set.

    Attributes:
        name: of the data set.
        findings: the worst first.
        num_images, num_instances, num_classes: that could be read in the annotations.
        classes: id and name of each, by rising id.
        files: file names by content: a digest of the pixels.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    num_images: int = 0
    num_instances: int = 0
    classes: tuple[tuple[int, str], ...] = ()
    files: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def add(self, severity: str, text: str) -> None:
        self.findings.append(Finding(severity, text))

    def add_share(
        self, severity: str, offenders: Sequence[str], total: int, what: str, hint: str = ""
    ) -> None:
        """Something that ``offenders`` of ``total`` have; nothing if there are none."""
        if offenders:
            percent = 100 * len(offenders) / total
            share = f"{len(offenders)} of {total} ({percent:{'.2g' if percent < 99.5 else '.0f'}} %)"
            self.add(severity, f"{share} {what}: {_first(offenders)}{f'; {hint}' if hint else ''}")


def check_data(
    name: str, json_file: str, image_root: str, done: Callable[[int, int], None] = lambda count, total: None
) -> DataReport:
    """Examine annotations and every image of a data set.

    Args:
        name: what the report calls it.
        json_file: annotations in COCO's instances format.
        image_root: the folder that the images' ``file_name`` are relative to.
        done: is told how many images were looked at so far, and how many there are.

    Raises:
        FileNotFoundError: the annotations or the folder do not exist.
        ValueError: the annotations are no JSON object.
    """
    report = DataReport(name)
    refusal = _refusal(name, json_file, image_root)
    content = _read(json_file)
    images, categories, annotations = (
        _records(content, "images", {"id": int, "file_name": str, "height": int, "width": int}),
        _records(content, "categories", {"id": int, "name": str}),
        _records(content, "annotations", {"id": int, "image_id": int, "category_id": int, "bbox": list}),
    )
    report.num_images, report.num_instances = len(images), len(annotations)
    report.classes = tuple(sorted((category["id"], category["name"]) for category in categories))
    for section, records in (("images", images), ("categories", categories), ("annotations", annotations)):
        twice = [str(key) for key, count in Counter(r["id"] for r in records).items() if count > 1]
        report.add_share(ERROR, twice, len(records), f"ids of '{section}' are given more than once")
    _check_classes(report, categories, annotations)
    _check_annotations(report, {image["id"]: image for image in images}, annotations)
    _check_images(report, image_root, images, annotations, done)
    counted = any(words in refusal for words in _COUNTED) and any(
        f.severity == ERROR for f in report.findings
    )
    if refusal and not counted:
        report.findings.insert(0, Finding(ERROR, f"training refuses these data: {refusal}"))
    order = (ERROR, WARNING, NOTE)
    report.findings.sort(key=lambda finding: order.index(finding.severity))
    return report


def check_overlap(one: DataReport, other: DataReport) -> list[Finding]:
    """What two data sets of one training must not share, and what they must.

    Args:
        one, other: of `check_data`; which is for training does not matter.
    """
    report = DataReport("")
    shared = {digest: names for digest, names in other.files.items() if digest in one.files}
    pairs = [f"{name} = {one.files[digest][0]}" for digest, names in shared.items() for name in names]
    report.add_share(
        ERROR,
        pairs,
        max(1, other.num_images),
        f"images of '{other.name}' are also in '{one.name}'",
        "what is measured on one after training on the other means nothing",
    )
    if one.classes != other.classes:
        differing = sorted({name for _, name in set(one.classes) ^ set(other.classes)})
        report.add(
            ERROR, f"'{one.name}' and '{other.name}' differ in their classes or ids: {_first(differing)}"
        )
    return report.findings


def _refusal(name: str, json_file: str, image_root: str) -> str:
    """Why training would refuse the data; empty if it would not."""
    for path, exists in ((json_file, os.path.isfile), (image_root, os.path.isdir)):
        if not exists(path):
            raise FileNotFoundError(f"dataset '{name}': {path} does not exist")
    try:
        check_coco_json(name, json_file, image_root)
    except (ValueError, FileNotFoundError) as error:
        return str(error).removeprefix(f"dataset '{name}': ").removeprefix(f"{json_file}: ")
    return ""


def _read(json_file: str) -> dict[str, Any]:
    content = read_json(json_file)
    if not isinstance(content, dict):
        raise ValueError(f"{json_file} holds a {type(content).__name__}, not annotations in COCO's format")
    return content


def _records(content: dict[str, Any], section: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The records of a section that have what further checks need."""
    records = content.get(section)
    return [
        record
        for record in (records if isinstance(records, list) else ())
        if isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in fields.items())
    ]


def _check_classes(report: DataReport, categories: list[dict], annotations: list[dict]) -> None:
    counts = Counter(annotation["category_id"] for annotation in annotations)
    names = Counter(category["name"] for category in categories)
    empty = [category["name"] for category in categories if not counts[category["id"]]]
    report.add_share(WARNING, empty, len(categories), "classes have no instances")
    twice = [name for name, count in names.items() if count > 1]
    report.add_share(ERROR, twice, len(categories), "class names are given more than once")
    known = {category["id"] for category in categories}
    lost = [f"id {a['id']} ({a['category_id']})" for a in annotations if a["category_id"] not in known]
    report.add_share(ERROR, lost, len(annotations), "instances are of a class that is not listed")


def _check_annotations(report: DataReport, images: dict[int, dict], annotations: list[dict]) -> None:
    total = len(annotations)
    if annotations and not any(a.get("segmentation") for a in annotations):
        report.add(NOTE, "no instance has a mask: train with MODEL.MASK_ON False")
    placed = [a for a in annotations if a["image_id"] in images]
    lost = [f"id {a['id']} ({a['image_id']})" for a in annotations if a["image_id"] not in images]
    report.add_share(ERROR, lost, total, "instances are of an image that is not listed")
    placed = [a for a in placed if _is_box(a["bbox"])]
    if placed and max(max(a["bbox"]) for a in placed) <= 1.0:
        report.add(ERROR, "all boxes lie between 0 and 1: COCO's are in pixels, [x, y, width, height]")
        return
    empty, outside, masks, apart = [], [], [], []
    worst = {"boxes": 0.0, "masks": 0.0}
    for annotation in placed:
        image, name = images[annotation["image_id"]], f"id {annotation['id']}"
        x, y, width, height = annotation["bbox"]
        box = (x, y, x + width, y + height)
        inside = _clip(box, image)
        if min(inside[2] - inside[0], inside[3] - inside[1]) <= MIN_BOX_SIDE:
            empty.append(name)
            continue
        if (over := _overshoot(box, image)) > _BORDER:
            outside.append(name)
            worst["boxes"] = max(worst["boxes"], over)
        extent = _mask_extent(annotation.get("segmentation"), image)
        if extent is None:
            continue
        if (over := _overshoot(extent, image)) > _BORDER:
            masks.append(name)
            worst["masks"] = max(worst["masks"], over)
        if not annotation.get("iscrowd") and _differ(inside, _clip(extent, image)):
            apart.append(name)
    report.add_share(WARNING, empty, total, "boxes are empty or wholly outside their image")
    hint = "is 'bbox' [x, y, width, height]?" if len(outside) > 0.1 * total else ""
    over = f"reach outside their image, by up to {worst['boxes']:.0f} pixels"
    report.add_share(WARNING, outside, total, f"boxes {over}", hint)
    over = f"reach outside their image, by up to {worst['masks']:.0f} pixels"
    report.add_share(WARNING, masks, total, f"masks {over}", "what is outside is cut off")
    hint = "is 'bbox' [x, y, width, height], and of the same image size?" if len(apart) > 0.1 * total else ""
    report.add_share(WARNING, apart, total, "masks and boxes are not of the same place", hint)
    same = defaultdict(list)
    for a in placed:
        same[(a["image_id"], a["category_id"], *a["bbox"])].append(f"id {a['id']}")
    twice = [" = ".join(names) for names in same.values() if len(names) > 1]
    report.add_share(WARNING, twice, total, "instances have the class and box of another")


def _check_images(
    report: DataReport,
    image_root: str,
    images: list[dict],
    annotations: list[dict],
    done: Callable[[int, int], None],
) -> None:
    total = len(images)
    annotated = {annotation["image_id"] for annotation in annotations}
    bare = [image["file_name"] for image in images if image["id"] not in annotated]
    report.add_share(NOTE, bare, total, "images have no instances", "training leaves them out")
    missing, broken, sizes = [], [], []
    files = defaultdict(list)
    # Decoding leaves Python's lock alone, so that threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = [os.path.join(image_root, image["file_name"]) for image in images]
        results = pool.map(_examine, paths, images)
        for number, (image, (digest, problem)) in enumerate(zip(images, results, strict=True), 1):
            done(number, total)
            name = image["file_name"]
            if digest:
                files[digest].append(name)
                sizes += [f"{name} ({problem})"] if problem else []
            elif problem:
                broken.append(f"{name} ({problem})")
            else:
                missing.append(name)
    report.files = dict(files)
    report.add_share(ERROR, missing, total, "images do not exist", f"is {image_root} their folder?")
    report.add_share(ERROR, broken, total, "images cannot be decoded")
    report.add_share(ERROR, sizes, total, "images have another size than their annotations say")
    listed = Counter(image["file_name"] for image in images)
    twice = [name for name, count in listed.items() if count > 1]
    report.add_share(WARNING, twice, total, "files are listed more than once")
    same = [" = ".join(dict.fromkeys(names)) for names in files.values() if len(set(names)) > 1]
    report.add_share(WARNING, same, total, "images have the same content under several names")


def _examine(path: str, record: dict) -> tuple[str, str]:
    """A digest of an image's pixels, and what is wrong: both are empty if there is no such file."""
    if not os.path.isfile(path):
        return "", ""
    try:
        image = read_rgb(path)
    except ValueError as error:
        return "", str(error)
    height, width = image.shape[:2]
    digest = hashlib.sha256(f"{height} {width} ".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    if (height, width) == (record["height"], record["width"]):
        return digest, ""
    return digest, f"{width}x{height}, not {record['width']}x{record['height']}"


def _is_box(box: list) -> bool:
    return len(box) == 4 and are_numbers(box)


def _mask_extent(segmentation: Any, image: dict) -> tuple[float, float, float, float] | None:
    """x0, y0, x1, y1 of a mask; None if there is none that can be read."""
    try:
        if isinstance(segmentation, dict):
            size, counts = segmentation["size"], segmentation["counts"]
            if list(size) != [image["height"], image["width"]]:
                return None  # `validation` names it
            rle = mask_util.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation
            x, y, width, height = mask_util.toBbox(rle).tolist()
            return (x, y, x + width, y + height) if width and height else None
        points = [np.asarray(p, float).reshape(-1, 2) for p in segmentation or () if is_valid_polygon(p)]
    except (ValueError, TypeError, KeyError):
        return None
    if not points:
        return None
    stacked = np.concatenate(points)
    return (*stacked.min(0).tolist(), *stacked.max(0).tolist())


def _clip(box: Iterable[float], image: dict) -> tuple[float, ...]:
    limits = (image["width"], image["height"]) * 2
    return tuple(min(max(value, 0.0), limit) for value, limit in zip(box, limits, strict=True))


def _overshoot(box: tuple[float, ...], image: dict) -> float:
    return max(-box[0], -box[1], box[2] - image["width"], box[3] - image["height"])


def _differ(box: tuple[float, ...], extent: tuple[float, ...]) -> bool:
    sides = (box[2] - box[0], box[3] - box[1]) * 2
    return any(
        abs(a - b) > max(_EXTENT_PIXELS, _EXTENT_SHARE * side)
        for a, b, side in zip(box, extent, sides, strict=True)
    )


def _first(items: Sequence[str]) -> str:
    more = len(items) - NUM_NAMED
    return ", ".join(items[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
