"""Training augmentations by name, put together from Detectron2's own."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..rules import check_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# The crop branch of DETR (arXiv 2005.12872), taken over by Swin (arXiv 2103.14030): short sides and longest
# side before the crop, and the range of the crop's sides, in pixels. INPUT.MIN_SIZE_TRAIN follows.
_BEFORE_CROP, _BEFORE_CROP_LONGEST = (400, 500, 600), 4200
_CROP = (384, 600)


class RandomBranch(T.RandomApply):
    """Detectron2's ``RandomApply``, readable in logs."""

    def __repr__(self) -> str:
        return f"RandomBranch({self.aug.augs}, prob={self.prob})"

    __str__ = __repr__


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations that ``INPUT.AUGMENTATION`` names; at test time always Detectron2's resize.

    - "default": Detectron2's resize of the short side to one of ``INPUT.MIN_SIZE_TRAIN`` and flip.
    - "swin": the same, with probability 1/2 after a resize of the short side to 400, 500 or 600 and a crop of
      384 to 600 pixels a side (recipe of the paper, supplementary B, after Swin).
    - "lsj": large-scale jitter: the image that just fits into a square of ``INPUT.LSJ.SIZE`` pixels, resized
      by a factor drawn from ``INPUT.LSJ.SCALES`` and cropped or padded to that square; flip.

    Args:
        cfg: a config; without rev_det's keys it gets "default".
        is_train: False for test time.

    Raises:
        ValueError: an unknown name or a value out of range; "swin" or "lsj", which crop on their own, with
            ``INPUT.CROP``; crops of masks without the package shapely.
    """
    name = cfg.INPUT.get("AUGMENTATION", "default")
    check_config(cfg, "INPUT.")
    augmentations = utils.build_augmentation(cfg, is_train)
    if is_train and cfg.INPUT.CROP.ENABLED:
        if crops_by_name(cfg):
            raise ValueError(
                f"INPUT.AUGMENTATION is {name!r}, which crops on its own, but INPUT.CROP.ENABLED is True; "
                "set INPUT.CROP.ENABLED False, or INPUT.AUGMENTATION default"
            )
        _require_shapely(cfg, "INPUT.CROP.ENABLED is True", "set INPUT.CROP.ENABLED False")
    if not (is_train and crops_by_name(cfg)):
        return augmentations
    _require_shapely(cfg, f"INPUT.AUGMENTATION is {name!r}", "set INPUT.AUGMENTATION default")
    if name == "swin":
        branch = [
            T.ResizeShortestEdge(_BEFORE_CROP, _BEFORE_CROP_LONGEST, sample_style="choice"),
            T.RandomCrop("absolute_range", _CROP),
        ]
        return [RandomBranch(T.AugmentationList(branch)), *augmentations]
    size, flips = cfg.INPUT.LSJ.SIZE, augmentations[1:]
    return [T.ResizeScale(*cfg.INPUT.LSJ.SCALES, size, size), T.FixedSizeCrop((size, size)), *flips]


def crops_by_name(cfg: CfgNode) -> bool:
    """Whether ``INPUT.AUGMENTATION`` is one that crops training images."""
    return cfg.INPUT.get("AUGMENTATION", "default") != "default"


def _require_shapely(cfg: CfgNode, reason: str, otherwise: str) -> None:
    # Detectron2 imports it only when the first polygon is cropped, in a worker of a running training.
    if cfg.MODEL.MASK_ON and find_spec("shapely") is None:
        raise ValueError(
            f"{reason}, and cropping masks needs the package shapely, which is not installed: "
            f"pip install shapely, or {otherwise}"
        )
