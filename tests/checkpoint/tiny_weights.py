"""Tiny models, and their weights as the official code, mmpretrain and Detectron2 write them."""

import json
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from reference import DATA, Vectors

from rev_det import add_rev_det_config
from rev_det.checkpoint import load_pretrained
from rev_det.modeling import RevMViT, RevViT

VIT = {"embed_dim": 32, "depth": 4, "num_heads": 4, "pretrain_img_size": 64}
MVIT = {
    "embed_dim": 16,
    "depth": 6,
    "last_block_indexes": (0, 2, 5),
    "pretrain_img_size": 64,
    "out_features": ("scale2", "scale3", "scale4"),
}


def make_vit(**changes):
    return RevViT(**{**VIT, **changes})


def make_mvit(**changes):
    return RevMViT(**{**MVIT, **changes})


def official_state(name):
    """State dict of a tiny official model, in float32."""
    return {key: value.float() for key, value in Vectors("parity_tiny.npz", f"{name}|").state().items()}


def pyslowfast_container(state, num_heads=4):
    """What the official saver writes."""
    return {
        "epoch": 3,
        "model_state": state,
        "optimizer_state": {"state": {}, "param_groups": []},
        "cfg": f"MODEL:\n  NUM_CLASSES: 10\nMVIT:\n  DEPTH: 4\n  NUM_HEADS: {num_heads}\n",
    }


def mmpretrain_state(state):
    """An official Rev-ViT state dict under mmpretrain's keys, by the mapping that was measured."""
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("rev_backbone."))
    mapping = json.loads((DATA / "mmpretrain_keys.json").read_text())
    renamed = {}
    for theirs, official in mapping.items():
        for layer in range(depth) if ".N." in theirs else [""]:
            values = [state[key.replace(".N.", f".{layer}.")] for key in official]
            renamed[theirs.replace(".N.", f".{layer}.")] = torch.cat(values)
    return renamed


def without_prefix(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items()}


def same(state, expected):
    """Whether two state dicts are equal to the bit."""
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def detector_config(
    backbone="build_rev_mvit_fpn_backbone", classes=3, mask=True, arch="GeneralizedRCNN", norm=""
):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    for node, arguments in ((cfg.MODEL.REV_VIT, VIT), (cfg.MODEL.REV_MVIT, MVIT)):
        for key, value in arguments.items():
            node[key.upper()] = value
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.MASK_ON = mask
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.FPN.IN_FEATURES = []
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.FPN.NORM = norm
    names = {"build_rev_vit_backbone": ["last_feat"], "build_rev_mvit_backbone": ["scale4"]}
    names = names.get(backbone, ["p3", "p4"])
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.RETINANET.IN_FEATURES = names
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]] if len(names) == 1 else [[32], [64]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    return cfg


def make_detector(*args, **kwargs):
    return build_model(detector_config(*args, **kwargs))


def renumbered(key):
    """Our name of an official backbone key, written out independently of the package."""
    key = re.sub(r"^rev_backbone\.layers\.", "blocks.", key)
    return key.replace(".pre_q_fuse.fuse_fn.", ".fuse.")


def refuse(model, source, words, **options):
    """Loading is a ValueError that says the words, and leaves the model as it is."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=words) as info:
        load_pretrained(model, source, **options)
    assert same(model.state_dict(), before)
    return str(info.value)
