"""Images as everything sees them: upright, in colour, eight bits a channel."""

from __future__ import annotations

import numpy as np
from detectron2.data import detection_utils as utils
from PIL import Image

# Pillow's modes of more than eight bits; converted to colours, all above 255 becomes white.
_DEEP = ("I", "F")


def read_rgb(path: str) -> np.ndarray:
    """Read an image file.

    Returns:
        (H, W, 3), RGB, uint8, turned as its EXIF data say.

    Raises:
        ValueError: it cannot be read, or its values do not fit eight bits; the message does not name it.
    """
    try:
        check_depth(path)
        return utils.read_image(path, format="RGB")
    except Exception as error:  # a damaged file makes Pillow raise errors of many kinds
        # Pillow appends the file object.
        reason = " ".join(str(error).partition("<_io.")[0].split())
        raise ValueError(reason or type(error).__name__) from error


def check_depth(path: str) -> None:
    """From the head of an image file, whether its values fit eight bits.

    Raises:
        ValueError: they do not; the message does not name the file.
        OSError: it cannot be opened, or its head cannot be read.
    """
    with open(path, "rb") as file, Image.open(file) as image:
        mode = image.mode
    if mode.startswith(_DEEP):
        raise ValueError(
            f"its grey has more than 8 bits (mode {mode}), and all above 255 would be read as white; "
            "convert it to 8 bits"
        )
