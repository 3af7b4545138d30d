"""The training step of a whole detector on made-up images, to be counted here or measured on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor

from .cost import Rates
from .counting import Counter, StepCount
from .skipping import SkipArithmetic

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Annotated objects in each image: some more than COCO's average of 7.
NUM_OBJECTS = 16


class DetectorStep:
    """A detector, its optimizer, and one batch of made-up images to train on again and again.

    After `settle`, the images' objects are some of the detector's own proposals, so that RoI heads find their
    full share of foreground, as they do in the course of real training.

    Args:
        cfg: a config with rev_det's keys; no weights are loaded.
        batch: images in a step.
        size: (H, W) of the images in pixels.
        make_trainer: given the config and batches without end, makes what trains on them.

    Raises:
        ValueError: the detector needs annotations that are not made up here, or cannot be built.
    """

    def __init__(
        self,
        cfg: CfgNode,
        batch: int,
        size: tuple[int, int],
        make_trainer: Callable[[CfgNode, Iterable[list[dict[str, Any]]]], SimpleTrainer],
    ):
        if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"):
            raise ValueError(
                "a training step can be made up for detectors of boxes and masks, not with MODEL.KEYPOINT_ON "
                f"{cfg.MODEL.KEYPOINT_ON} and MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}; "
                "rev-det analyze leaves it out with --no-fits"
            )
        self.cfg, self.size = cfg, size
        self.batch = [self._image(_spread_boxes(size)) for _ in range(batch)]
        self.storage = EventStorage()
        self._trainer = make_trainer(cfg, repeat(self.batch))
        self.model, self.optimizer = self._trainer.model, self._trainer.optimizer

    def run(self) -> None:
        """Forward, backward, clipping and update."""
        with self.storage:
            self._trainer.iter = self.storage.iter
            self._trainer.run_step()
            self.storage.step()

    def settle(self) -> None:
        """Take a first step, which makes the optimizer's state, and choose the objects from its proposals."""
        found: list[Tensor] = []
        generator = getattr(self.model, "proposal_generator", None)
        if generator is None:
            self.run()
            return
        hook = generator.register_forward_hook(
            lambda module, inputs, result: found.extend(x.proposal_boxes.tensor.detach() for x in result[0])
        )
        self.run()
        hook.remove()
        self.batch[:] = [self._image(_some(boxes.cpu())) for boxes in found]

    def release(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def resize(self, size: tuple[int, int]) -> None:
        """Go on with images of another size, (H, W) in pixels, whose objects are spread over them."""
        self.size = size
        self.batch[:] = [self._image(_spread_boxes(size)) for _ in self.batch]

    def rois(self) -> dict[str, float]:
        """RoIs of an image in the last step: of the box head, and of the mask head (foreground)."""
        latest = {name: value for name, (value, _) in self.storage.latest().items()}
        foreground = latest.get("roi_head/num_fg_samples", 0.0)
        return {"box": foreground + latest.get("roi_head/num_bg_samples", 0.0), "mask": foreground}

    def _image(self, boxes: Tensor) -> dict[str, Any]:
        height, width = self.size
        instances = Instances(self.size, gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
        if self.cfg.MODEL.MASK_ON:
            corners = boxes.double()[:, [0, 1, 2, 1, 2, 3, 0, 3]].numpy()
            masks = PolygonMasks([[corner] for corner in corners])
            if self.cfg.INPUT.MASK_FORMAT != "polygon":
                masks = BitMasks.from_polygon_masks(masks, height, width)
            instances.gt_masks = masks
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        return {"image": image, "height": height, "width": width, "instances": instances}


def count_detector(step: DetectorStep, device_rules: str = "cuda", rates: Rates | None = None) -> StepCount:
    """Count a whole training step, optimizer included, as every later one is after the first.

    Args:
        step: on the CPU, not run yet; of no further use.
        device_rules, rates: see `Counter`.

    Returns:
        the count; its outputs are the backbone's.
    """
    if device_rules == "cuda":
        # As on CUDA: all parameters are updated at once, without a copy of them.
        for group in step.optimizer.param_groups:
            group["fused"] = True
    with SkipArithmetic(step.model.backbone):
        step.settle()
        images = [image["image"] for image in step.batch]
        with Counter(step.model, step.optimizer, images, device_rules, rates) as counter:
            mark = lambda module, inputs, features: counter.outputs(features.values())  # noqa: E731
            hook = step.model.backbone.register_forward_hook(mark)
            step.run()
            hook.remove()
        return counter.result()


def _spread_boxes(size: tuple[int, int]) -> Tensor:
    """`NUM_OBJECTS` squares (x0, y0, x1, y1) on a grid over the image."""
    side = math.isqrt(NUM_OBJECTS)
    height, width = size[0] / side, size[1] / side
    corners = [(j * width, i * height) for i in range(side) for j in range(side)]
    extent = min(width, height)
    return torch.tensor([(x, y, x + extent, y + extent) for x, y in corners])


def _some(boxes: Tensor) -> Tensor:
    """`NUM_OBJECTS` of the boxes, if there are as many, far from each other in the list."""
    return boxes[:: max(1, len(boxes) // NUM_OBJECTS)][:NUM_OBJECTS].clone()
