"""Layouts of weight files, recognised by their keys, and their names in ours.

Ours is the bare backbone's: ``pos_embed``, ``patch_embed.proj``, ``blocks.N.F``, ``blocks.N.G``,
``blocks.N.fuse`` in stage transitions, and the norm of each scale (``norm``, or ``scaleK_norm``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import yaml

# Of PySlowFast, mmpretrain and Detectron2 checkpoints.
CONTAINER_KEYS = ("model_state", "state_dict", "model")

# What tells a layout, after the prefix (group 1) that a wrapping module gives to the backbone. Ours is the
# first: the heads of a detector may have names that look like another layout's.
_LAYOUTS = {
    "rev_det": re.compile(r"((?:.*?\.)?)blocks\.\d+\.[FG]\."),
    "pyslowfast": re.compile(r"((?:.*?\.)?)rev_backbone\.layers\.\d+\."),
    "mmpretrain": re.compile(r"((?:.*?\.)?)layers\.\d+\.(?:ln1|ln2|attn\.qkv|ffn\.layers)\."),
}

# Names of the backbone's entries, below the prefix, and ours.
_NAMES = {
    "pyslowfast": (
        (r"(pos_embed|patch_embed\.proj\.\w+)", r"\1"),
        (r"rev_backbone\.layers\.(\d+)\.([FG]\..+)", r"blocks.\1.\2"),
        (r"rev_backbone\.layers\.(\d+)\.pre_q_fuse\.fuse_fn\.(.+)", r"blocks.\1.fuse.\2"),
        (r"(norm\.\w+)", r"\1"),
    ),
    "mmpretrain": (
        (r"(pos_embed)", r"\1"),
        (r"patch_embed\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (r"layers\.(\d+)\.ln1\.(\w+)", r"blocks.\1.F.norm.\2"),
        (r"layers\.(\d+)\.attn\.(qkv|proj)\.(\w+)", r"blocks.\1.F.attn.\2.\3"),
        (r"layers\.(\d+)\.ln2\.(\w+)", r"blocks.\1.G.norm.\2"),
        (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", r"blocks.\1.G.mlp.fc1.\2"),
        (r"layers\.(\d+)\.ffn\.layers\.1\.(\w+)", r"blocks.\1.G.mlp.fc2.\2"),
        (r"ln1\.(\w+)", r"norm.\1"),
    ),
}
_CLASSIFIER = re.compile(r"(?:.*\.)?head\..+")

_PLAIN_VIT = "a plain vision transformer (timm, DeiT, MAE), whose blocks are not reversible"
# Of other models' files: a telling key, and what it tells.
_FOREIGN = (
    (r"(.*\.)?(res[2-5]\.\d+\.conv1|stem\.conv1)\.", "a ResNet of Detectron2"),
    (r"(.*\.)?(res[2-5]_\d+_branch2a_w|conv1_w)$", "a ResNet of Caffe2 (Detectron)"),
    (r"(.*\.)?layer[1-4]\.\d+\.conv1\.", "a ResNet of torchvision or timm"),
    (r"(.*\.)?layers\.\d+\.blocks\.\d+\.attn\.", "a Swin transformer"),
    (r"(.*\.)?blocks\.\d+\.attn\.(pool_[qkv]|norm_[qkv]|rel_pos_[hwt])", "an MViT that is not reversible"),
    (r"(.*\.)?blocks\.\d+\.attn\.(qkv|q|k|v|proj)\.", _PLAIN_VIT),
    (r"(.*\.)?stages\.\d+\.", "a ConvNeXt or another staged network"),
    (r"(.*\.)?cls_token$", _PLAIN_VIT),
)


@dataclass
class Converted:
    """A source's tensors under our names.

    Attributes:
        layout: "pyslowfast", "mmpretrain" or "rev_det".
        prefix: what came before the backbone's keys in a source of our own layout, else "".
        backbone: the bare backbone.
        others: the rest of a source of our own layout, under its full names: a pyramid, a detector's heads.
        dropped: an ImageNet classifier's head, under its own names.
        unexpected: keys that a file of this layout does not have.
        num_heads: attention heads of the first block where the source says so.
    """

    layout: str
    prefix: str = ""
    backbone: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, Any] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    num_heads: int | None = None


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the backbone's entries of any supported layout to ours.

    Values are only reshaped and split, never looked at: the conversion is linear and also applies to a
    dictionary of gradients. A classifier's head, a pyramid and a detector's heads are left out.

    Args:
        state: names to tensors or arrays, or a container of such a dictionary: PySlowFast's
            (``model_state``), mmpretrain's (``state_dict``), ours (``model``); with any prefix, as
            ``module.`` or ``backbone.``.

    Returns:
        the bare backbone's entries, as ``RevViT`` or ``RevMViT`` name them.

    Raises:
        ValueError: the layout is none of these, or an entry has no place in it.
    """
    converted = convert(state)
    if converted.unexpected:
        raise ValueError(
            f"the state has keys that a file of the {converted.layout} layout does not: "
            f"{', '.join(converted.unexpected)}"
        )
    return converted.backbone


