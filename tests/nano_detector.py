"""A detector of a few channels, and images, for the tests of prediction."""

import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from rev_det import model_zoo

CLASSES = ("ant", "bee", "cat")
CATEGORY_IDS = (3, 7, 8)
HEIGHT, WIDTH = 48, 64


def save_image(path: Path, seed: int, height: int = HEIGHT, width: int = WIDTH) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def save_video(path: Path, frames) -> str:
    """Write (H, W, 3) RGB pictures as an AVI of JPEG, at 12 frames a second."""
    height, width = frames[0].shape[:2]
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(os.fsencode(path), codec, 12.0, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    writer.release()
    return str(path)


def nano_config(dataset_json: str | None = None):
    cfg = model_zoo.get_config("mask_rcnn_rev_mvit_nano_fpn")
    mvit = cfg.MODEL.REV_MVIT
    mvit.EMBED_DIM, mvit.DEPTH, mvit.LAST_BLOCK_INDEXES, mvit.PRETRAIN_IMG_SIZE = 8, 8, (0, 2, 5, 7), 64
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    if dataset_json:
        cfg.DATASETS.COCO_JSON = [["own", dataset_json, "nowhere"]]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("own",)
    return cfg
