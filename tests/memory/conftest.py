"""Configs of whole detectors."""

from pathlib import Path

import pytest
from detectron2.config import get_cfg

from rev_det import add_rev_det_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = {
    "nano": CONFIGS / "Quickstart" / "mask_rcnn_rev_mvit_nano_fpn.yaml",
    "rev_mvit_b": CONFIGS / "COCO-Detection" / "mask_rcnn_rev_mvit_b_fpn_3x.yaml",
}


@pytest.fixture
def config():
    """A function that reads one of `FILES` for the CPU, with keys and values that override it."""

    def read(*opts, file="nano"):
        cfg = get_cfg()
        add_rev_det_config(cfg)
        cfg.merge_from_file(str(FILES[file]))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
        return cfg

    return read
