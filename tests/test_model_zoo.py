"""The zoo: every config by name, from a checkout and from an installed package; models with weights."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from rev_det import add_rev_det_config, model_zoo
from rev_det.checkpoint import RevCheckpointer

ROOT = Path(__file__).resolve().parents[1]
MASK_RCNN = "COCO-Detection/mask_rcnn_rev_mvit_b_fpn_3x.yaml"
# Of Mask R-CNN with each backbone; the others follow from their heads, by hand.
MASK_RCNN_PARAMETERS = {"mvit": 58_797_552, "vit": 117_407_600}
MASK_HEAD = 4 * (256 * 256 * 9 + 256) + (256 * 256 * 4 + 256) + (256 * 80 + 80)
BOX_HEAD = (256 * 7 * 7 * 1024 + 1024) + (1024 * 1024 + 1024)
# Of 80 classes and background; a box for each class, or one for all in the cascade.
PREDICTOR, CASCADE_PREDICTOR = 1025 * (81 + 4 * 80), 1025 * (81 + 4)
CASCADE = 2 * BOX_HEAD + 3 * CASCADE_PREDICTOR - PREDICTOR


@pytest.fixture
def nano_zoo(monkeypatch):
    """Every model of the zoo with a backbone and heads of a few channels."""
    original = model_zoo.get_config

    def get_config(name, trained=False):
        cfg = original(name, trained)
        vit, mvit = cfg.MODEL.REV_VIT, cfg.MODEL.REV_MVIT
        vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS = 32, 2, 2
        mvit.EMBED_DIM, mvit.DEPTH, mvit.LAST_BLOCK_INDEXES = 8, 8, (0, 2, 5, 7)
        cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
        return cfg

    monkeypatch.setattr(model_zoo, "get_config", get_config)


def test_the_list_is_every_config_with_its_folder_and_nothing_else():
    files = {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert set(model_zoo.list()) == files - {"Base-RCNN-Rev-FPN.yaml"}
    assert model_zoo.list() == sorted(model_zoo.list())
    assert MASK_RCNN in model_zoo.list()


@pytest.mark.parametrize("name", model_zoo.list())
def test_names_without_folder_or_extension_mean_one_config_each(name):
    expected = str(ROOT / "configs" / name)
    folder, _, file = name.partition("/")
    stem = file.removesuffix(".yaml")
    for spelling in (name, f"{folder}/{stem}", file, stem):
        assert model_zoo.get_config_file(spelling) == expected


def test_an_unknown_name_comes_with_close_ones():
    with pytest.raises(
        ValueError, match="'mask_rcnn_mvit_b_fpn_3x'.*did you mean mask_rcnn_rev_mvit_b_fpn_3x"
    ):
        model_zoo.get_config_file("mask_rcnn_mvit_b_fpn_3x")
    with pytest.raises(ValueError, match="mean retinanet_rev_mvit_b_fpn_3x or retinanet_rev_vit_b_fpn_3x"):
        model_zoo.get_config_file("RetinaNet")
    with pytest.raises(ValueError, match="there are cascade_mask_rcnn_rev_mvit_b_fpn_3x, .*nano_fpn"):
        model_zoo.get_config_file("%%%")


def test_the_base_of_the_configs_is_no_model():
    with pytest.raises(ValueError, match="no model 'Base-RCNN-Rev-FPN.yaml'"):
        model_zoo.get_config_file("Base-RCNN-Rev-FPN.yaml")


def test_a_config_can_be_changed_and_names_the_backbones_weights():
    cfg = model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x")
    assert cfg.MODEL.WEIGHTS.endswith("/REV_MVIT_B.pyth")
    assert cfg.MODEL.BACKBONE.NAME == "build_rev_mvit_fpn_backbone"
    cfg.MODEL.REV.ACTIVATIONS = "cached"


def test_adding_the_keys_once_more_changes_nothing():
    cfg = model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x")
    before = cfg.dump()
    add_rev_det_config(cfg)
    assert cfg.dump() == before
    assert cfg.MODEL.REV_MVIT.DROP_PATH_RATE == 0.4  # its default is 0


def test_trained_detectors_are_not_published():
    with pytest.raises(ValueError, match="no trained weights are published for mask_rcnn.*weights="):
        model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x", trained=True)


def parameters(name: str) -> int:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


@pytest.mark.parametrize("family", ["mvit", "vit"])
def test_the_detectors_besides_mask_rcnn_have_their_size(family):
    mask_rcnn = MASK_RCNN_PARAMETERS[family]
    assert parameters(f"mask_rcnn_rev_{family}_b_fpn_3x") == mask_rcnn
    assert parameters(f"faster_rcnn_rev_{family}_b_fpn_3x") == mask_rcnn - MASK_HEAD
    assert parameters(f"cascade_mask_rcnn_rev_{family}_b_fpn_3x") == mask_rcnn + CASCADE
    counted = {"mvit": 51_206_260, "vit": 100_916_980}
    assert parameters(f"retinanet_rev_{family}_b_fpn_3x") == counted[family]


@pytest.mark.parametrize("family", ["mvit", "vit"])
@pytest.mark.parametrize("detector", ["faster_rcnn", "cascade_mask_rcnn", "retinanet"])
def test_the_other_detectors_share_backbone_and_recipe_with_mask_rcnn(detector, family):
    cfg = model_zoo.get_config(f"{detector}_rev_{family}_b_fpn_3x")
    mask_rcnn = model_zoo.get_config(f"mask_rcnn_rev_{family}_b_fpn_3x")
    node = f"REV_{family.upper()}"
    assert cfg.MODEL[node] == mask_rcnn.MODEL[node]
    assert (cfg.SOLVER, cfg.INPUT) == (mask_rcnn.SOLVER, mask_rcnn.INPUT)
    assert cfg.MODEL.WEIGHTS == mask_rcnn.MODEL.WEIGHTS != ""


@pytest.mark.parametrize("family", ["mvit", "vit"])
def test_retinanets_anchors_are_detectron2s(family):
    from detectron2 import model_zoo as stock

    theirs = stock.get_config("COCO-Detection/retinanet_R_50_FPN_3x.yaml").MODEL
    ours = model_zoo.get_config(f"retinanet_rev_{family}_b_fpn_3x").MODEL
    for sizes, expected in zip(ours.ANCHOR_GENERATOR.SIZES, theirs.ANCHOR_GENERATOR.SIZES, strict=True):
        assert sizes == pytest.approx(expected, rel=1e-3)
    assert ours.RETINANET == theirs.RETINANET
    assert ours.ANCHOR_GENERATOR.ASPECT_RATIOS == theirs.ANCHOR_GENERATOR.ASPECT_RATIOS


@pytest.mark.parametrize("name", [n for n in model_zoo.list() if "baseline" not in n])
def test_every_model_is_built_for_training_on_the_device(name, nano_zoo):
    model = model_zoo.get(name, device="cpu")
    assert model.training and model.device == torch.device("cpu")
    kind = model_zoo.get_config(name)
    assert type(model).__name__ == kind.MODEL.META_ARCHITECTURE
    if kind.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        assert type(model.roi_heads).__name__ == kind.MODEL.ROI_HEADS.NAME
        assert model.roi_heads.mask_on == ("mask" in name)


def test_weights_are_loaded_from_a_detector_or_a_backbone(nano_zoo, tmp_path):
    source = model_zoo.get("faster_rcnn_rev_mvit_b_fpn_3x", device="cpu")
    RevCheckpointer(source, str(tmp_path)).save("detector")
    torch.save({"model": source.backbone.bottom_up.state_dict()}, tmp_path / "backbone.pth")
    again = model_zoo.get("faster_rcnn_rev_mvit_b_fpn_3x", tmp_path / "detector.pth", "cpu").state_dict()
    assert all(torch.equal(again[key], value) for key, value in source.state_dict().items())
    other = model_zoo.get("retinanet_rev_mvit_b_fpn_3x", str(tmp_path / "backbone.pth"), "cpu")
    theirs, ours = source.backbone.bottom_up.state_dict(), other.backbone.bottom_up.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())


def test_imagenet_means_the_weights_that_the_config_names(nano_zoo, tmp_path, monkeypatch):
    source = model_zoo.get("mask_rcnn_rev_vit_b_fpn_3x", device="cpu").backbone.net
    torch.save({"model": source.state_dict()}, tmp_path / "published.pyth")
    get_config = model_zoo.get_config

    def with_weights(name, trained=False):
        cfg: CfgNode = get_config(name, trained)
        cfg.MODEL.WEIGHTS = str(tmp_path / "published.pyth")
        return cfg

    monkeypatch.setattr(model_zoo, "get_config", with_weights)
    loaded = model_zoo.get("mask_rcnn_rev_vit_b_fpn_3x", "imagenet", "cpu").backbone.net
    assert torch.equal(loaded.pos_embed, source.pos_embed)
    random = model_zoo.get("mask_rcnn_rev_vit_b_fpn_3x", device="cpu").backbone.net
    assert not torch.equal(random.pos_embed, source.pos_embed)


def test_a_model_without_published_weights_says_so():
    with pytest.raises(ValueError, match="no ImageNet weights are published for mask_rcnn_rev_vit_h"):
        model_zoo.get("mask_rcnn_rev_vit_h_fpn_3x", "imagenet")


def test_an_installed_package_has_its_configs_inside(tmp_path):
    # How setup.py lays out the wheel (tests/test_install.py builds it).
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rev_det", tmp_path / "rev_det", ignore=ignored)
    shutil.copytree(ROOT / "configs", tmp_path / "rev_det" / "configs", ignore=ignored)
    code = (
        "from rev_det import model_zoo; print(*map(model_zoo.get_config_file, model_zoo.list()), sep='\\n')"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "rev_det/configs" / n) for n in model_zoo.list()]
