"""Weight files rewritten for Detectron2's own checkpointer."""

from __future__ import annotations

import os
import re
from typing import Any

import safetensors.torch
import torch

from ..files import check_output, whole_file
from .files import split_digest
from .inspection import inspect_weights
from .layouts import Converted, convert, is_mvit
from .loading import read_source

_ENDINGS = (".pth", ".safetensors")


def rewrite_weights(source: str | os.PathLike, path: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Write the weights of any supported file under the names that a Detectron2 detector has for them.

    Values and types are kept. A backbone's names start with ``backbone.bottom_up.`` (Rev-MViT) or
    ``backbone.net.`` (Rev-ViT), as in detectors with our pyramids; a detector's stay as they are.
    Detectron2's checkpointer matches such names exactly. Without the prefix they would need its heuristics,
    which give up where a pyramid's ``norm`` has the shape of the backbone's.

    Args:
        source: path or URL of a file as `load_pretrained` reads it.
        path: the file to write: ``.pth`` (``{"model": names to tensors}``), or ``.safetensors``, which
            Detectron2's own checkpointer does not read. It appears whole or not at all.
        overwrite: replace a file that is there, which cannot be the source.

    Returns:
        what was written, and which entries of the source were left out, in some lines.

    Raises:
        FileNotFoundError: there is no source, or no folder for the new file.
        ValueError: the source is not whole, the new file is there already, or has another ending.
    """
    path = os.fspath(path)
    check_output(path, _ENDINGS)
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} is there already; name another file, or overwrite it with --force")
    original, _ = split_digest(source)
    if os.path.exists(path) and os.path.exists(original) and os.path.samefile(path, original):
        raise ValueError(
            f"{path} is the file that is to be converted, {original}; name another file, since its "
            "classifier and training state would be lost"
        )
    summary = inspect_weights(source)
    if summary.problems:
        raise ValueError(
            f"{summary.source} is not whole and was not converted: {'; '.join(summary.problems)}"
        )
    container, name = read_source(source)
    converted = convert(container, name)
    tensors, prefix, left = _under_detector_names(converted)
    # Copies, because a view (q of a fused qkv) would be written with all that it is a view of.
    own = {
        key: torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    with whole_file(path) as part, open(part, "wb") as file:
        if path.lower().endswith(".pth"):
            torch.save({"model": own}, file)
        else:
            file.write(safetensors.torch.save(own, metadata={"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())
    lines = [
        f"{path}: {len(own)} tensors, converted from the {converted.layout} layout",
        f"  the backbone's names start with {prefix}",
    ]
    if dropped := [*converted.dropped, *left, *summary.training_state]:
        lines.append(f"  left out: {', '.join(dropped)}")
    return "\n".join(lines)


def _under_detector_names(converted: Converted) -> tuple[dict[str, Any], str, list[str]]:
    """A detector's names and values, the prefix of its backbone's, and names that have no place in it."""
    prefix = "backbone.bottom_up." if is_mvit(converted.backbone) else "backbone.net."
    kept, outer, inside = converted.others, "", ""
    if match := re.fullmatch(r"(|.*\.)(backbone\..*)", converted.prefix):
        outer, prefix = match.groups()  # a detector's, perhaps within another module (as `module.`)
        kept = [key for key in converted.others if key.startswith(outer)]
    elif f"backbone.{converted.prefix}" == prefix:  # a pyramid's
        inside = "backbone."
    else:
        kept = []
    tensors = {prefix + key: value for key, value in converted.backbone.items()}
    tensors |= {inside + key.removeprefix(outer): converted.others[key] for key in kept}
    return tensors, prefix, [key for key in converted.others if key not in kept]
