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


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing.

    The lock is a file that says who made it. Locks of the operating system would not do: network disks may
    have none that other machines see. What a killed run of this machine has left is recognised and replaced;
    whether a run of another machine or container is alive cannot be seen from here.

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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return  # it has just ended
    hint = f". If it does not run any more, which cannot be seen from here, remove {path}"
    try:
        owner = json.loads(text)
        who = f"process {owner['pid']} on {owner['host']}"
        here = owner["host"] == own["host"]
        process = _owner(owner["pid"])
        if here and owner["boot"] == own["boot"] and owner["container"] == own["container"]:
            over = owner != process
            hint = "" if process["started"] else hint
        else:
            over = here and owner["boot"] != own["boot"]
    except (ValueError, TypeError, KeyError):
        who, over = "a run that has not said which", False
    if not over:
        raise ValueError(
            f"OUTPUT_DIR {os.path.dirname(path)} is in use by {who}: two runs would overwrite each other's "
            "files. Wait for it, or set another OUTPUT_DIR; an evaluation needs one of its own, and "
            "MODEL.WEIGHTS" + hint
        )
    # Of several that find it one removes it; and by now it may be the lock of a new run.
    aside = f"{path}.{own['host']}.{own['pid']}"
    with contextlib.suppress(OSError):
        os.rename(path, aside)
        if Path(aside).read_text(encoding="utf-8") != text:
            os.link(aside, path)
        os.unlink(aside)


def _owner(pid: int) -> dict[str, Any]:
    """What tells a process from all others, as far as the system says it."""
    # Behind the process's name, which may hold anything: the state is field 3, the start field 22.
    state, *_, start = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:20] or ("", "")
    return {
        "pid": pid,
        "host": platform.node(),
        "boot": _read("/proc/sys/kernel/random/boot_id").strip(),
        "container": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "started": "" if state in "ZX" else start,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
