"""A generated COCO-format dataset of simple shapes: something to train on without a download."""

from __future__ import annotations

import colorsys
import functools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock

logger = logging.getLogger(__name__)

# Part of every set's stamp: to be raised whenever the drawing changes, so that old sets are drawn anew.
_VERSION = 2
CLASSES = ("circle", "square", "triangle")
# Middle of each class's range of hues: red to yellow, green to cyan, blue to magenta. Colour is a hint, so
# that a thousand iterations suffice to learn the shapes.
_HUES = (0.06, 0.41, 0.74)
_HUE_RANGE = 0.13
_NUM_IMAGES = {"train": 400, "val": 80}

# Longest side of a shape, as a share of the image's side.
_MIN_EXTENT, _MAX_EXTENT = 0.18, 0.95
# A shape may not hide more of an earlier one than this leaves visible: slivers have no class.
_MIN_VISIBLE = 0.5
_HOLE_PROBABILITY = 0.12
_CROWD_PROBABILITY = 0.08
# Shapes are drawn this many times larger and then averaged: soft edges, and masks true to half a pixel.
_SUPERSAMPLE = 4
_JPEG_QUALITY = 95


@dataclass
class _Region:
    """One annotated region: class index, visible pixels (H, W) bool, pixels before occlusion."""

    category: int
    visible: np.ndarray
    full_area: int
    crowd: bool = False


def generate_shapes(
    root: str, split: str, num_images: int | None = None, size: int = 128, seed: int = 0
) -> tuple[str, str]:
    """Draw a set of shapes in COCO's instances format, unless it is already there.

    Discs, rectangles and triangles of all sizes overlap on textured backgrounds; what is hidden does not
    belong to the masks. Regions without holes are polygons, those with holes run-length encodings; some
    images have a cluster of tiny shapes as a crowd region. The same arguments give the same set; each
    image depends on the seed, the split and its own number alone.

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
    # Left behind by a process that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(os.path.join(partial, "images"))
    try:
        content = _draw_set(os.path.join(partial, "images"), stamp)
        for name, value in (("annotations.json", content), ("stamp.json", stamp)):
            with open(os.path.join(partial, name), "w", encoding="utf-8") as file:
                json.dump(value, file)
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _draw_set(image_folder: str, stamp: dict[str, Any]) -> dict[str, Any]:
    """Write the images; return the annotations in COCO's format."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    size = stamp["size"]
    for index in range(stamp["num_images"]):
        rng = np.random.default_rng([stamp["seed"], zlib.crc32(stamp["split"].encode()), index])
        pixels, regions = _draw_image(rng, size)
        file_name = f"{index + 1:06d}.jpg"
        # OpenCV's channel order is BGR. Encoding and writing apart: imwrite hides why it failed.
        _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        with open(os.path.join(image_folder, file_name), "wb") as file:
            file.write(data.tobytes())
        images.append({"id": index + 1, "file_name": file_name, "height": size, "width": size, "license": 1})
        for region in regions:
            annotations.append(_annotation(len(annotations) + 1, index + 1, region))
    return {
        "info": {"description": "Shapes generated by rev_det", "version": str(_VERSION), **stamp},
        "licenses": [
            {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
        ],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": index + 1, "name": name, "supercategory": "shape"} for index, name in enumerate(CLASSES)
        ],
    }


def _draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[_Region]]:
    """Draw one image.

    Returns:
        pixels (size, size, 3), RGB uint8, and what to annotate, from back to front.
    """
    canvas = _background(rng, size)
    regions: list[_Region] = []
    count = int(rng.integers(1, 5))
    if rng.uniform() < _CROWD_PROBABILITY:
        category = int(rng.integers(len(CLASSES)))
        place = functools.partial(_crowd_alpha, rng, size, category)
        _add_region(canvas, regions, place, _fill(rng, size, category), category, crowd=True)
    # Large ones first: behind, or little would be left of the small ones.
    extents = np.sort(np.exp(rng.uniform(np.log(_MIN_EXTENT), np.log(_MAX_EXTENT), size=count)))[::-1]
    for extent in extents:
        category = int(rng.integers(len(CLASSES)))
        place = functools.partial(_shape_alpha, rng, size, category, float(extent) * size)
        _add_region(canvas, regions, place, _fill(rng, size, category), category)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), regions


def _add_region(
    canvas: np.ndarray,
    regions: list[_Region],
    place: Callable[[], np.ndarray],
    fill: np.ndarray,
    category: int,
    crowd: bool = False,
) -> None:
    """Paint a region over the canvas where it hides not too much of the others; else leave it out."""
    for _ in range(20):
        alpha = place()
        mask = alpha >= 0.5
        if all((region.visible & ~mask).sum() >= _MIN_VISIBLE * region.full_area for region in regions):
            canvas += alpha[..., None] * (fill - canvas)
            for region in regions:
                region.visible &= ~mask
            regions.append(_Region(category, mask, int(mask.sum()), crowd))
            return


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dull textured background, (size, size, 3) float32: gradient, stripes, checks or clouds."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / size
    period = rng.uniform(0.06, 0.25)
    kind = rng.integers(4)
    if kind == 0:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * along / period)
    elif kind == 2:
        across = (y * np.cos(angle) - x * np.sin(angle)) / size
        mix = (np.floor(along / period) + np.floor(across / period)) % 2
    else:
        coarse = rng.uniform(0, 1, size=(6, 6)).astype(np.float32)
        mix = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    dark, light = (
        255 * np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.25), value))
        for value in (rng.uniform(0.15, 0.4), rng.uniform(0.4, 0.65))
    )
    noise = rng.normal(0, rng.uniform(2, 12), size=(size, size, 3))
    return (dark + mix[..., None] * (light - dark) + noise).astype(np.float32)


