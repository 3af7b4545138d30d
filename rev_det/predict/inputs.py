"""What to predict on: image and video files, folders and patterns, and the pictures in them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..data.images import read_rgb

# What is taken from a folder. A file that is named itself may have any extension.
IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"))
VIDEO_EXTENSIONS = frozenset((".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))
# Some containers announce frames by their duration, which may be a little more than they have.
_WHOLE_SHARE = 0.98
_LONGEST_NAME = 255 - len(".jpg")  # bytes, on nearly all file systems


@dataclass(frozen=True)
class Source:
    """A file to predict on.

    Attributes:
        path: as it was given, or found.
        name: for files made of it; no two sources share one, in upper or lower case.
        is_video: a regular file with the extension of a video.
    """

    path: str
    name: str
    is_video: bool

    def num_frames(self) -> int:
        """How many pictures there are to read; for a video what it says itself, 0 if it cannot be opened."""
        return max(0, int(_opened(self.path).get(cv2.CAP_PROP_FRAME_COUNT))) if self.is_video else 1


@dataclass(frozen=True)
class Frame:
    """A picture to predict on.

    Attributes:
        source: where it is from.
        image: (H, W, 3), RGB, uint8, upright.
        index: its number in a video, from 0; None for an image.
        rate: of the video, in frames per second; None for an image.
    """

    source: Source
    image: np.ndarray
    index: int | None = None
    rate: float | None = None


def find_sources(words: Sequence[str]) -> list[Source]:
    """The files that words of a command line mean, each once.

    Args:
        words: of files, folders (the images and videos in them, not in folders below) and patterns such as
            ``"photos/**/*.jpg"``.

    Raises:
        FileNotFoundError: a word means no file.
    """
    paths: dict[str, str] = {}
    for path in (path for word in words for path in _paths(word)):
        paths.setdefault(os.path.realpath(path), path)
    sources: list[Source] = []
    taken: set[str] = set()
    for path in paths.values():
        number, name = 1, _name(path)
        while name.lower() in taken:
            number += 1
            name = _name(path, f"_{number}")
        taken.add(name.lower())
        is_video = Path(path).suffix.lower() in VIDEO_EXTENSIONS and os.path.isfile(path)
        sources.append(Source(path, name, is_video))
    return sources


def read_frames(source: Source) -> Iterator[Frame]:
    """The pictures of a source, in order.

    Raises:
        ValueError: the file cannot be read as an image or video, or a video ends too early, after the frames
            there are; the message does not name it.
    """
    if source.is_video:
        yield from _read_video(source)
    else:
        yield Frame(source, read_rgb(source.path))


def _paths(word: str) -> list[str]:
    if os.path.isdir(word):
        known = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
        with os.scandir(word) as entries:
            names = sorted(e.name for e in entries if e.is_file() and Path(e.name).suffix.lower() in known)
        if not names:
            pattern = os.path.join(word, "**", "*.jpg")
            raise FileNotFoundError(
                f"the folder {word} has no images or videos in it ({' '.join(sorted(known))}); those in "
                f'folders below it need a pattern, such as "{pattern}"'
            )
        return [os.path.join(word, name) for name in names]
    if os.path.exists(word):
        return [word]
    if glob.has_magic(word):
        found = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        if not found:
            raise FileNotFoundError(f"no file matches {word}")
        return found
    raise FileNotFoundError(f"{word} does not exist; name image or video files, folders or patterns")


def _name(path: str, end: str = "") -> str:
    """The stem of a path and an end, short enough to name a file."""
    stem = Path(path).stem
    while len(os.fsencode(stem + end)) > _LONGEST_NAME:
        stem = stem[:-1]
    return stem + end


def _opened(path: str) -> cv2.VideoCapture:
    # As bytes: a name that is not UTF-8 ends the program.
    return cv2.VideoCapture(os.fsencode(path))


def _read_video(source: Source) -> Iterator[Frame]:
    if not os.path.getsize(source.path):
        raise ValueError("the file is empty")
    video = _opened(source.path)
    if not video.isOpened():
        raise ValueError("OpenCV cannot open it as a video: it is damaged, or of an unknown format")
    rate, announced = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = rate if 0 < rate < 1000 else 25.0  # a camera's stream may not say it
    index = 0
    while (read := video.read())[0]:
        yield Frame(source, read[1][:, :, ::-1], index, rate)
        index += 1
    if not index:
        raise ValueError("no frame of the video can be decoded")
    if index < _WHOLE_SHARE * announced:
        raise ValueError(
            f"{index} of the {announced} frames that the video announces could be read: it is cut off or "
            "damaged"
        )
