"""Detectron2's own ViT and MViT under the heads and recipe of this project, to compare with.

They take the sizes of ``MODEL.REV_VIT`` and ``MODEL.REV_MVIT``. The ViT is the plain one. Detectron2's MViT
is wired as MViTv2: a transition widens inside its attention, beside a skip connection that is projected and
pooled by maximum, and every query is pooled. As built here, without relative positions, residual pooling and
windows, it has MViT-B's blocks, widths, heads and strides, but not exactly its parameters.

``MODEL.REV.ACTIVATIONS`` "checkpoint" recomputes block by block; the other values train in the ordinary way.
"""

from __future__ import annotations

from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch.utils.checkpoint import checkpoint

from .build import PYRAMID_STRIDES, fpn, rev_mvit, rev_vit, simple_pyramid, with_rev_det_keys


@BACKBONE_REGISTRY.register()
def build_baseline_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ``ViT`` with the sizes of ``MODEL.REV_VIT`` under the simple pyramid, p2 .. p6.

    Raises:
        ImportError: timm is not installed.
        ValueError: a value that `RevViT` refuses as well.
    """
    cfg = with_rev_det_keys(cfg)
    # Detectron2's class takes its arguments as they come; ours names the wrong ones.
    with torch.device("meta"):
        rev_vit(cfg, input_shape)
    node = cfg.MODEL.REV_VIT
    vit = _detectron2_class("ViT")(
        img_size=node.PRETRAIN_IMG_SIZE,
        patch_size=node.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        drop_path_rate=node.DROP_PATH_RATE,
        pretrain_img_size=node.PRETRAIN_IMG_SIZE,
        pretrain_use_cls_token=False,
        out_feature=node.OUT_FEATURE,
    )
    _checkpoint_blocks(cfg, vit)
    return simple_pyramid(cfg, vit, PYRAMID_STRIDES, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_baseline_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ``MViT`` with the sizes of ``MODEL.REV_MVIT`` under an FPN, p2 .. p6.

    Raises:
        ImportError: timm is not installed.
        ValueError: a value that `RevMViT` refuses as well.
    """
    cfg = with_rev_det_keys(cfg)
    # Detectron2's class takes its arguments as they come; ours names the wrong ones.
    with torch.device("meta"):
        rev_mvit(cfg, input_shape)
    node = cfg.MODEL.REV_MVIT
    mvit = _detectron2_class("MViT")(
        img_size=node.PRETRAIN_IMG_SIZE,
        patch_kernel=node.PATCH_KERNEL,
        patch_stride=node.PATCH_STRIDE,
        patch_padding=node.PATCH_PADDING,
        in_chans=input_shape.channels,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        last_block_indexes=node.LAST_BLOCK_INDEXES,
        qkv_pool_kernel=node.QKV_POOL_KERNEL,
        adaptive_kv_stride=node.ADAPTIVE_KV_STRIDE,
        adaptive_window_size=0,
        residual_pooling=False,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        drop_path_rate=node.DROP_PATH_RATE,
        use_abs_pos=True,
        use_rel_pos=False,
        pretrain_img_size=node.PRETRAIN_IMG_SIZE,
        pretrain_use_cls_token=False,
        out_features=node.OUT_FEATURES,
    )
    _checkpoint_blocks(cfg, mvit)
    return fpn(cfg, mvit, LastLevelMaxPool())


def _checkpoint_blocks(cfg: CfgNode, backbone: Backbone) -> None:
    # Detectron2's own switch needs fairscale.
    if cfg.MODEL.REV.ACTIVATIONS == "checkpoint":
        for block in backbone.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _detectron2_class(name: str) -> type[Backbone]:
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Detectron2's {name} needs timm, which is not installed: pip install timm"
        ) from error
    from detectron2.modeling.backbone import mvit, vit

    return getattr({"ViT": vit, "MViT": mvit}[name], name)
