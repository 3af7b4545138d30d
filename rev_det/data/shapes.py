"""A generated COCO-format dataset of simple shapes: something to train on without a download."""

from __future__ import annotations

import colorsys
import json
import logging
import os
import shutil
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock

from ..files import write_json

logger = logging.getLogger(__name__)

# Part of every set's stamp: to be raised whenever the drawing changes, so that old sets are drawn anew.
_VERSION = 3
CLASSES = ("circle", "square", "triangle")
# Middle of each class's range of hues: red to yellow, green to cyan, blue to magenta. Colour is a hint, so
# that a thousand iterations suffice to learn the shapes.
_HUES, _HUE_RANGE = (0.06, 0.41, 0.74), 0.13
_NUM_IMAGES = {"train": 400, "val": 80}

# Longest side of a shape, as a share of the image's side.
_MIN_EXTENT, _MAX_EXTENT = 0.18, 0.95
# A shape may not hide more of an earlier one than this leaves visible: slivers have no class.
_MIN_VISIBLE = 0.5
_HOLE_PROBABILITY = 0.12
# Shapes are drawn this many times larger and then averaged: soft edges, and masks true to half a pixel.
_SUPERSAMPLE = 4


@dataclass
class _Region:
    """One annotated region: class index, visible pixels (H, W) bool, pixels before occlusion."""

    category: int
    visible: np.ndarray
    full_area: int


def generate_shapes(
    root: str, split: str, num_images: int | None = None, size: int = 128, seed: int = 0
) -> tuple[str, str]:
    """Draw a set of shapes in COCO's instances format, unless it is already there.

    Discs, rectangles and triangles of all sizes overlap on cloudy backgrounds; what is hidden does not belong
    to the masks. Regions without holes are polygons, those with holes run-length encodings. The same
    arguments give the same set; each image depends on the seed, the split and its own number alone.

    The set appears under its final name only when it is complete, and processes that ask for it at the
    same time wait for the one that draws. A set drawn with other arguments is replaced.

    Args:
        root: folder of the sets; made if missing.
        split: the set's folder in ``root``.
        num_images: how many images; by default 400, for the split "val" 80.
        size: height and width of the images in pixels, at least 64.
        seed: a number from 0 on.

    Returns:
        the paths of the annotations and of the folder with the images.

    Raises:
        ValueError: an argument is out of range, the set cannot be written, or the folder exists and was
            not generated.
    """
    if num_images is None:
        num_images = _NUM_IMAGES.get(split, _NUM_IMAGES["train"])
    if num_images < 1 or size < 64 or seed < 0:
        raise ValueError(
            f"shapes: num_images is {num_images}, size {size}, seed {seed}; they must be at least 1, 64 and 0"
        )
    folder = os.path.join(root, split)
    stamp = {"version": _VERSION, "split": split, "num_images": num_images, "size": size, "seed": seed}
    # Complete sets never change, so no lock is needed to look; nor is write permission then.
    if _read_stamp(folder) != stamp:
        try:
            with file_lock(folder):
                if _read_stamp(folder) != stamp:
                    _write_set(folder, stamp)
        except OSError as error:
            raise ValueError(
                f"cannot write the generated shapes to {folder}: {error}; make it writable, or set the "
                "environment variable DETECTRON2_DATASETS to a folder that is"
            ) from error
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _read_stamp(folder: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(folder, "stamp.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _write_set(folder: str, stamp: dict[str, Any]) -> None:
    """Draw into a folder beside the final one, then rename. The caller holds the lock."""
    if os.path.lexists(folder) and _read_stamp(folder) is None:
        raise ValueError(
            f"{folder} exists, but rev_det did not generate it; move it away, or set DETECTRON2_DATASETS"
        )
    logger.info("Drawing %d images of shapes into %s", stamp["num_images"], folder)
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    os.makedirs(os.path.join(partial, "images"))
    try:
        write_json(os.path.join(partial, "annotations.json"), _draw_set(partial, stamp), indent=None)
        write_json(os.path.join(partial, "stamp.json"), stamp)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _draw_set(folder: str, stamp: dict[str, Any]) -> dict[str, Any]:
    """Write the images; return the annotations in COCO's format."""
    images, annotations, size = [], [], stamp["size"]
    for number in range(1, stamp["num_images"] + 1):
        rng = np.random.default_rng([stamp["seed"], zlib.crc32(stamp["split"].encode()), number - 1])
        pixels, regions = _draw_image(rng, size)
        name = f"{number:06d}.jpg"
        # OpenCV's channel order is BGR. Encoding and writing apart: imwrite hides why it failed.
        _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        with open(os.path.join(folder, "images", name), "wb") as file:
            file.write(data.tobytes())
        images.append({"id": number, "file_name": name, "height": size, "width": size, "license": 1})
        for region in regions:
            annotations.append({"id": len(annotations) + 1, "image_id": number} | _annotation(region))
    return {
        "info": {"description": "Shapes generated by rev_det", **stamp},
        "licenses": [
            {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
        ],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n, "supercategory": "shape"} for i, n in enumerate(CLASSES, 1)],
    }


def _draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[_Region]]:
    """Pixels (size, size, 3), RGB uint8, and what to annotate, from back to front."""
    # Dull clouds, and grain.
    coarse = rng.uniform(size=(6, 6, 1)).astype(np.float32)
    dark, light = (rng.uniform(*grey) + rng.uniform(-15, 15, 3) for grey in ((40, 90), (110, 160)))
    clouds = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]
    canvas = dark + clouds * (light - dark) + rng.normal(0, rng.uniform(2, 12), (size, size, 3))
    regions: list[_Region] = []
    extents = np.exp(rng.uniform(np.log(_MIN_EXTENT), np.log(_MAX_EXTENT), rng.integers(1, 5)))
    # Large ones first: behind, or little would be left of the small ones.
    for extent in np.sort(extents)[::-1] * size:
        category = int(rng.integers(len(CLASSES)))
        hue = _HUES[category] + rng.uniform(-_HUE_RANGE, _HUE_RANGE)
        colour = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1), rng.uniform(0.7, 1)))
        for _ in range(20):  # places that may hide too much of the others
            alpha = _coverage(rng, size, category, extent)
            mask = alpha >= 0.5
            if all((region.visible & ~mask).sum() >= _MIN_VISIBLE * region.full_area for region in regions):
                canvas += alpha[..., None] * (colour + rng.normal(0, 6, canvas.shape) - canvas)
                for region in regions:
                    region.visible &= ~mask
                regions.append(_Region(category, mask, int(mask.sum())))
                break
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), regions


