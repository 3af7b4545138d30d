"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any


def check_output(path: str | None, suffixes: Sequence[str] = ()) -> None:
    """Find before the work what would stop `write_whole` after it.

    Args:
        path: of a file to be written; None is none.
        suffixes: those that its name may end with, if not any.

    Raises:
        FileNotFoundError: the folder of the path does not exist.
        ValueError: it cannot be written to, or the path is a folder or has another suffix.
    """
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path} cannot be written: the folder {folder} does not exist")
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(f"{path!r} cannot be written: it is a folder; give the name of a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: there is no permission to write to the folder {folder}")
    if suffixes and not path.lower().endswith(tuple(suffixes)):
        raise ValueError(f"{path} cannot be written: its name must end with {' or '.join(suffixes)}")


def write_whole(path: str, write: Callable[[str], Any]) -> None:
    """Write a file beside its place and move it there when it is complete.

    Args:
        write: writes the file whose name it is given.

    Raises:
        FileNotFoundError, ValueError: see `check_output`.
    """
    check_output(path)
    # The suffix stays the last part of the name: it decides the format of pictures.
    part = os.path.join(os.path.dirname(path), f".part-{os.path.basename(path)}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_json(path: str, content: Any, indent: int | None = 1) -> None:
    """Write JSON as `write_whole` does.

    Raises:
        FileNotFoundError, ValueError: see `check_output`; or a number is infinite or NaN, which JSON has not.
    """

    def write(part: str) -> None:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=indent, ensure_ascii=False, allow_nan=False)

    write_whole(path, write)
