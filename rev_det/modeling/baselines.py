"""Detectron2's own ViT and MViT under the heads and recipe of this project, to compare with.

They take the sizes of ``MODEL.REV_VIT`` and ``MODEL.REV_MVIT``. The ViT is the plain one. Detectron2's MViT
is wired as MViTv2: a transition widens inside its attention, beside a skip connection that is projected and
pooled by maximum, and every query is pooled. As built here, without relative positions, residual pooling and
windows, it has MViT-B's blocks, widths, heads and strides, but not exactly its parameters.

``MODEL.REV.ACTIVATIONS`` "checkpoint" recomputes block by block; the other values train in the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, MViT, ViT
from detectron2.modeling.backbone import mvit, swin, vit
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn
from torch.utils.checkpoint import checkpoint

from .build import PYRAMID_STRIDES, fpn, rev_mvit, rev_vit, simple_pyramid, with_rev_det_keys


@BACKBONE_REGISTRY.register()
def build_baseline_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ``ViT`` with the sizes of ``MODEL.REV_VIT`` under the simple pyramid, p2 .. p6.

    Raises:
        ImportError: timm is not installed.
        ValueError: a value that `RevViT` refuses as well.
    """
    vit = _stock_backbone(ViT, "REV_VIT", rev_vit, cfg, input_shape)
    return simple_pyramid(cfg, vit, PYRAMID_STRIDES, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_baseline_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ``MViT`` with the sizes of ``MODEL.REV_MVIT`` under an FPN, p2 .. p6.

    Raises:
        ImportError: timm is not installed.
        ValueError: a value that `RevMViT` refuses as well.
    """
    others = {"adaptive_window_size": 0, "residual_pooling": False, "use_rel_pos": False}
    mvit = _stock_backbone(MViT, "REV_MVIT", rev_mvit, cfg, input_shape, **others)
    return fpn(cfg, mvit, LastLevelMaxPool())


def _stock_backbone(
    cls: type[Backbone], node: str, ours: Callable, cfg: CfgNode, input_shape: ShapeSpec, **others
) -> Backbone:
    """Detectron2's class, with what a node of the config says of ours."""
    cfg = with_rev_det_keys(cfg)
    # Detectron2's class takes its arguments as they come; ours names the wrong ones.
    with torch.device("meta"):
        ours(cfg, input_shape)
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Detectron2's {cls.__name__} needs timm, which is not installed: pip install timm"
        ) from error
    # Detectron2 calls its arguments as our keys are called, and has no two streams to fuse.
    sizes = {key.lower(): value for key, value in cfg.MODEL[node].items() if key != "FUSION"}
    backbone = cls(
        in_chans=input_shape.channels,
        img_size=sizes["pretrain_img_size"],
        use_abs_pos=True,
        pretrain_use_cls_token=False,
        **sizes,
        **others,
    )
    if cfg.MODEL.REV.ACTIVATIONS == "checkpoint":
        checkpoint_blocks(backbone)
    return backbone


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Let torch's checkpointing recompute each block of a ViT, MViT or SwinTransformer of Detectron2.

    Detectron2's own switch needs fairscale for the first two.
    """
    for module in backbone.modules():
        if isinstance(module, (vit.Block, mvit.MultiScaleBlock, swin.SwinTransformerBlock)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
