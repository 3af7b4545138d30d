"""One run at a time in an ``OUTPUT_DIR``: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from typing import IO, Any

from ..files import naming

NAME = "run.lock"


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing.

    The lock is one of the operating system's, of a file that says who has it: it ends with its process,
    however that ends. Some network disks show such locks to one machine alone. So a file that another machine
    has left counts as a lock as well: whether its run is alive cannot be seen from here.

    Args:
        folder: an ``OUTPUT_DIR``.

    Raises:
        ValueError: another run has it, or may have it.
        OSError: the lock cannot be written.
    """
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, NAME)
    file = _take(path)
    try:
        yield
    finally:
        with file, contextlib.suppress(OSError):
            # Who has removed it by hand may have given the folder to another run.
            if _is_at(file, path):
                os.unlink(path)
            if made:
                os.rmdir(folder)  # where nothing was written


def _take(path: str) -> IO[str]:
    own = {"pid": os.getpid(), "host": platform.node()}
    while True:
        try:
            # On network disks, too, only one machine succeeds.
            file, made = open(path, "x+", encoding="utf-8"), True
        except FileExistsError:
            try:
                file, made = open(path, "r+", encoding="utf-8", errors="replace"), False
            except FileNotFoundError:
                continue  # its owner has just removed it
        owner = None if made else _owner(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Others are of disks that have no locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(path, file, owner, "") from None
        if not _is_at(file, path):
            file.close()
            continue
        if not made and (owner is None or owner["host"] != own["host"]):
            hint = f". If it does not run any more, which cannot be seen from here, remove {path}"
            raise _in_use(path, file, owner, hint)
        try:
            with naming(path):
                file.seek(0)
                file.truncate()
                json.dump(own, file)
                file.flush()
        except OSError:
            os.unlink(path)
            raise
        return file


def _owner(file: IO[str]) -> dict[str, Any] | None:
    """Who has written it, if that can be told."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        owner = json.load(file)
        return {"pid": owner["pid"], "host": owner["host"]} if "pid" in owner and "host" in owner else None
    return None


def _is_at(file: IO[str], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _in_use(path: str, file: IO[str], owner: dict[str, Any] | None, hint: str) -> ValueError:
    file.close()
    who = f"process {owner['pid']} on {owner['host']}" if owner else "a run that has not said which"
    return ValueError(
        f"OUTPUT_DIR {os.path.dirname(path)} is in use by {who}: two runs would overwrite each other's "
        "files. Wait for it, or set another OUTPUT_DIR; an evaluation needs one of its own, and MODEL.WEIGHTS"
        + hint
    )