def convert(container: Mapping[str, Any], name: str = "the state") -> Converted:
    """`convert_state_dict` with everything that is not the backbone, too.

    Args:
        container: as in `convert_state_dict`.
        name: of the source, for messages.

    Raises:
        ValueError: the layout is none of the supported ones.
    """
    state = unwrap(container, name)
    prefixes = ((layout, _find_prefix(state, pattern, name)) for layout, pattern in _LAYOUTS.items())
    layout, prefix = next((found for found in prefixes if found[1] is not None), ("", ""))
    if not layout:
        raise ValueError(f"{name} holds no Rev-ViT or Rev-MViT: {_describe_foreign(state)}")
    if layout == "rev_det":
        ours = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        others = {k: v for k, v in state.items() if not k.startswith(prefix)}
        return Converted(layout, prefix, ours, others)
    if layout == "mmpretrain":
        _refuse_plain_vit(state, prefix, name)
    converted = Converted(layout, num_heads=_num_heads(container.get("cfg")))
    for key, value in state.items():
        if _CLASSIFIER.fullmatch(key):
            converted.dropped[key] = value
        elif key.startswith(prefix) and (ours := _our_name(key.removeprefix(prefix), layout)):
            converted.backbone |= _our_values(ours, value, name)
        else:
            converted.unexpected.append(key)
    last = last_norm(converted.backbone)
    converted.backbone = {re.sub(r"^norm\.", f"{last}.", k): v for k, v in converted.backbone.items()}
    return converted


