"""Files that are written whole or not at all, and JSON that is read without trusting it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# A disk is full, or a quota or limit is reached; or it is broken, or no longer there or writable.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
_PART = ".part-"
_LONGEST_NAME = 255  # bytes, on nearly all file systems


def check_output(path: str | os.PathLike | None, suffixes: Sequence[str] = (), name: str = "") -> None:
    """Find before the work what would stop `write_whole` after it.

    Args:
        path: of a file to be written; None is none.
        suffixes: those that its name may end with, if not any.
        name: what messages put before the path, such as an option.

    Raises:
        FileNotFoundError: the folder of the path does not exist.
        ValueError: it cannot be written to, or the path is a folder or has another suffix.
    """
    if path is None:
        return
    path = os.fspath(path)
    folder, what = os.path.dirname(path) or ".", f"{name} {path}".lstrip()
    if suffixes and not path.lower().endswith(tuple(suffixes)):
        raise ValueError(f"{what} cannot be written: its name must end with {' or '.join(suffixes)}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{what} cannot be written: the folder {folder} does not exist")
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(f"{what} cannot be written: it is a folder; give the name of a file")
    try:
        # What the permissions say is not all: the file system may be read-only, or none for files.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what} cannot be written to the folder {folder}: {error.strerror}") from error


class UnwritableError(OSError):
    """A file cannot be written; the message has its path, the reason and how much room there is."""


def check_kept(name: str, outputs: Iterable[str], inputs: Iterable[str]) -> None:
    """Find before the work that a file to be written is one that is read, which would be lost.

    Args:
        name: what messages put first, such as an option with its value.
        outputs, inputs: paths; inputs that are no files of this machine are passed over.

    Raises:
        ValueError: naming the file. Links and the case of letters do not hide it.
    """
    known = {_identity(path) for path in inputs if os.path.isfile(path)}
    for path in (path for output in outputs for path in (output, part_path(output))):
        if os.path.isfile(path) and _identity(path) in known:
            raise ValueError(f"{name} would overwrite {path}, which is read; name another place")


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def printable(text: str) -> str:
    """A name as part of a line: what is not UTF-8, or would end the line, is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def part_path(path: str) -> str:
    """The name of a file that is not complete yet; its ending, which decides the format, is the same."""
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > _LONGEST_NAME - len(_PART):
        name = name[-(_LONGEST_NAME // 5) :]  # a character may take four bytes
    return os.path.join(folder, f"{_PART}{name}")


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A file beside ``path`` to write to; it is moved there when the body has ended without an error.

    Yields:
        the name of the file to write.

    Raises:
        UnwritableError: it cannot be written.
    """
    part = part_path(path)
    try:
        with naming(path):
            yield part
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def write_whole(path: str, write: Callable[[str], Any]) -> None:
    """`whole_file`, for a function that writes the file whose name it is given."""
    with whole_file(path) as part:
        write(part)


def write_text(path: str, text: str) -> None:
    """Write text as `write_whole` does, and see that it is on the disk.

    What is not UTF-8, as a file's name can be, is escaped in the way of JSON and Python.

    Raises:
        UnwritableError: it cannot be written.
    """
    with whole_file(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str, content: Any, indent: int | None = 1) -> None:
    """Write JSON as `write_text` does.

    Raises:
        ValueError: a number is infinite or NaN, which JSON has not.
    """
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """What keeps a file from being written, as an error that names it.

    Raises:
        UnwritableError: instead of another OSError, or of the RuntimeError that torch makes of one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        # With the name of another file, or in words, it says enough; without a name it may be of the network.
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        if not (str(cause.filename).endswith(os.path.basename(path)) or cause.errno in DISK_ERRORS):
            raise
        folder = os.path.dirname(path) or "."
        room = "the folder is not there"
        with contextlib.suppress(OSError):
            room = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {folder}"
        raise UnwritableError(f"{path} cannot be written: {cause.strerror}; {room}") from error


def read_json(
    path: str | os.PathLike,
    make_object: Callable[[list], Any] | None = None,
    encoding: str = "utf-8-sig",
) -> Any:
    """Read a JSON file.

    Args:
        make_object: makes an object of its pairs of key and value; None for a dictionary.
        encoding: "utf-8" where others will read it, who do not know the byte order mark of some editors.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not JSON or not a regular file, which the message says after the path.
    """
    check_regular(path)
    try:
        with open(path, encoding=encoding) as file:
            return json.load(file, object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} in line {error.lineno}, column {error.colno}; is the file complete?"
        if "BOM" in error.msg:
            problem = "it begins with a byte order mark; save it as UTF-8 without one"
        raise ValueError(f"{path} is not valid JSON: {problem}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or of brackets
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error


def check_regular(path: str | os.PathLike) -> None:
    """Before a file is opened: a pipe or a device may keep its reader waiting for ever.

    Raises:
        ValueError: it is a folder, a pipe or a device; the message begins with the path.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise ValueError(f"{path} is {kind}, not a file")
