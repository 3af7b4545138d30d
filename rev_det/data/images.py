"""Images as everything sees them: upright, in colour, eight bits a channel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image, UnidentifiedImageError

from ..files import check_regular

# For some other formats, such as EPS, Pillow runs programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's modes of more than eight bits; converted to colours, all above 255 becomes white.
_DEEP = ("I", "F")
# Pixels of a side that a JPEG can have; matplotlib's limit is near.
_MAX_SIDE = 65_500


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file in one of `FORMATS`, whatever its name is; pixels are not decoded yet.

    Raises:
        OSError: it cannot be opened, or is in none of these formats.
        ValueError: it is no regular file.
    """
    check_regular(path)
    with open(path, "rb") as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise UnidentifiedImageError(f"cannot identify image file as {', '.join(FORMATS)}") from error
        with image:
            yield image


def read_rgb(path: str) -> np.ndarray:
    """Read an image file.

    Returns:
        (H, W, 3), RGB, uint8, turned as its EXIF data say.

    Raises:
        ValueError: it cannot be read, is too large, or its values do not fit eight bits; the message does not
            name it.
    """
    try:
        check_head(path)
        return utils.read_image(path, format="RGB")
    except Exception as error:  # a damaged file makes Pillow raise errors of many kinds
        # Pillow appends the file object.
        reason = " ".join(str(error).partition("<_io.")[0].split())
        raise ValueError(reason or type(error).__name__) from error


def check_head(path: str) -> None:
    """From the head of an image file, whether it can be worked on.

    Raises:
        ValueError: it is too large, or its values do not fit eight bits; the message does not name the file.
        OSError: it cannot be opened, or its head cannot be read.
    """
    with open_image(path) as image:
        mode, (width, height) = image.mode, image.size
    check_extent(height, width)
    if mode.startswith(_DEEP):
        raise ValueError(
            f"its grey has more than 8 bits (mode {mode}), and all above 255 would be read as white; "
            "convert it to 8 bits"
        )


def check_extent(height: int, width: int, shortest: int = 0, longest: int = 0) -> None:
    """Whether an image can be worked on: masks of a hundred objects take a hundred bytes a pixel.

    Args:
        height, width: in pixels.
        shortest, longest: what Detectron2 resizes the shorter side to, and the limit of the longer; 0 for
            none.

    Raises:
        ValueError: it is too large, or nothing is left of the shorter side.
    """
    size, limit = f"it has {width} x {height} pixels", Image.MAX_IMAGE_PIXELS
    if (limit and height * width > limit) or max(height, width) > _MAX_SIDE:
        most = f"{limit / 1e6:.0f} million pixels, " if limit else ""
        raise ValueError(f"{size}, more than {most}or {_MAX_SIDE} a side; cut it into tiles, or reduce it")
    if shortest:
        resized = T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
        if min(resized) < 1:
            raise ValueError(
                f"{size}; reduced to {longest}, nothing is left of its shorter side; cut it into tiles"
            )


def unusable_images(
    records: Iterable[Mapping[str, Any]], shortest: int, longest: int
) -> list[tuple[str, str]]:
    """The images for which `check_extent` raises an error, by what their annotations say.

    Args:
        records: entries in Detectron2's dataset format.
        shortest, longest: as `check_extent`'s.

    Returns:
        path and reason of each.
    """
    found = []
    for record in records:
        try:
            # Who registers data without sizes knows them by reading the images alone.
            check_extent(record.get("height", 1), record.get("width", 1), shortest, longest)
        except ValueError as error:
            found.append((record["file_name"], str(error)))
    return found
