"""What ``rev-det data check`` finds beyond what training checks: of every image, of places, of two sets."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from .annotations import find_degenerate, is_valid_polygon, read_records, run_lengths
from .findings import ERROR, NOTE, WARNING, Finding, Findings, first
from .images import read_rgb

# Pixels that a box or mask may reach over the border, as rounding does.
_BORDER = 1.0
# A mask's extent may differ from its box by this many pixels, or this share of the box's side.
_EXTENT_PIXELS, _EXTENT_SHARE = 3.0, 0.1


@dataclass
class DataReport:
    """What was found in a data set.

    Attributes:
        name: of the data set.
        findings: the worst first.
        num_images, num_instances: that could be read in the annotations.
        classes: id and name of each, by rising id.
        files: file names by content: a digest of the pixels.
    """

    name: str
    findings: list[Finding]
    num_images: int
    num_instances: int
    classes: list[tuple[int, str]]
    files: dict[str, list[str]] = field(default_factory=dict)


def check_data(
    name: str,
    json_file: str,
    image_root: str,
    progress: Callable[..., Iterable] = lambda images, total: images,
) -> DataReport:
    """Examine annotations and every image of a data set.

    Args:
        name: what the report calls it.
        json_file: annotations in COCO's instances format.
        image_root: the folder that the images' ``file_name`` are relative to.
        progress: shows how far a loop is, as ``tqdm`` does.

    Raises:
        FileNotFoundError: the annotations or the folder do not exist.
        ValueError: the annotations are no JSON object.
    """
    findings = Findings()
    images, categories, annotations = read_records(findings, name, json_file, image_root)
    classes = sorted((category["id"], category["name"]) for category in categories)
    degenerate = find_degenerate(findings, images, annotations)
    if annotations and all(annotation.get("iscrowd") for annotation in annotations):
        findings.add(ERROR, "all annotations are crowd regions ('iscrowd' is 1), which are not trained on")
    counts = Counter(annotation["category_id"] for annotation in annotations)
    empty = [category for key, category in classes if not counts[key]]
    findings.add_share(WARNING, empty, len(classes), "classes have no instances")
    if annotations and not any(annotation.get("segmentation") for annotation in annotations):
        findings.add(NOTE, "no instance has a mask: train with MODEL.MASK_ON False")
    placed = [annotation for annotation in annotations if annotation["id"] not in degenerate]
    _check_places(findings, {image["id"]: image for image in images}, placed)
    annotated = {annotation["image_id"] for annotation in annotations}
    bare = [image["file_name"] for image in images if image["id"] not in annotated]
    findings.add_share(NOTE, bare, len(images), "images have no instances", "training leaves them out")
    listed = Counter(image["file_name"] for image in images)
    twice = [name for name, count in listed.items() if count > 1]
    findings.add_share(WARNING, twice, len(images), "files are listed more than once")
    files = _check_pixels(findings, image_root, images, progress)
    findings.sort(key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))
    return DataReport(name, findings, len(images), len(annotations), classes, files)


def check_overlap(one: DataReport, other: DataReport) -> list[Finding]:
    """What two data sets of one training must not share, and what they must.

    Args:
        one, other: of `check_data`; which is for training does not matter.
    """
    findings = Findings()
    shared = {digest: names for digest, names in other.files.items() if digest in one.files}
    pairs = [f"{name} = {one.files[digest][0]}" for digest, names in shared.items() for name in names]
    what = f"images of '{other.name}' are also in '{one.name}'"
    hint = "what is measured on one after training on the other means nothing"
    findings.add_share(ERROR, pairs, other.num_images, what, hint)
    if differing := sorted({name for _, name in {*one.classes} ^ {*other.classes}}):
        classes = f"differ in their classes or ids: {first(differing)}"
        findings.add(ERROR, f"'{one.name}' and '{other.name}' {classes}")
    return findings


def _check_places(findings: Findings, images: dict[int, dict], annotations: list[dict]) -> None:
    """Check where boxes and masks are."""
    if not annotations:
        return
    if max(max(annotation["bbox"]) for annotation in annotations) <= 1:
        findings.add(ERROR, "all boxes lie between 0 and 1: COCO's are in pixels, [x, y, width, height]")
        return
    total, names = len(annotations), np.array([f"id {annotation['id']}" for annotation in annotations])
    sides = [(images[a["image_id"]]["width"], images[a["image_id"]]["height"]) for a in annotations]
    limits = np.tile(np.array(sides, float), 2)
    boxes = np.array([annotation["bbox"] for annotation in annotations], float)
    boxes[:, 2:] += boxes[:, :2]
    extents = np.array([_mask_extent(annotation.get("segmentation")) for annotation in annotations])
    hint = "is 'bbox' [x, y, width, height], and of the same image size?"
    inside = []
    for what, places in (("boxes", boxes), ("masks", extents)):
        inside.append(places.clip(0, limits))
        over = np.abs(places - inside[-1]).max(1)  # NaN of annotations without a mask
        outside = over > _BORDER
        many = hint if outside.sum() > 0.1 * total else "what is outside is cut off"
        worst = f"reach outside their image, by up to {over[outside].max(initial=0):.0f} pixels"
        findings.add_share(WARNING, names[outside].tolist(), total, f"{what} {worst}", many)
    box, mask = inside
    tolerance = np.maximum(_EXTENT_PIXELS, _EXTENT_SHARE * np.tile(box[:, 2:] - box[:, :2], 2))
    crowds = np.array([bool(annotation.get("iscrowd")) for annotation in annotations])
    apart = (np.abs(box - mask) > tolerance).any(1) & ~crowds
    what = "masks and boxes are not of the same place"
    findings.add_share(WARNING, names[apart].tolist(), total, what, hint if apart.sum() > 0.1 * total else "")
    same = defaultdict(list)
    for annotation, name in zip(annotations, names, strict=True):
        same[(annotation["image_id"], annotation["category_id"], *annotation["bbox"])].append(name)
    twice = [" = ".join(group) for group in same.values() if len(group) > 1]
    findings.add_share(WARNING, twice, total, "instances have the class and box of another")


def _mask_extent(segmentation: list | dict | None) -> list[float]:
    """x0, y0, x1, y1 of a mask that is not empty; NaN without a mask."""
    if not segmentation:
        return [np.nan] * 4
    if isinstance(segmentation, list):
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation if is_valid_polygon(p)])
        return [*points.min(0), *points.max(0)]
    # Runs go down the columns; one that goes on in the next column has the whole height.
    height, ends = segmentation["size"][0], list(accumulate(run_lengths(segmentation["counts"])))
    runs = [(a, b - 1) for a, b in zip(ends[::2], ends[1::2], strict=False) if a < b]
    whole = any(a // height != b // height for a, b in runs)
    top = 0 if whole else min(a % height for a, _ in runs)
    bottom = height if whole else max(b % height for _, b in runs) + 1
    return [runs[0][0] // height, top, runs[-1][1] // height + 1, bottom]


def _check_pixels(
    findings: Findings, image_root: str, images: list[dict], progress: Callable[..., Iterable]
) -> dict[str, list[str]]:
    """Decode all images; file names by content."""
    files, broken, sizes = defaultdict(list), [], []
    paths = [os.path.join(image_root, image["file_name"]) for image in images]
    # Decoding leaves Python's lock alone, so that threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = progress(pool.map(_examine, paths), total=len(paths))
        for image, (digest, size, problem) in zip(images, results, strict=True):
            name, expected = image["file_name"], (image["width"], image["height"])
            if problem:
                broken.append(f"{name} ({problem})")
            elif digest:
                files[digest].append(name)
                if size != expected:
                    sizes.append("{} ({}x{}, not {}x{})".format(name, *size, *expected))
    findings.add_share(ERROR, broken, len(images), "images cannot be decoded")
    findings.add_share(ERROR, sizes, len(images), "images have another size than their annotations say")
    same = [" = ".join(dict.fromkeys(names)) for names in files.values() if len(set(names)) > 1]
    findings.add_share(WARNING, same, len(images), "images have the same content under several names")
    return dict(files)


def _examine(path: str) -> tuple[str, tuple[int, int], str]:
    """A digest of an image's pixels, its width and height, and why it cannot be read if it is a file."""
    try:
        image = read_rgb(path)
    except ValueError as error:
        return "", (0, 0), str(error) if os.path.isfile(path) else ""
    height, width = image.shape[:2]
    digest = hashlib.sha256(f"{height} {width} ".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    return digest, (width, height), ""
