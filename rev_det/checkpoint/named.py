"""The size of a model, read off its weights, and the named models, which published weight files hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..modeling import RevMViT, RevViT
from .layouts import is_mvit, transition_indexes

_ADDRESS = "https://dl.fbaipublicfiles.com/pyslowfast/rev/"
_TITLES = {"rev_vit": "Rev-ViT", "rev_mvit": "Rev-MViT"}
_PATCH_KERNELS = {"rev_vit": (16, 16), "rev_mvit": (7, 7)}


@dataclass(frozen=True)
class NamedModel:
    """A model that the paper describes, for 224 x 224 images.

    Attributes:
        family: "rev_vit" or "rev_mvit".
        width: channels of each stream (in the first stage).
        last_block_indexes: last block of each stage of a Rev-MViT; of a Rev-ViT the last block.
        num_heads: attention heads (of the first stage), which a Rev-ViT's weights do not show.
        url: where the authors' weight file is; "" if there is none.
        top1: its accuracy on ImageNet's validation images, in per cent, by the authors' model table.
        remark: what else they say about it.
    """

    family: str
    width: int
    last_block_indexes: tuple[int, ...]
    num_heads: int
    url: str = ""
    top1: float = 0.0
    remark: str = ""

    def build(self) -> RevViT | RevMViT:
        """A freshly initialised backbone."""
        common = {
            "embed_dim": self.width,
            "depth": self.last_block_indexes[-1] + 1,
            "num_heads": self.num_heads,
        }
        if self.family == "rev_vit":
            return RevViT(**common)
        return RevMViT(last_block_indexes=self.last_block_indexes, **common)


# https://github.com/facebookresearch/SlowFast/tree/main/projects/rev
NAMED_MODELS = {
    "rev_vit_s": NamedModel("rev_vit", 384, (11,), 6, f"{_ADDRESS}REV_VIT_S.pyth", 79.9),
    "rev_vit_b": NamedModel("rev_vit", 768, (11,), 12, f"{_ADDRESS}REV_VIT_B.pyth", 81.8),
    "rev_vit_l": NamedModel("rev_vit", 1024, (23,), 16),
    "rev_vit_h": NamedModel("rev_vit", 1280, (31,), 16),
    "rev_mvit_b": NamedModel(
        "rev_mvit", 96, (0, 2, 13, 15), 1, f"{_ADDRESS}REV_MVIT_B.pyth", 82.9, "the paper says 82.5"
    ),
}
PUBLISHED = {name: model for name, model in NAMED_MODELS.items() if model.url}


@dataclass(frozen=True)
class Geometry:
    """What the weights of a bare backbone tell of its size; None where they lack the telling entry.

    Attributes:
        family, width, last_block_indexes: as `NamedModel`'s.
        depth: blocks, stage transitions included.
        patch_kernel: (kh, kw) of the patch embedding.
        grid: side of the square grid that the position embedding is for.
        mlp_ratio: hidden width of the MLPs over their width.
        head_dim: channels of an attention head, which only a Rev-MViT's weights show.
    """

    family: str
    width: int | None
    depth: int
    last_block_indexes: tuple[int, ...]
    patch_kernel: tuple[int, int] | None
    grid: int | None
    mlp_ratio: float | None
    head_dim: int | None

    @property
    def model(self) -> str | None:
        """Name of the named model of this size, as "rev_vit_b"; None for other sizes."""
        if self.patch_kernel != _PATCH_KERNELS[self.family]:
            return None
        for name, model in NAMED_MODELS.items():
            size = model.family, model.width, model.last_block_indexes
            if size == (self.family, self.width, self.last_block_indexes):
                return name
        return None

    def differences(self, other: Geometry) -> list[str]:
        """The attributes that differ, each with both values.

        Left out are the grid, for which position embeddings are interpolated, and what either does not tell.
        """
        names = [f.name for f in fields(self) if f.name != "grid"]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} ({a} against {b})" for name, a, b in pairs if a != b and None not in (a, b)]

    def __str__(self) -> str:
        size = f"width {self.width}, depth {self.depth}"
        if self.model:
            return f"{_TITLES[self.family]}-{self.model.rpartition('_')[2].upper()} ({size})"
        if self.family == "rev_mvit":
            size += f", last block of each stage {', '.join(map(str, self.last_block_indexes))}"
        if self.patch_kernel not in (None, _PATCH_KERNELS[self.family]):
            size += f", patch kernel {' x '.join(map(str, self.patch_kernel))}"
        return f"{_TITLES[self.family]} ({size})"


def read_geometry(backbone: Mapping[str, Any]) -> Geometry:
    """The size of a bare backbone from its entries under our names (anything with a shape)."""
    shapes = {key: tuple(value.shape) for key, value in backbone.items()}
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in shapes)
    depth = max((int(match.group(1)) for match in blocks if match), default=-1) + 1
    patch = shapes.get("patch_embed.proj.weight", ())
    position = shapes.get("pos_embed", ())
    width = patch[0] if len(patch) == 4 else (position[-1] if position else None)
    hidden, pool = shapes.get("blocks.0.G.mlp.fc1.weight"), shapes.get("blocks.0.F.attn.pool_k.weight")
    return Geometry(
        family="rev_mvit" if is_mvit(shapes) else "rev_vit",
        width=width,
        depth=depth,
        last_block_indexes=(*(i - 1 for i in transition_indexes(shapes)), depth - 1),
        patch_kernel=patch[2:] if len(patch) == 4 else None,
        grid=grid_side(position),
        mlp_ratio=hidden[0] / hidden[1] if hidden and len(hidden) == 2 and hidden[1] else None,
        head_dim=pool[0] if pool else None,
    )


def grid_side(shape: tuple[int, ...]) -> int | None:
    """Side of the square grid of a position embedding of this shape, (1, N, C); None if it has none."""
    if len(shape) != 3 or shape[0] != 1:
        return None
    side = math.isqrt(shape[1])
    return side if side and side * side == shape[1] else None
