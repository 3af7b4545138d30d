"""Boxes, masks and keypoints in float32 when a detector runs in mixed precision.

In some places Detectron2 rounds coordinates to the type of the features. bfloat16 has 8 significant bits:
between 512 and 1024 pixels, coordinates become multiples of 4.
"""

import logging

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead, keypoint_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, mask_rcnn_inference
from detectron2.structures import Instances
from torch import nn
from torchvision.ops import roi_align

from .derived import Methods, give_methods

logger = logging.getLogger(__name__)


class Float32RoIs(Methods):
    """For ``ROIAlign``: RoIs keep their precision, and features come to it.

    torchvision's operator takes one type for both, and under autocast it is float32 whatever it is given.
    """

    def forward(self, input, rois):
        if input.is_quantized:
            input = input.dequantize()
        dtype = torch.promote_types(input.dtype, rois.dtype)
        pooled = roi_align(
            input.to(dtype),
            rois.to(dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )
        return pooled.to(input.dtype)


class Float32Masks(Methods):
    """For mask heads: predicted masks are float32, and so is the grid they are pasted into the image with."""

    def forward(self, x, instances: list[Instances]):
        if self.training:
            return super().forward(x, instances)
        mask_rcnn_inference(self.layers(x).float(), instances)
        return instances


class Float32Keypoints(Methods):
    """For keypoint heads: predicted keypoints have the type of the heatmaps they are found in."""

    def forward(self, x, instances: list[Instances]):
        if self.training:
            return super().forward(x, instances)
        keypoint_rcnn_inference(self.layers(x).float(), instances)
        return instances


class Float32Boxes(Methods):
    """For FCOS's box transform: boxes have the type of the deltas. The other transforms decode in float32."""

    def apply_deltas(self, deltas, boxes):
        return super().apply_deltas(deltas.float(), boxes)


_METHODS = {
    ROIAlign: Float32RoIs,
    BaseMaskRCNNHead: Float32Masks,
    BaseKeypointRCNNHead: Float32Keypoints,
    Box2BoxTransformLinear: Float32Boxes,
}


def float32_boxes(model: nn.Module) -> nn.Module:
    """Make a Detectron2 detector compute where things are in float32 when it runs in mixed precision.

    That is: RoIs and FCOS's boxes in training and inference, pasted masks and keypoints in inference. The
    parts concerned get classes derived from their own; without autocast they compute what they did. Calling
    it again changes nothing. Parts whose own code replaces Detectron2's stay as they are, with a warning.

    Args:
        model: a detector that is built, or one in ``DistributedDataParallel``; changed in place.

    Returns:
        the model.
    """
    for name, reason in give_methods(model, _METHODS).items():
        logger.warning("%s may round coordinates in mixed precision, it is left as it is: %s", name, reason)
    return model
