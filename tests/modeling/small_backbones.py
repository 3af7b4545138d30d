"""Backbones of a few channels, a step of theirs, and an image to train detectors on."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks

from rev_det.modeling import RevMViT, RevViT

NANO = {
    RevViT: {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "pretrain_img_size": 64},
    RevMViT: {"embed_dim": 8, "depth": 9, "last_block_indexes": (0, 2, 6, 8), "pretrain_img_size": 64},
}
FAMILIES = pytest.mark.parametrize("cls", [RevViT, RevMViT])


def make(cls, dtype=torch.float64, **arguments):
    torch.manual_seed(0)
    return cls(**{**NANO[cls], **arguments}).to(dtype)


def images(batch=2, height=75, width=50, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def loss_of(outputs):
    return sum(
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs.values()
    )


def step(model, x, seed=5):
    """Loss, gradients of the images (if wanted) and all trainable parameters; ``seed`` is for drop path."""
    torch.manual_seed(seed)
    loss = loss_of(model(x))
    wanted = [x] * x.requires_grad + [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, wanted)


def set_small_sizes(cfg):
    """Of both families' backbones in a config."""
    vit, mvit = cfg.MODEL.REV_VIT, cfg.MODEL.REV_MVIT
    vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS, vit.PRETRAIN_IMG_SIZE = 32, 2, 2, 64
    mvit.EMBED_DIM, mvit.DEPTH, mvit.LAST_BLOCK_INDEXES, mvit.PRETRAIN_IMG_SIZE = 8, 8, (0, 2, 5, 7), 64


def annotated_image(height, width, boxes):
    """One image with an object in each box, annotated with all that any detector learns."""
    generator = torch.Generator().manual_seed(0)
    instances = Instances((height, width), gt_boxes=Boxes(boxes))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.long)  # Keypoint R-CNN has this class alone
    outlines = [np.array([x0, y0, x1, y0, x1, y1, x0, y1]) for x0, y0, x1, y1 in boxes.double().tolist()]
    instances.gt_masks = PolygonMasks([[outline] for outline in outlines])
    middles = boxes.view(-1, 2, 2).mean(1)
    keypoints = torch.cat([middles, torch.full((len(boxes), 1), 2.0)], 1)  # visible
    instances.gt_keypoints = Keypoints(keypoints[:, None].repeat(1, 17, 1))
    return {
        "image": torch.rand(3, height, width, generator=generator) * 255,
        "instances": instances,
        "sem_seg": torch.randint(0, 54, (height, width), generator=generator),
        "height": height,
        "width": width,
    }