def _fill(rng: np.random.Generator, size: int, category: int) -> np.ndarray:
    """A bright colour of the class with shading and grain, (size, size, 3) float32."""
    hue = _HUES[category] + rng.uniform(-_HUE_RANGE, _HUE_RANGE)
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1), rng.uniform(0.7, 1)))
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    shade = 1 + 0.25 * (x * np.cos(angle) + y * np.sin(angle))
    return (colour * shade[..., None] + rng.normal(0, 6, size=(size, size, 3))).astype(np.float32)


def _outline(rng: np.random.Generator, category: int) -> np.ndarray:
    """The corners of a shape around the origin, at most 1 wide and high before it is turned, (N, 2)."""
    aspect = rng.uniform(0.75, 1)
    turn = rng.uniform(-np.pi / 9, np.pi / 9) + rng.integers(4) * np.pi / 2
    if CLASSES[category] == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        corners = 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif CLASSES[category] == "square":
        corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    else:
        # The centroid at the origin, so that a hole is in the middle.
        corners = np.array([[-0.5, 1 / 3], [0.5, 1 / 3], [rng.uniform(-0.2, 0.2), -2 / 3]])
    cos, sin = np.cos(turn), np.sin(turn)
    return corners * [1, aspect] @ np.array([[cos, sin], [-sin, cos]])


def _shape_alpha(rng: np.random.Generator, size: int, category: int, extent: float) -> np.ndarray:
    """How much a shape of ``extent`` pixels, at a random place, covers each pixel: (size, size) float32."""
    outline = _outline(rng, category)
    # Borders of the image may cut a little off.
    centre = rng.uniform(0.4 * extent, size - 0.4 * extent, size=2)
    rings = [outline * extent + centre]
    if rng.uniform() < _HOLE_PROBABILITY and extent > 0.25 * size:
        rings.append(outline * extent * rng.uniform(0.35, 0.5) + centre)
    return _coverage(rings, size)


def _crowd_alpha(rng: np.random.Generator, size: int, category: int) -> np.ndarray:
    """As ``_shape_alpha``, for a cluster of tiny shapes of one class."""
    middle = rng.uniform(0.2 * size, 0.8 * size, size=2)
    alpha = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(10, 17)):
        centre = middle + rng.uniform(-0.14, 0.14, size=2) * size
        outline = _outline(rng, category) * rng.uniform(0.05, 0.07) * size
        alpha = np.maximum(alpha, _coverage([outline + centre], size))
    return alpha


def _coverage(rings: list[np.ndarray], size: int) -> np.ndarray:
    """Share of each pixel inside an odd number of closed rings (N, 2) of x, y: (size, size) float32."""
    large = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), np.uint8)
    # fillPoly takes pixel centres for integers; our coordinates are continuous, 0 at the image's edge.
    cv2.fillPoly(large, [np.rint(ring * _SUPERSAMPLE - 0.5).astype(np.int32) for ring in rings], 1)
    return cv2.resize(large.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)


def _annotation(annotation_id: int, image_id: int, region: _Region) -> dict[str, Any]:
    rows, columns = np.flatnonzero(region.visible.any(1)), np.flatnonzero(region.visible.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": region.category + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(region.visible.sum()),
        # As in COCO, crowds are uncompressed run-length encodings.
        "segmentation": _run_lengths(region.visible) if region.crowd else _segmentation(region.visible),
        "iscrowd": int(region.crowd),
    }


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding: column by column, first the zeros."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def _segmentation(mask: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """Polygons, one per part; a compressed run-length encoding where the mask has holes."""
    # Contours run through pixel centres. On the enlarged mask these are close to the pixels' outer
    # edges, where COCO's continuous coordinates have the border.
    large = np.kron(mask, np.ones((_SUPERSAMPLE, _SUPERSAMPLE))).astype(np.uint8)
    contours, hierarchy = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    has_holes = bool((hierarchy[0, :, 3] >= 0).any())
    # Half a pixel of tolerance turns the staircase back into straight edges.
    polygons = [cv2.approxPolyDP(contour, 0.5 * _SUPERSAMPLE, closed=True) for contour in contours]
    if has_holes or any(len(polygon) < 3 for polygon in polygons):
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
        return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
    return [np.round((polygon.reshape(-1) + 0.5) / _SUPERSAMPLE, 2).tolist() for polygon in polygons]
