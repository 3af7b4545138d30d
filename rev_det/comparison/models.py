"""The models that are compared, and the ways of training them: ours, and Detectron2's own models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import MViT, SwinTransformer, ViT
from torch import nn

from ..config_files import default_config
from ..modeling import RevMViT, RevViT, low_memory
from ..modeling.backbone import ReversibleBackbone
from ..modeling.baselines import (
    build_baseline_mvit_fpn_backbone,
    build_baseline_vit_fpn_backbone,
    checkpoint_blocks,
)

# Blocks of the four stages at depth 24, transitions included; other depths keep the proportions (16 gives
# Rev-MViT-B's 1, 2, 11, 2).
_STAGE_SHARES = (2, 3, 16, 3)


@dataclass(frozen=True)
class Model:
    """A backbone that can be compared, by the constructor arguments of our class, or of Detectron2's."""

    title: str
    cls: type[nn.Module]
    arguments: dict[str, Any]

    @property
    def is_stock(self) -> bool:
        """Whether it is Detectron2's."""
        return not issubclass(self.cls, ReversibleBackbone)


MODELS = {
    "rev_vit_s": Model("Rev-ViT-S", RevViT, {"embed_dim": 384, "depth": 12, "num_heads": 6}),
    "rev_vit_b": Model("Rev-ViT-B", RevViT, {"embed_dim": 768, "depth": 12, "num_heads": 12}),
    "rev_vit_l": Model("Rev-ViT-L", RevViT, {"embed_dim": 1024, "depth": 24, "num_heads": 16}),
    "rev_mvit_b": Model("Rev-MViT-B", RevMViT, {"embed_dim": 96, "depth": 16, "num_heads": 1}),
}


