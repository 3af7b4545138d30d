"""Training augmentations by name, put together from Detectron2's own."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..checks import check_choice, check_count, is_finite, is_whole

if TYPE_CHECKING:
    from detectron2.config import CfgNode

AUGMENTATIONS = ("default", "swin", "lsj")

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
    check_choice("INPUT.AUGMENTATION", name, AUGMENTATIONS)
    check_choice("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("none", "horizontal", "vertical"))
    _check_sizes(cfg)
    augmentations = utils.build_augmentation(cfg, is_train)
    if is_train and cfg.INPUT.CROP.ENABLED:
        _check_crop(cfg, name)
    if not (is_train and crops_by_name(cfg)):
        return augmentations
    if name == "lsj":
        size, (smallest, largest) = _lsj_values(cfg)
    _require_shapely(cfg, f"INPUT.AUGMENTATION is {name!r}", "set INPUT.AUGMENTATION default")
    if name == "swin":
        branch = [
            T.ResizeShortestEdge(_BEFORE_CROP, _BEFORE_CROP_LONGEST, sample_style="choice"),
            T.RandomCrop("absolute_range", _CROP),
        ]
        return [RandomBranch(T.AugmentationList(branch)), *augmentations]
    flips = augmentations[1:]
    return [T.ResizeScale(smallest, largest, size, size), T.FixedSizeCrop((size, size)), *flips]


def crops_by_name(cfg: CfgNode) -> bool:
    """Whether ``INPUT.AUGMENTATION`` is one that crops training images."""
    return cfg.INPUT.get("AUGMENTATION", "default") != "default"


def _check_sizes(cfg: CfgNode) -> None:
    # Of a single pixel nothing is left to flip.
    for split, minimum in (("TRAIN", 2), ("TEST", 1)):
        check_count(f"INPUT.MAX_SIZE_{split}", cfg.INPUT[f"MAX_SIZE_{split}"], minimum)
    # For Detectron2, 0 is no resize.
    check_count("INPUT.MIN_SIZE_TEST", cfg.INPUT.MIN_SIZE_TEST, minimum=0)
    shortest, style = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    check_choice("INPUT.MIN_SIZE_TRAIN_SAMPLING", style, ("choice", "range"))
    # Outside of config files it may also be a single number.
    sizes = [shortest] * 2 if is_whole(shortest) else shortest
    valid = bool(sizes) and all(is_whole(size) and size >= 0 and size != 1 for size in sizes)
    if style == "range":
        valid = valid and len(sizes) == 2 and sizes[0] <= sizes[1]
    if not valid:
        form = "two, the smallest first" if style == "range" else "at least one"
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {shortest!r}; with INPUT.MIN_SIZE_TRAIN_SAMPLING {style!r} it must be "
            f"{form}, of short sides of at least 2 pixels (0 for no resize)"
        )


def _check_crop(cfg: CfgNode, name: str) -> None:
    if crops_by_name(cfg):
        raise ValueError(
            f"INPUT.AUGMENTATION is {name!r}, which crops on its own, but INPUT.CROP.ENABLED is True; "
            "set INPUT.CROP.ENABLED False, or INPUT.AUGMENTATION default"
        )
    style, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    check_choice("INPUT.CROP.TYPE", style, ("relative", "relative_range", "absolute", "absolute_range"))
    if style.startswith("relative"):
        valid, form = all(is_finite(side) and 0 < side <= 1 for side in size), "shares above 0 and at most 1"
    else:
        valid, form = all(is_whole(side) and side >= 1 for side in size), "numbers of pixels"
    if style == "absolute_range":
        valid, form = valid and list(size) == sorted(size), f"{form}, the smaller first"
    if not valid or len(size) != 2:
        raise ValueError(f"INPUT.CROP.SIZE is {size!r}; with INPUT.CROP.TYPE {style!r} it must be two {form}")
    _require_shapely(cfg, "INPUT.CROP.ENABLED is True", "set INPUT.CROP.ENABLED False")


def _require_shapely(cfg: CfgNode, reason: str, otherwise: str) -> None:
    # Detectron2 imports it only when the first polygon is cropped, in a worker of a running training.
    if cfg.MODEL.MASK_ON and find_spec("shapely") is None:
        raise ValueError(
            f"{reason}, and cropping masks needs the package shapely, which is not installed: "
            f"pip install shapely, or {otherwise}"
        )


def _lsj_values(cfg: CfgNode) -> tuple[int, tuple[float, float]]:
    size, scales = cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.SCALES
    check_count("INPUT.LSJ.SIZE", size)
    if len(scales) != 2 or not all(map(is_finite, scales)) or not 0 < scales[0] <= scales[1]:
        raise ValueError(
            f"INPUT.LSJ.SCALES is {scales!r}; it must be the smallest and the largest factor, both above 0, "
            "such as (0.1, 2.0)"
        )
    return size, tuple(scales)
