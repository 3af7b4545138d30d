"""Registered builders: a config becomes the keyword arguments of a backbone and its pyramid."""

from __future__ import annotations

import itertools
import logging

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ..config import add_rev_det_config
from ..rules import check_config
from .backbone import FeatureShapes, pad_to_multiple
from .rev_mvit import RevMViT
from .rev_vit import RevViT

logger = logging.getLogger(__name__)

# Of the simple pyramid's levels p2 .. p5 for a patch size of 16, as in ViTDet.
PYRAMID_STRIDES = (4, 8, 16, 32)

# Constructor arguments that MODEL.REV holds.
_SHARED = ("ACTIVATIONS", "KEEP_ATTENTION", "FREEZE_AT", "TERMINATION", "INNER_RESIDUAL")
# Detectron2's default of MODEL.BACKBONE.FREEZE_AT, which cannot be told from an explicit 2.
_DEFAULT_FREEZE_AT = 2
# Addresses of weights in Detectron2's model zoo.
_STOCK_ZOO = "detectron2://"


class RevSimpleFeaturePyramid(SimpleFeaturePyramid):
    """Detectron2's `SimpleFeaturePyramid`, for images of any size.

    The parent announces the padding it needs under a misspelt name, so that a detector does not pad; here it
    is announced correctly, and what still arrives unpadded is padded with zeros.
    """

    @property
    def size_divisibility(self) -> int:
        """Height and width of the images are padded to a multiple of this many pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(super().output_shape())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(pad_to_multiple(x, self._size_divisibility))


class RevFPN(FPN):
    """Detectron2's `FPN`, for images of any size: its sums need multiples of the last stride."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(super().output_shape())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(pad_to_multiple(x, self._size_divisibility))


@BACKBONE_REGISTRY.register()
def build_rev_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RevViT:
    """RevViT from ``MODEL.REV_VIT`` and ``MODEL.REV``: one feature map at the patch stride."""
    _warn_of_stock_weights(cfg)
    return rev_vit(with_rev_det_keys(cfg), input_shape)


@BACKBONE_REGISTRY.register()
def build_rev_mvit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RevMViT:
    """RevMViT from ``MODEL.REV_MVIT`` and ``MODEL.REV``: feature maps at strides 4, 8, 16 and 32."""
    _warn_of_stock_weights(cfg)
    return rev_mvit(with_rev_det_keys(cfg), input_shape)


@BACKBONE_REGISTRY.register()
def build_rev_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """RevViT under ViTDet's simple pyramid, p2 .. p6 (``FPN.OUT_CHANNELS`` and ``FPN.NORM`` apply)."""
    return simple_pyramid(cfg, build_rev_vit_backbone(cfg, input_shape), PYRAMID_STRIDES, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_rev_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """RevViT under ViTDet's simple pyramid with RetinaNet's levels, p3 .. p7."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return simple_pyramid(cfg, build_rev_vit_backbone(cfg, input_shape), PYRAMID_STRIDES[1:], top_block)


@BACKBONE_REGISTRY.register()
def build_rev_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """RevMViT under an FPN, p2 .. p6."""
    return fpn(cfg, build_rev_mvit_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_rev_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """RevMViT under an FPN with RetinaNet's levels, p3 .. p7."""
    return fpn(cfg, build_rev_mvit_backbone(cfg, input_shape))


def rev_vit(cfg: CfgNode, input_shape: ShapeSpec) -> RevViT:
    """RevViT as a config with rev_det's keys says.

    Raises:
        ValueError: a key of ``MODEL.REV_VIT`` or ``MODEL.REV`` has a value that is not allowed.
    """
    return _construct(RevViT, cfg, "REV_VIT", _SHARED, input_shape)


def rev_mvit(cfg: CfgNode, input_shape: ShapeSpec) -> RevMViT:
    """RevMViT as a config with rev_det's keys says.

    Raises:
        ValueError: a key of ``MODEL.REV_MVIT`` or ``MODEL.REV`` has a value that is not allowed.
    """
    return _construct(RevMViT, cfg, "REV_MVIT", (*_SHARED, "TRANSITIONS"), input_shape)


def _construct(
    cls: type[Backbone], cfg: CfgNode, node: str, shared: tuple[str, ...], input_shape: ShapeSpec
) -> Backbone:
    values = dict(cfg.MODEL[node]) | {key: cfg.MODEL.REV[key] for key in shared}
    try:
        return cls(in_chans=input_shape.channels, **{key.lower(): value for key, value in values.items()})
    except ValueError as error:
        # The message begins with the argument, of which the user of a config knows the key.
        key = str(error).partition(" ")[0].upper()
        if key not in values:
            raise
        raise ValueError(f"MODEL.{'REV' if key in shared else node}.{key}: {error}") from error


def with_rev_det_keys(cfg: CfgNode) -> CfgNode:
    """The config itself if it has rev_det's keys, else (a stock config) a copy with their defaults."""
    is_stock, freeze_at = "REV" not in cfg.MODEL, cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0 and (is_stock or freeze_at != _DEFAULT_FREEZE_AT):
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT %d counts the stages of a ResNet and is ignored; MODEL.REV.FREEZE_AT "
            "freezes parts of this backbone",
            freeze_at,
        )
    pretrained = cfg.MODEL.WEIGHTS and not _has_stock_weights(cfg)
    if pretrained and (cfg.INPUT.FORMAT != "RGB" or min(cfg.MODEL.PIXEL_STD) <= 1.0):
        logger.warning(
            "The pretrained weights expect RGB images with ImageNet's statistics, but INPUT.FORMAT is %s and "
            "MODEL.PIXEL_STD %s; set INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and "
            "MODEL.PIXEL_STD [58.395, 57.12, 57.375]",
            cfg.INPUT.FORMAT,
            cfg.MODEL.PIXEL_STD,
        )
    if not is_stock:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    add_rev_det_config(cfg)
    logger.info("The config has no MODEL.REV nodes: the backbone gets rev_det's defaults (the -B models).")
    return cfg