def _coverage(rng: np.random.Generator, size: int, category: int, extent: float) -> np.ndarray:
    """How much a shape of ``extent`` pixels, at a random place, covers each pixel: (size, size) float32."""
    outline = extent * _outline(rng, category)
    # Borders of the image may cut a little off.
    centre = rng.uniform(0.4 * extent, size - 0.4 * extent, size=2)
    rings = [outline + centre]
    if rng.uniform() < _HOLE_PROBABILITY and extent > 0.25 * size:
        rings.append(outline * rng.uniform(0.35, 0.5) + centre)
    large = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), np.uint8)
    # fillPoly takes pixel centres for integers; our coordinates are continuous, 0 at the image's edge.
    cv2.fillPoly(large, [np.rint(ring * _SUPERSAMPLE - 0.5).astype(np.int32) for ring in rings], 1)
    return cv2.resize(large.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)


def _outline(rng: np.random.Generator, category: int) -> np.ndarray:
    """The corners of a shape around the origin, at most 1 wide and high before it is turned, (N, 2)."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    corners = {
        "circle": 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1),
        "square": np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]),
        # The centroid at the origin, so that a hole is in the middle.
        "triangle": np.array([[-0.5, 1 / 3], [0.5, 1 / 3], [rng.uniform(-0.2, 0.2), -2 / 3]]),
    }[CLASSES[category]]
    turn = rng.uniform(-np.pi / 9, np.pi / 9) + rng.integers(4) * np.pi / 2
    cos, sin = np.cos(turn), np.sin(turn)
    return corners * [1, rng.uniform(0.75, 1)] @ np.array([[cos, sin], [-sin, cos]])


def _annotation(region: _Region) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(region.visible, np.uint8))
    return {
        "category_id": region.category + 1,
        "bbox": mask_util.toBbox(rle).astype(int).tolist(),
        "area": int(mask_util.area(rle)),
        "segmentation": _polygons(region.visible)
        or {"size": list(region.visible.shape), "counts": rle["counts"].decode()},
        "iscrowd": 0,
    }


def _polygons(mask: np.ndarray) -> list[list[float]] | None:
    """One for each part; None where the mask has holes."""
    # Contours run through pixel centres. On the enlarged mask these are close to the pixels' outer
    # edges, where COCO's continuous coordinates have the border.
    large = np.kron(mask, np.ones((_SUPERSAMPLE, _SUPERSAMPLE))).astype(np.uint8)
    contours, hierarchy = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # Half a pixel of tolerance turns the staircase back into straight edges.
    polygons = [cv2.approxPolyDP(contour, 0.5 * _SUPERSAMPLE, closed=True) for contour in contours]
    if (hierarchy[0, :, 3] >= 0).any() or any(len(polygon) < 3 for polygon in polygons):
        return None
    return [np.round((polygon.reshape(-1) + 0.5) / _SUPERSAMPLE, 2).tolist() for polygon in polygons]
