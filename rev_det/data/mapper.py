"""Detectron2's dataset mapper with rev_det's augmentations, and a clear error for undecodable images."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..files import printable
from ..rules import check_choice
from .augmentation import build_augmentations, crops_by_name
from .images import check_head, read_rgb

if TYPE_CHECKING:
    from detectron2.config import CfgNode


# Of those that Detectron2 reads, the ones that models can take: it makes YUV images in float64.
IMAGE_FORMATS = ("RGB", "BGR", "L")


class RevDatasetMapper(DatasetMapper):
    """``DatasetMapper`` with the augmentations of ``INPUT.AUGMENTATION`` that names unreadable image files.

    Pillow's own messages ("image file is truncated", "broken data stream") do not say which of a
    hundred thousand files is meant. Everything else is Detectron2's.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Detectron2's arguments for a config, and the augmentations of `build_augmentations`.

        Raises:
            ValueError: ``INPUT.FORMAT`` is not one that Detectron2 can train on; see `build_augmentations`.
        """
        check_choice("INPUT.FORMAT", cfg.INPUT.FORMAT, IMAGE_FORMATS)
        augmentations = build_augmentations(cfg, is_train)
        arguments = super().from_config(cfg, is_train)
        if is_train and crops_by_name(cfg):
            # As Detectron2 does for INPUT.CROP: what is left of an object has another box.
            arguments |= {"augmentations": augmentations, "recompute_boxes": cfg.MODEL.MASK_ON}
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset entry to what the model takes.

        Args:
            dataset_dict: an entry in Detectron2's dataset format.

        Returns:
            see ``DatasetMapper``.

        Raises:
            ValueError: the image is missing, cannot be decoded, has more than eight bits, or cannot be
                transformed.
        """
        name = dataset_dict["file_name"]
        try:
            check_head(name)
            return super().__call__(dataset_dict)
        except Exception as error:
            # Decoders raise many types (OSError, SyntaxError, struct.error, …) that other code raises
            # too, so ask the image itself whether it is the cause.
            _read(dataset_dict)
            if isinstance(error, ValueError) and name not in str(error):
                raise ValueError(f"image {printable(name)} cannot be used: {error}") from error
            raise

    def check_readable(self, dataset_dict: dict[str, Any]) -> None:
        """Read an entry's image, and drop it.

        Raises:
            ValueError: the image is missing, cannot be decoded, has more than eight bits, or another size
                than the entry says.
        """
        utils.check_image_size(dict(dataset_dict), _read(dataset_dict))

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        if all(anno.get("iscrowd", 0) for anno in dataset_dict["annotations"]):
            # Detectron2 would look for boxes in masks that it does not make where there are no instances.
            del dataset_dict["annotations"]
            dataset_dict["instances"] = utils.annotations_to_instances([], image_shape)
            return
        for anno in dataset_dict["annotations"]:
            _make_floating(anno)
        transforms = T.TransformList([_as_masks_see_it(transform) for transform in transforms.transforms])
        super()._transform_annotations(dataset_dict, transforms, image_shape)


def _read(dataset_dict: dict[str, Any]) -> np.ndarray:
    name = dataset_dict["file_name"]
    try:
        return read_rgb(name)
    except ValueError as error:
        raise ValueError(
            f"image {printable(name)} (image_id {dataset_dict.get('image_id')}) cannot be decoded: {error}; "
            "replace the file, or remove the image from the annotations"
        ) from error


def _make_floating(anno: dict[str, Any]) -> None:
    """Boxes and polygons given as integers, which Detectron2 would round down after each transform."""
    anno["bbox"] = [float(number) for number in anno["bbox"]]
    if isinstance(anno.get("segmentation"), list):
        anno["segmentation"] = [np.asarray(polygon, dtype=np.float64) for polygon in anno["segmentation"]]


def _as_masks_see_it(transform: T.Transform) -> T.Transform:
    """Padding with background: Detectron2's 255 is a semantic label, 'ignore', but true in a mask."""
    if not isinstance(transform, T.PadTransform):
        return transform
    transform = copy.copy(transform)
    transform.seg_pad_value = 0
    return transform