def _has_stock_weights(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.WEIGHTS) and cfg.MODEL.WEIGHTS.startswith(_STOCK_ZOO)


def _warn_of_stock_weights(cfg: CfgNode) -> None:
    # Detectron2's checkpointer would list the names of all tensors, and leave the backbone random.
    if _has_stock_weights(cfg):
        logger.warning(
            "MODEL.WEIGHTS %s is of Detectron2's model zoo, which has nothing for this backbone; set it to a "
            "Rev-ViT or Rev-MViT file, or to '' to train from scratch",
            cfg.MODEL.WEIGHTS,
        )


def fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module | None = None) -> RevFPN:
    """An FPN as ``MODEL.FPN`` says over a backbone with several scales.

    Args:
        top_block: makes the levels above the last scale; None for RetinaNet's P6 and P7.

    Raises:
        ValueError: ``FPN.IN_FEATURES`` are not neighbouring scales of the backbone, or another key of ``FPN``
            has a value that is not allowed.
    """
    _check_pyramid(cfg)
    shapes = bottom_up.output_shape()
    scales = list(shapes)
    in_features = list(map(str, cfg.MODEL.FPN.IN_FEATURES)) or scales
    if any(name.startswith("res") for name in in_features):
        # A stock config names ResNet's stages, of the same strides.
        names = [name.replace("res", "scale") for name in in_features]
        logger.warning("MODEL.FPN.IN_FEATURES %s is replaced with %s", in_features, names)
        in_features = names
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES has {missing}, which the backbone does not return; "
            f"allowed are MODEL.REV_MVIT.OUT_FEATURES: {scales}"
        )
    strides = [shapes[name].stride for name in in_features]
    if any(after != 2 * before for before, after in itertools.pairwise(strides)):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {in_features}, of strides {strides}; it must be neighbouring scales, "
            f"each of twice the stride of the one before, from {scales}"
        )
    if isinstance(bottom_up, RevMViT):
        # A norm that nothing reads would be without a gradient, which DistributedDataParallel refuses.
        bottom_up.drop_outputs(set(scales) - set(in_features))
    last = in_features[-1]
    if top_block is None:
        top_block = LastLevelP6P7(shapes[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    elif isinstance(top_block, LastLevelMaxPool):
        # Detectron2's is fixed to p5; three stages end at p4.
        top_block.in_feature = f"p{strides[-1].bit_length() - 1}"
    return RevFPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def simple_pyramid(
    cfg: CfgNode, net: Backbone, strides: tuple[int, ...], top_block: nn.Module
) -> RevSimpleFeaturePyramid:
    """ViTDet's simple pyramid over a backbone with one feature map.

    Args:
        strides: of the levels, ``top_block`` makes those above.

    Raises:
        ValueError: the feature map's stride does not lead to these levels, or a key of ``FPN`` has a value
            that is not allowed.
    """
    _check_pyramid(cfg)
    (name, shape), *_ = net.output_shape().items()
    scale_factors = [shape.stride / stride for stride in strides]
    if not set(scale_factors) <= {4.0, 2.0, 1.0, 0.5}:
        raise ValueError(
            f"MODEL.REV_VIT.PATCH_SIZE must be 16 for a pyramid of strides {strides}, got {shape.stride}"
        )
    if 4.0 in scale_factors:
        _check_norm(cfg, shape.channels // 2, "MODEL.REV_VIT.EMBED_DIM")
    return RevSimpleFeaturePyramid(
        net=net,
        in_feature=name,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=scale_factors,
        top_block=top_block,
        # The pyramid cannot be built without a norm; an empty FPN.NORM, Detectron2's default, means ViTDet's.
        norm=cfg.MODEL.FPN.NORM or "LN",
    )


def _check_pyramid(cfg: CfgNode) -> None:
    check_config(cfg, "MODEL.FPN.")
    _check_norm(cfg, cfg.MODEL.FPN.OUT_CHANNELS, "MODEL.FPN.OUT_CHANNELS")


def _check_norm(cfg: CfgNode, channels: int, key: str) -> None:
    """Check that ``FPN.NORM`` exists and can have this many channels, which follow from a key."""
    name = cfg.MODEL.FPN.NORM
    try:
        get_norm(name, channels)
    except KeyError as error:
        raise ValueError(
            f"MODEL.FPN.NORM is {name!r}; allowed are '' for none, BN, SyncBN, FrozenBN, GN and LN"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"MODEL.FPN.NORM is {name!r}, which {channels} channels (from {key}) cannot have: {error}"
        ) from error
