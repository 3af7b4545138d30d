"""Weight files rewritten for Detectron2's own checkpointer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..files import check_output, whole_file
from .inspection import inspect_weights
from .layouts import Converted, convert, is_mvit
from .loading import read_source

_ENDINGS = (".pth", ".safetensors")


@dataclass(frozen=True)
class RewrittenWeights:
    """What became of a file's weights.

    Attributes:
        path: the new file.
        layout: of the source.
        tensors: how many the new file holds.
        prefix: what its backbone's names start with.
        dropped: of the source, what was left out: a classifier's head, and what a checkpoint keeps beside
            the weights.
    """

    path: str
    layout: str
    tensors: int
    prefix: str
    dropped: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.tensors} tensors, converted from the {self.layout} layout",
            f"  the backbone's names start with {self.prefix}",
        ]
        if self.dropped:
            lines.append(f"  left out: {', '.join(self.dropped)}")
        return "\n".join(lines)


def rewrite_weights(
    source: str | os.PathLike, path: str | os.PathLike, *, overwrite: bool = False
) -> RewrittenWeights:
    """Write the weights of any supported file under the names that a Detectron2 detector has for them.

    Values and types are kept. A backbone's names start with ``backbone.bottom_up.`` (Rev-MViT) or
    ``backbone.net.`` (Rev-ViT), as in detectors with our pyramids; a detector's stay as they are.
    Detectron2's checkpointer matches such names exactly. Without the prefix they would need its heuristics,
    which give up where a pyramid's ``norm`` has the shape of the backbone's.

    Args:
        source: path or URL of a file as `load_pretrained` reads it.
        path: the file to write: ``.pth`` (``{"model": names to tensors}``), or ``.safetensors``, which
            Detectron2's own checkpointer does not read. It appears whole or not at all.
        overwrite: replace a file that is there.

    Raises:
        FileNotFoundError: there is no source, or no folder for the new file.
        ValueError: the source is not whole, the new file is there already, or has another ending.
    """
    path = os.fspath(path)
    ending = os.path.splitext(path)[1]
    check_output(path, _ENDINGS)
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{path} is there already; name another file, or overwrite it with --force")
    summary = inspect_weights(source)
    if summary.problems:
        raise ValueError(
            f"{summary.source} is not whole and was not converted: {'; '.join(summary.problems)}"
        )
    container, name = read_source(source)
    converted = convert(container, name)
    tensors, prefix, left = _under_detector_names(converted)
    _write(tensors, path, ending)
    dropped = [*converted.dropped, *left, *summary.training_state]
    return RewrittenWeights(path, converted.layout, len(tensors), prefix, dropped)


def _under_detector_names(converted: Converted) -> tuple[dict[str, Any], str, list[str]]:
    """A detector's names and values, the prefix of its backbone's, and names that have no place in it."""
    if match := re.fullmatch(r"(|.*\.)(backbone\..*)", converted.prefix):
        # A detector's, perhaps within another module (as `module.`).
        outer, prefix = match.groups()
        others = {k.removeprefix(outer): v for k, v in converted.others.items() if k.startswith(outer)}
        left = [key for key in converted.others if not key.startswith(outer)]
    else:
        prefix = "backbone.bottom_up." if is_mvit(converted.backbone) else "backbone.net."
        if f"backbone.{converted.prefix}" == prefix:  # a pyramid's
            others, left = {f"backbone.{key}": value for key, value in converted.others.items()}, []
        else:
            others, left = {}, list(converted.others)
    return {prefix + key: value for key, value in converted.backbone.items()} | others, prefix, left


def _write(tensors: dict[str, Any], path: str, ending: str) -> None:
    # Copies, because a view (q of a fused qkv) would be written with all that it is a view of.
    own: dict[str, Tensor] = {
        key: torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    with whole_file(path) as part, open(part, "wb") as file:
        if ending == ".pth":
            torch.save({"model": own}, file)
        else:
            file.write(safetensors.torch.save(own, metadata={"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())
