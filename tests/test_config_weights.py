"""The weights that the configs name."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

import rev_det
from rev_det.checkpoint.layouts import backbone_prefix
from rev_det.checkpoint.named import PUBLISHED, read_geometry

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml"))


def load(name):
    cfg = get_cfg()
    rev_det.add_rev_det_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_nothing_or_a_well_formed_address(name):
    weights = load(name).MODEL.WEIGHTS
    assert weights == "" or re.fullmatch(
        r"https://[a-z0-9.-]+(/[\w.-]+)+\.pyth(#sha256=[0-9a-f]{64})?", weights
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("COCO-Detection/mask_rcnn_rev_")])
def test_a_coco_config_names_the_published_file_of_its_backbone_if_there_is_one(name):
    cfg = load(name)
    with torch.device("meta"):
        state = build_backbone(cfg).state_dict()
    prefix = backbone_prefix(state)
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    published = PUBLISHED.get(read_geometry(backbone).model)
    assert cfg.MODEL.WEIGHTS == (published.url if published else "")
