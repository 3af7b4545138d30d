"""One run at a time in an ``OUTPUT_DIR``: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import naming, read_json

NAME = "run.lock"
# Where Linux tells one start of a machine from another, and one container from another.
_BOOT, _CONTAINER = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing.

    The lock is a file that says who made it. Locks of the operating system would not do: network disks may
    have none that other machines see. What a killed run of this machine has left is recognised and replaced;
    whether a run of another machine is alive cannot be seen from here.

    Args:
        folder: an ``OUTPUT_DIR``.

    Raises:
        ValueError: another run has it, or may have it.
        OSError: the lock cannot be written.
    """
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, NAME)
    own = _owner(os.getpid())
    _take(path, own)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            # Who has removed it by hand may have given the folder to another run.
            if read_json(path) == own:
                os.unlink(path)
            if made:
                os.rmdir(folder)  # where nothing was written


def _take(path: str, own: dict[str, Any]) -> None:
    while True:
        try:
            # On network disks, too, only one machine succeeds.
            file = open(path, "x", encoding="utf-8")
        except FileExistsError:
            _remove_stale(path, own)
            continue
        try:
            with naming(path), file:
                json.dump(own, file)
        except OSError:
            os.unlink(path)
            raise
        return


def _remove_stale(path: str, own: dict[str, Any]) -> None:
    """Remove the lock of a run that has ended without doing so itself.

    Raises:
        ValueError: the run is alive, or that cannot be told.
    """
    aside = f"{path}.{own['host']}.{own['pid']}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return  # it has just ended
    folder = os.path.dirname(path)
    try:
        owner = json.loads(text)
        who = f"process {owner['pid']} on {owner['host']}"
        here = owner["host"] == own["host"]
        if here and owner["boot"] != own["boot"]:
            alive = False
        elif here and owner["container"] == own["container"]:
            alive = owner == _owner(owner["pid"])
        else:
            alive = None
    except (ValueError, TypeError, KeyError):
        who, alive = "a run that has not said which", None
    if alive is False:
        # Of several that find it, one gets it; and it may be a new one by now.
        with contextlib.suppress(OSError):
            os.rename(path, aside)
            if Path(aside).read_text(encoding="utf-8") != text:
                os.link(aside, path)
            os.unlink(aside)
        return
    doubt = "" if alive else f". If it does not run any more, which cannot be seen from here, remove {path}"
    raise ValueError(
        f"OUTPUT_DIR {folder} is in use by {who}: two runs would overwrite each other's files. Wait for it, "
        "or set another OUTPUT_DIR; an evaluation beside it needs one of its own, and MODEL.WEIGHTS" + doubt
    )


def _owner(pid: int) -> dict[str, Any]:
    """What tells a process from all others; ``started`` is None if there is no such process."""
    return {
        "pid": pid,
        "host": platform.node(),
        "boot": _BOOT.read_text().strip() if _BOOT.exists() else "",
        "container": os.readlink(_CONTAINER) if _CONTAINER.exists() else "",
        "started": _start_time(pid),
    }


def _start_time(pid: int) -> str | None:
    """When a process has started, in the units of Linux; "" where only its existence can be told."""
    if Path("/proc/self/stat").exists():
        try:
            # Behind the name, which may hold anything: the state is field 3, the start field 22.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
