"""Reading weight files without trusting them: whole, unchanged, and never running code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import IO, Any

import safetensors.torch
import torch
from detectron2.utils.file_io import PathManager

_DIGEST_MARK = "#sha256="
_DOWNLOADED = ("http://", "https://", "ftp://", "detectron2://")
_ZIP_MAGIC = b"PK\x03\x04"
# torch.save's first pickled object before it wrote zip archives.
_LEGACY_TORCH_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_HEAD_BYTES = 512
_CHUNK_BYTES = 2**20

# What a file that is no checkpoint begins with, and what it seems to be.
_FOREIGN = (
    (
        (b"<!doctype html", b"<html", b"<?xml"),
        "is a web page, not a checkpoint: the server sent an error or login page; download it again",
    ),
    (
        (b"version https://git-lfs.github.com/spec/",),
        "is a git-LFS pointer, not the file itself: fetch it with `git lfs pull`",
    ),
    (
        (b"\x80",),
        "is a plain pickle, which could run code when it is read, and is refused. Detectron2's own .pkl "
        "files are read from detectron2:// addresses, for Detectron2's own backbones",
    ),
)


def read_checkpoint(source: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint file of any format that cannot run code.

    Zip archives of ``torch.save`` are checked against their checksums first, which ``torch.load`` does not
    do. Files of ``torch.save`` before torch 1.6 and ``.safetensors`` files have none: ``#sha256=`` protects
    those. The format is recognised by the content, never by the name.

    Args:
        source: path, or URL (downloaded once, into Detectron2's cache), optionally followed by ``#sha256=<64
            hexadecimal digits>``, which the file must then have. What was downloaded and fails a check does
            not stay in the cache.

    Returns:
        what the file holds: names to tensors (on the CPU), or a container of such dictionaries.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: the file is not a checkpoint, is damaged, has another digest, or would run code.
    """
    name, digest = split_digest(source)
    with local_file(name, digest) as path:
        loaded = _read(path, name)
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{name} holds a {type(loaded).__name__}, not a dictionary of tensors")
        return dict(loaded)


@contextlib.contextmanager
def local_file(name: str, digest: str | None) -> Iterator[str]:
    """The local path of a file, which is downloaded if its name is a URL.

    A ValueError in the body removes what was downloaded.

    Args:
        name, digest: as `split_digest` returns them; the digest is verified.

    Raises:
        FileNotFoundError, ValueError: as in `read_checkpoint`.
    """
    path = _find(name)
    try:
        if digest is not None and (actual := _sha256(path)) != digest:
            raise ValueError(
                f"{name} is not the file that is meant: its sha256 is {actual}, expected {digest}"
            )
        yield path
    except ValueError as error:
        if not name.startswith(_DOWNLOADED):
            raise
        # It would otherwise be found there, and refused, for ever.
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.unlink(path)
        raise ValueError(
            f"{error} (The downloaded copy was removed; it will be downloaded again.)"
        ) from error


def split_digest(source: str | os.PathLike) -> tuple[str, str | None]:
    """Split ``name#sha256=digest``.

    Returns:
        the name, and the digest in lower case or None.

    Raises:
        ValueError: what follows ``#sha256=`` is no SHA-256 digest.
    """
    name, mark, digest = os.fspath(source).partition(_DIGEST_MARK)
    if mark and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError(f"{name}: what follows {_DIGEST_MARK} must be 64 hexadecimal digits, got '{digest}'")
    return name, digest.lower() if mark else None


def unsafe_globals(path: str) -> list[str]:
    """Classes and functions that a ``torch.save`` zip archive asks for and that plain data does not need."""
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _find(name: str) -> str:
    path = name
    if "://" in name:
        try:
            path = PathManager.get_local_path(name)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: catalog://
            raise FileNotFoundError(
                f"{name} could not be downloaded: {error}. Check the address and the network, or bring the "
                "file here by other means and name its path"
            ) from error
    if os.path.isdir(path):
        raise ValueError(f"{name} is a directory; name the weight file itself")
    if not os.path.isfile(path):
        known = f"; addresses start with {', '.join(_DOWNLOADED)}" if "://" in name else ""
        raise FileNotFoundError(f"weight file {name} does not exist{known}")
    return path


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: str, name: str) -> Any:
    # By the open file: torch judges a path by its name, and safetensors opens none but UTF-8's.
    with open(path, "rb") as f:
        head = f.read(_HEAD_BYTES)
        is_zip, problem = head.startswith(_ZIP_MAGIC), None
        try:
            if is_zip:
                problem = _find_zip_problem(f)
            f.seek(0)
            if problem is None and (is_zip or _LEGACY_TORCH_MAGIC in head[:32]):
                return torch.load(f, map_location="cpu", weights_only=True)
            if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
                return safetensors.torch.load(f.read())
        except pickle.UnpicklingError as error:
            raise ValueError(f"{name} {_describe_pickle(path, error)}") from error
        except Exception as error:  # a damaged file makes its readers raise errors of many kinds
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{name} is damaged or truncated: {reason}") from error
    raise ValueError(f"{name} {problem or _describe_foreign(head)}")


def _find_zip_problem(file: IO[bytes]) -> str | None:
    """Why an archive, which can be opened, is not one of ``torch.save`` with the right checksums."""
    with zipfile.ZipFile(file) as archive:
        members = archive.namelist()
        damaged = archive.testzip()
    if damaged is not None:
        return f"is damaged: the checksum of its member {damaged} is wrong"
    kinds = {os.path.basename(member) for member in members}
    if "constants.pkl" in kinds:
        return "is a TorchScript program, not a checkpoint; save the model's state_dict()"
    if "data.pkl" not in kinds:
        return f"is a zip archive, but not of torch.save: it holds {', '.join(members[:3])}"
    return None


def _describe_pickle(path: str, error: pickle.UnpicklingError) -> str:
    """What is wrong with a pickle; torch's own message recommends to read it without protection."""
    try:
        unsafe = unsafe_globals(path)
    except Exception:  # no zip archive, or its pickle is garbage
        unsafe = re.findall(r"GLOBAL (\S+)", str(error))
    if not unsafe:
        return "is damaged: it holds more than tensors and plain values"
    return (
        "was refused: it is damaged, or made to run code when it is read: it asks for "
        f"{', '.join(unsafe)}, where weight files hold tensors and plain values only. If you trust it, "
        "save its tensors anew with torch.save"
    )


def _describe_foreign(head: bytes) -> str:
    """What a file that is no checkpoint seems to be, to follow its name in a sentence."""
    if not head:
        return "is empty: the download or copy failed"
    for starts, what in _FOREIGN:
        if head.lstrip().lower().startswith(starts):
            return what
    shown = head[:40].decode("utf-8", "replace")
    return f"is not a checkpoint of torch.save or safetensors; it starts with {shown!r}"