def _vitdet(embed_dim: int, depth: int, num_heads: int, drop_path_rate: float) -> dict[str, Any]:
    """ViTDet's sizes (its section 3): four evenly spaced blocks have global attention, the others windows."""
    windows = [i for i in range(depth) if (i + 1) % (depth // 4)]
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "drop_path_rate": drop_path_rate}
    return sizes | {"window_size": 14, "window_block_indexes": windows, "use_rel_pos": True}


# Detectron2's own, as its projects ViTDet and MViTv2 train them.
STOCK_MODELS = {
    "vitdet_b": Model("ViTDet-B", ViT, _vitdet(768, 12, 12, 0.1)),
    "vitdet_l": Model("ViTDet-L", ViT, _vitdet(1024, 24, 16, 0.4)),
    "vitdet_h": Model("ViTDet-H", ViT, _vitdet(1280, 32, 16, 0.5)),
    "swin_b": Model(
        "Swin-B",
        SwinTransformer,
        {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.4},
    ),
    "mvitv2_b": Model(
        "MViTv2-B",
        MViT,
        {"embed_dim": 96, "depth": 24, "last_block_indexes": (1, 4, 20, 23), "drop_path_rate": 0.4},
    ),
}
CACHED, CHECKPOINT, CHECKPOINT_KEPT = "cached", "checkpoint", "checkpoint, attention kept"
REVERSIBLE, REVERSIBLE_KEPT = "reversible", "reversible, attention kept"
PAPER, DETECTRON2, AS_CONFIGURED = "reversible as published", "Detectron2's own", "as configured"
LOW_MEMORY = "low_memory"  # of Detectron2's models
# Constructor arguments of our classes, for each way of training.
TRAININGS: dict[str, dict[str, Any]] = {
    CACHED: {"activations": "cached"},
    CHECKPOINT: {"activations": "checkpoint", "keep_attention": False},
    CHECKPOINT_KEPT: {"activations": "checkpoint", "keep_attention": True},
    PAPER: {"activations": "reversible", "transitions": "cached", "keep_attention": False},
    REVERSIBLE: {"activations": "reversible", "keep_attention": False},
    REVERSIBLE_KEPT: {"activations": "reversible", "keep_attention": True},
    DETECTRON2: {},
    AS_CONFIGURED: {},
    LOW_MEMORY: {},
}
# Those in which Detectron2's own parts are computed as Detectron2 does.
PEERS = (CACHED, CHECKPOINT, CHECKPOINT_KEPT, PAPER, DETECTRON2)


def trainings(activations: Sequence[str], keep_attention: bool | None, peers: bool) -> list[str]:
    """The ways of training that a command line asks for, each once, peers first.

    Args:
        activations: of ``reversible.ACTIVATIONS``.
        keep_attention: None for the default of the models, which keep it.
        peers: ordinary autograd, both ways of checkpointing, and Detectron2's own model besides.

    Raises:
        ValueError: an unknown name in ``activations``.
    """
    ours = {"cached": CACHED, "checkpoint": CHECKPOINT, "reversible": REVERSIBLE}
    if keep_attention is not False:
        ours |= {"checkpoint": CHECKPOINT_KEPT, "reversible": REVERSIBLE_KEPT}
    unknown = [name for name in activations if name not in ours]
    if unknown:
        raise ValueError(f"--activations must be some of {', '.join(ours)}; got {unknown[0]!r}")
    wanted = [CACHED, CHECKPOINT, CHECKPOINT_KEPT, DETECTRON2] if peers else []
    return list(dict.fromkeys([*wanted, *(ours[name] for name in activations)]))


def has_baselines() -> bool:
    """Whether Detectron2's own ViT and MViT can be built: they import timm."""
    return find_spec("timm") is not None


def stages(depth: int) -> tuple[int, ...]:
    """``last_block_indexes`` of a Rev-MViT of this depth.

    Raises:
        ValueError: it is too shallow for four stages.
    """
    if depth < 7:
        raise ValueError(f"--depth of a Rev-MViT must be at least 7 (four stages), got {depth}")
    total = sum(_STAGE_SHARES)
    # Largest remainders; a stage has a reversible block, and the later ones a transition before it.
    least = (1, 2, 2, 2)
    sizes = [max(low, depth * share // total) for low, share in zip(least, _STAGE_SHARES, strict=True)]
    by_remainder = sorted(range(4), key=lambda i: -(depth * _STAGE_SHARES[i] % total))
    for i in by_remainder[: max(0, depth - sum(sizes))]:
        sizes[i] += 1
    sizes[2] += depth - sum(sizes)
    return tuple(sum(sizes[: i + 1]) - 1 for i in range(4))


def build(model: Model, training: str, depth: int | None = None, device: str = "meta") -> nn.Module:
    """Build a model for a way of training, in training mode.

    Args:
        model: of `MODELS`.
        training: of `TRAININGS`; of `DETECTRON2` see `rev_det.modeling.baselines`.
        depth: instead of the model's own.
        device: "meta" for a model to be counted, else where it is to run.

    Raises:
        ImportError: `DETECTRON2` without timm.
        ValueError: the depth is too small.
    """
    if model.is_stock:
        return _stock(model, training).to("cpu" if device == "meta" else device)
    arguments = {**model.arguments, "depth": depth or model.arguments["depth"]}
    if model.cls is RevMViT:
        arguments["last_block_indexes"] = stages(arguments["depth"])
    if training == DETECTRON2:
        return _detectron2(model, arguments).train().to("cpu" if device == "meta" else device)
    allowed = inspect.signature(model.cls).parameters
    arguments |= {key: value for key, value in TRAININGS[training].items() if key in allowed}
    with torch.device(device):
        return model.cls(**arguments).train()


def _stock(model: Model, training: str) -> nn.Module:
    backbone = model.cls(**model.arguments).train()
    if training == CHECKPOINT:
        checkpoint_blocks(backbone)
    return low_memory(backbone) if training == LOW_MEMORY else backbone


def _detectron2(model: Model, arguments: dict[str, Any]) -> nn.Module:
    cfg = default_config()
    is_mvit = model.cls is RevMViT
    node = cfg.MODEL.REV_MVIT if is_mvit else cfg.MODEL.REV_VIT
    for name, value in arguments.items():
        node[name.upper()] = value
    if is_mvit:
        return build_baseline_mvit_fpn_backbone(cfg, ShapeSpec(channels=3)).bottom_up
    return build_baseline_vit_fpn_backbone(cfg, ShapeSpec(channels=3)).net