def unwrap(container: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The dictionary of tensors in a container; the container itself if it is one already.

    Raises:
        ValueError: there is none, there are several, or it holds something else than tensors and arrays.
    """
    inside = [key for key in CONTAINER_KEYS if isinstance(container.get(key), Mapping)]
    if len(inside) > 1:
        raise ValueError(
            f"{name} holds several sets of weights: {', '.join(inside)}; pass the one that is meant"
        )
    state = dict(container[inside[0]] if inside else container)
    if not state:
        raise ValueError(f"{name} holds no tensors")
    for key, value in state.items():
        numeric = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        if not isinstance(key, str) or not (numeric or isinstance(value, torch.Tensor)):
            raise ValueError(
                f"{name} is neither a dictionary of tensors nor a container with one under "
                f"{', '.join(CONTAINER_KEYS)}: {key!r} is a {type(value).__name__}"
            )
    return state


def backbone_prefix(keys: Iterable[str], name: str = "the model") -> str | None:
    """What comes before a Rev-ViT's or Rev-MViT's keys in a model.

    Returns:
        "" for the backbone itself, as "backbone.bottom_up." in a detector; None if there is none.

    Raises:
        ValueError: there are several.
    """
    return _find_prefix(keys, _LAYOUTS["rev_det"], name)


def holds_reversible_backbone(keys: Iterable[str]) -> bool:
    """Whether keys are a Rev-ViT's or Rev-MViT's beyond doubt.

    mmpretrain's are not: its ordinary ViT has them, too.
    """
    sure = (_LAYOUTS["rev_det"], _LAYOUTS["pyslowfast"])
    return any(pattern.match(key) for key in keys for pattern in sure)


def transition_indexes(backbone: Iterable[str]) -> list[int]:
    """Indexes of the stage transitions among the blocks, from the bare backbone's keys."""
    pattern = re.compile(r"blocks\.(\d+)\.(?:fuse\.|F\.attn\.(?:pool|norm)_q\.)")
    return sorted({int(match.group(1)) for match in map(pattern.match, backbone) if match})


def is_mvit(backbone: Iterable[str]) -> bool:
    """Whether the bare backbone's keys are a Rev-MViT's: it pools keys and values in every block."""
    return any(re.match(r"blocks\.\d+\.(?:fuse\.|F\.attn\.pool_)", key) for key in backbone)


def last_norm(backbone: Iterable[str]) -> str:
    """Name of the norm of the last scale: the one norm that published files have."""
    keys = list(backbone)
    return f"scale{len(transition_indexes(keys)) + 2}_norm" if is_mvit(keys) else "norm"


def _find_prefix(keys: Iterable[str], pattern: re.Pattern, name: str) -> str | None:
    matches = (pattern.match(key) for key in keys)
    prefixes = sorted({match.group(1) for match in matches if match})
    if len(prefixes) > 1:
        below = ", ".join(repr(prefix) for prefix in prefixes)
        raise ValueError(f"{name} holds several backbones, below {below}; pass the one that is meant")
    return prefixes[0] if prefixes else None


def _our_name(key: str, layout: str) -> str | None:
    """Our name of an entry of another layout's backbone; None if there is none."""
    for theirs, ours in _NAMES[layout]:
        if match := re.fullmatch(theirs, key):
            return match.expand(ours)
    return None


def _our_values(key: str, value: Any, name: str) -> dict[str, Any]:
    """An entry under its own name of ours, in our shape; q, k and v apart if they are fused."""
    if ".attn.qkv." in key:
        if value.ndim == 0 or value.shape[0] % 3:
            raise ValueError(
                f"{name} is no mmpretrain RevViT: {key} fuses q, k and v, but its shape is "
                f"{tuple(value.shape)}, and the rows are no multiple of 3"
            )
        rows = value.shape[0] // 3
        return {key.replace("qkv", part): value[i * rows : (i + 1) * rows] for i, part in enumerate("qkv")}
    if re.search(r"\.pool_[qkv]\.weight$", key) and value.ndim == 5 and value.shape[2] == 1:
        value = value.reshape(*value.shape[:2], *value.shape[3:])  # (d, 1, 1, kh, kw) -> (d, 1, kh, kw)
    return {key: value}


def _num_heads(config: Any) -> int | None:
    """Attention heads of the first block from the YAML text that PySlowFast keeps beside its weights."""
    try:
        return int(yaml.safe_load(config)["MVIT"]["NUM_HEADS"])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return None  # not a container, or not with PySlowFast's text


def _refuse_plain_vit(state: Mapping[str, Any], prefix: str, name: str) -> None:
    """mmpretrain's ordinary ViT has the same block keys; its final norm has one stream's width, ours two."""
    norm, position = state.get(f"{prefix}ln1.weight"), state.get(f"{prefix}pos_embed")
    one_stream = norm is not None and position is not None and tuple(norm.shape) == tuple(position.shape[-1:])
    if f"{prefix}cls_token" in state or one_stream:
        raise ValueError(
            f"{name} holds no Rev-ViT: it looks like mmpretrain's plain vision transformer, whose blocks are "
            "not reversible"
        )


def _describe_foreign(state: Mapping[str, Any]) -> str:
    for pattern, what in _FOREIGN:
        if any(re.match(pattern, key) for key in state):
            return f"it looks like {what}"
    return f"its keys are none that are known: {', '.join(list(state)[:3])}, …"
