"""What a weight file is: its layout, its size, which model it is for, and whether it is whole."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import RevMViT, RevViT
from .layouts import CONTAINER_KEYS, Converted, convert, last_norm, unwrap
from .loading import LoadMode, LoadPlan, check_finite, check_values, name_some, read_source
from .named import Geometry, read_geometry

_MVIT_STRIDE = 4  # of the patch embedding; any would do, since weights only show the grid


@dataclass(frozen=True)
class WeightsSummary:
    """A weight file in figures.

    Attributes:
        source: its name.
        layout: "pyslowfast", "mmpretrain" or "rev_det".
        geometry: size of the backbone.
        model: the named model of that size ("rev_vit_s", "rev_vit_b", "rev_vit_l", "rev_vit_h",
            "rev_mvit_b"), or None.
        tensors, parameters: of the backbone.
        dtypes: how many of its tensors have which type.
        classes: of an ImageNet classifier's head, if there is one.
        others: tensors outside the backbone: a pyramid and a detector's heads.
        training_state: what else a checkpoint holds, as "optimizer".
        problems: what is missing, unexpected, of a wrong shape or no weight at all; none for a sound file.
    """

    source: str
    layout: str
    geometry: Geometry
    model: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    classes: int | None = None
    others: int = 0
    training_state: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = self.geometry
        lines = [
            f"{self.source}: {size}",
            f"  layout: {self.layout}",
            f"  backbone: {self.tensors} tensors, {self.parameters:,} parameters ("
            + ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
            + ")",
        ]
        if size.grid is not None:
            lines.append(f"  position embedding: {size.grid} x {size.grid}")
        if self.classes is not None:
            lines.append(f"  classifier: {self.classes} classes")
        if self.others:
            lines.append(f"  pyramid and heads: {self.others} tensors")
        if self.training_state:
            lines.append(f"  also holds: {', '.join(self.training_state)}")
        return "\n".join(lines + [f"  problem: {problem}" for problem in self.problems])


def inspect_weights(source: str | os.PathLike | Mapping[str, Any]) -> WeightsSummary:
    """Read a weight file and say what it is.

    Args:
        source: as `rev_det.checkpoint.load_pretrained`'s.

    Returns:
        its figures; a file that can be read but is not whole has ``problems``.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: the file is damaged, of no supported kind or would run code.
    """
    container, name = read_source(source)
    converted = convert(container, name)
    backbone = {key: torch.as_tensor(value) for key, value in converted.backbone.items()}
    geometry = read_geometry(backbone)
    classifier = [value for key, value in converted.dropped.items() if key.endswith(".bias") and value.ndim]
    state = unwrap(container, name)
    return WeightsSummary(
        source=name,
        layout=converted.layout,
        geometry=geometry,
        model=geometry.model,
        tensors=len(backbone),
        parameters=sum(value.numel() for value in backbone.values()),
        dtypes=dict(Counter(str(value.dtype).removeprefix("torch.") for value in backbone.values())),
        classes=classifier[0].shape[0] if classifier else None,
        others=len(converted.others),
        training_state=[key for key in container if key not in state and key not in CONTAINER_KEYS],
        problems=_find_problems(converted, backbone, geometry, name),
    )


def _find_problems(converted: Converted, backbone: dict[str, Tensor], size: Geometry, name: str) -> list[str]:
    """What keeps the weights from filling the model of their own size, and what in them is no weight."""
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in backbone)
    present = {int(match.group(1)) for match in blocks if match}
    if len(present) != size.depth:
        return [f"{len(present)} blocks, but the last one has the number {size.depth - 1}"]
    rest = {key: torch.as_tensor(v) for key, v in (converted.others | converted.dropped).items()}
    # Batch norms count their batches, and other modules may count, too.
    counts = [key for key, value in rest.items() if not (_is_weight(key) or value.is_floating_point())]
    try:
        check_values(backbone | rest, counts, name)
        check_finite({key: value.double() for key, value in rest.items()}, name)
        alone = replace(converted, prefix="", others={})
        result = LoadPlan(_model_of_size(backbone, size), alone, name, LoadMode(strict=False)).result
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        return [str(error)]
    found = {"missing, or of another shape": result.missing, "unexpected": result.unexpected}
    return [f"{len(keys)} tensors {what}: {name_some(keys)}" for what, keys in found.items() if keys]


def _is_weight(key: str) -> bool:
    return key.endswith((".weight", ".bias"))


def _model_of_size(backbone: dict[str, Tensor], size: Geometry) -> nn.Module:
    """A model without storage. What weights do not show (strides, a Rev-ViT's heads) does not matter here."""
    if None in (size.width, size.patch_kernel, size.grid, size.mlp_ratio):
        raise ValueError("the patch embedding, the position embedding or the first block is not whole")
    common = {
        "in_chans": backbone["patch_embed.proj.weight"].shape[1],
        "embed_dim": size.width,
        "depth": size.depth,
        "mlp_ratio": size.mlp_ratio,
        "qkv_bias": "blocks.0.F.attn.q.bias" in backbone,
        "termination": _termination(backbone),
    }
    with torch.device("meta"):
        if size.family == "rev_vit":
            return RevViT(
                patch_size=size.patch_kernel[0],
                num_heads=1,
                pretrain_img_size=size.grid * size.patch_kernel[0],
                **common,
            )
        norms = (re.fullmatch(r"(scale\d+)_norm\.weight", key) for key in backbone)
        scales = [match.group(1) for match in norms if match]
        return RevMViT(
            patch_kernel=size.patch_kernel,
            num_heads=size.width // size.head_dim,
            last_block_indexes=size.last_block_indexes,
            qkv_pool_kernel=tuple(backbone["blocks.0.F.attn.pool_k.weight"].shape[2:]),
            pretrain_img_size=size.grid * _MVIT_STRIDE,
            out_features=tuple(scales) or (last_norm(backbone).removesuffix("_norm"),),
            fusion=_fusion(backbone),
            **common,
        )


def _termination(backbone: dict[str, Tensor]) -> str:
    """The simplest of `modeling.fusion.TERMINATIONS` with these tensors."""
    parts = {"final_norm": "norm-2x-mlp-norm", "mlp": "norm-2x-mlp", "linear": "norm-1-layer"}
    found = {match.group(1) for key in backbone if (match := re.match(r"(?:scale\d+_)?norm\.(\w+)\.", key))}
    return next((termination for part, termination in parts.items() if part in found), "concat-norm")


def _fusion(backbone: dict[str, Tensor]) -> str:
    """The simplest of `modeling.fusion.FUSIONS` with these tensors."""
    transition = {
        key.split(".", 2)[2]: value
        for key, value in backbone.items()
        if re.match(r"blocks\.\d+\.(fuse|widen)", key)
    }
    if "widen.weight" in transition:
        return "max"
    if not transition:
        single_stage = not any(".F.attn.pool_q." in key for key in backbone)
        return "2x-mlp" if single_stage else "concat"
    if "fuse.norm.weight" in transition:
        return "norm-2x-mlp"
    hidden = transition.get("fuse.fc1.weight")
    return "4x-mlp" if hidden is not None and hidden.shape[0] == 4 * hidden.shape[1] else "2x-mlp"
