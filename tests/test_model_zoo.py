"""The zoo: every config by name, what it holds, and the models with their weights; MODEL_ZOO.md agrees."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as stock
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model

from rev_det import add_rev_det_config, model_zoo
from rev_det.checkpoint import RevCheckpointer
from rev_det.checkpoint.layouts import backbone_prefix
from rev_det.checkpoint.named import PUBLISHED, read_geometry
from rev_det.config_files import default_config
from rev_det.modeling.fusion import FUSIONS, TERMINATIONS

ROOT = Path(__file__).resolve().parents[1]
NAMES = model_zoo.list()
COCO = [name for name in NAMES if name.startswith("COCO-Detection/")]
# Of the whole detector, in millions; the paper prints 58 for Rev-MViT-B. The other heads follow by hand.
PARAMETERS = {
    "mask_rcnn_rev_mvit_b": 58_797_552,
    "mask_rcnn_rev_vit_b": 117_407_600,
    "mask_rcnn_rev_vit_s": 44.77e6,
    "mask_rcnn_rev_vit_l": 343.53e6,
    "mask_rcnn_rev_vit_h": 682.12e6,
    "mask_rcnn_baseline_mvit_b": 54.57e6,
    "mask_rcnn_baseline_vit_s": 42.51e6,
    "mask_rcnn_baseline_vit_b": 108.90e6,
    "mask_rcnn_baseline_vit_l": 328.65e6,
    "retinanet_rev_mvit_b": 51_206_260,
    "retinanet_rev_vit_b": 100_916_980,
}
MASK_HEAD = 4 * (256 * 256 * 9 + 256) + (256 * 256 * 4 + 256) + (256 * 80 + 80)
BOX_HEAD = (256 * 7 * 7 * 1024 + 1024) + (1024 * 1024 + 1024)
# Of 80 classes and background; a box for each class, or one for all in the cascade.
PREDICTOR, CASCADE_PREDICTOR = 1025 * (81 + 4 * 80), 1025 * (81 + 4)
for family in ("mvit", "vit"):
    mask_rcnn = PARAMETERS[f"mask_rcnn_rev_{family}_b"]
    PARAMETERS[f"faster_rcnn_rev_{family}_b"] = mask_rcnn - MASK_HEAD
    PARAMETERS[f"cascade_mask_rcnn_rev_{family}_b"] = (
        mask_rcnn + 2 * BOX_HEAD + 3 * CASCADE_PREDICTOR - PREDICTOR
    )
PAGE = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in row[1:-1].split("|")] for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
]
CONFIGS = {row[0].strip("`"): row for row in ROWS if row[0].endswith(".yaml`")}
SIZES = [row for row in ROWS if re.match(r"Rev-M?ViT", row[0]) and len(row) == 3]


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
    assert set(NAMES) == files - {"Base-RCNN-Rev-FPN.yaml"}
    assert sorted(NAMES) == NAMES
    assert CONFIGS.keys() == {name.partition("/")[2] for name in COCO}


@pytest.mark.parametrize("name", NAMES)
def test_names_without_folder_or_extension_mean_one_config_each(name):
    expected = str(ROOT / "configs" / name)
    folder, _, file = name.partition("/")
    stem = file.removesuffix(".yaml")
    for spelling in (name, f"{folder}/{stem}", file, stem):
        assert model_zoo.get_config_file(spelling) == model_zoo.find_config_file(spelling) == expected


@pytest.mark.parametrize(
    "name, hint",
    [
        ("mask_rcnn_mvit_b_fpn_3x", "did you mean mask_rcnn_rev_mvit_b_fpn_3x"),
        ("RetinaNet", "did you mean retinanet_rev_mvit_b_fpn_3x or retinanet_rev_vit_b_fpn_3x"),
        ("%%%", "there are cascade_mask_rcnn_rev_mvit_b_fpn_3x, .*nano_fpn"),
        ("Base-RCNN-Rev-FPN.yaml", ""),
    ],
)
def test_an_unknown_name_comes_with_close_ones(name, hint):
    with pytest.raises(ValueError, match=f"no model '{name}'.*{hint}"):
        model_zoo.get_config_file(name)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_rgb_with_imagenets_statistics_and_weights_an_address(name):
    cfg = model_zoo.get_config(name)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    address = r"https://[a-z0-9.-]+(/[\w.-]+)+\.pyth(#sha256=[0-9a-f]{64})?"
    assert cfg.MODEL.WEIGHTS == "" or re.fullmatch(address, cfg.MODEL.WEIGHTS)


@pytest.mark.parametrize("name", COCO)
def test_the_coco_recipe_is_the_papers(name):
    solver = model_zoo.get_config(name).SOLVER
    assert (solver.OPTIMIZER, tuple(solver.BETAS), solver.WEIGHT_DECAY) == ("AdamW", (0.9, 0.999), 0.1)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.AMP.ENABLED) == (64, 1.6e-4, True)
    # COCO's 117266 annotated images, 36 epochs; the rate drops after 27 and 33.
    per_epoch = 117266 / solver.IMS_PER_BATCH
    assert solver.MAX_ITER == round(36 * per_epoch)
    assert tuple(solver.STEPS) == (round(27 * per_epoch), round(33 * per_epoch))


@pytest.mark.parametrize("name", COCO)
def test_the_coco_models_have_their_size_and_the_weights_of_their_backbone(name):
    # Detectron2's own backbones cannot be built without values.
    device = "meta"
    if "baseline" in name:
        pytest.importorskip("timm")
        device = "cpu"
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = device
    with torch.device(device):
        model = build_model(cfg)
    count = sum(p.numel() for p in model.parameters())
    expected = PARAMETERS[Path(name).stem.removesuffix("_fpn_3x")]
    assert count == expected if isinstance(expected, int) else count == pytest.approx(expected, abs=5000)
    assert f"{count / 1e6:.2f} M" in CONFIGS[Path(name).name]
    if "baseline" not in name:
        state = model.state_dict()
        prefix = backbone_prefix(state)
        geometry = read_geometry(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        published = PUBLISHED.get(geometry.model)
        assert cfg.MODEL.WEIGHTS == (published.url if published else "")


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
    theirs = stock.get_config("COCO-Detection/retinanet_R_50_FPN_3x.yaml").MODEL
    ours = model_zoo.get_config(f"retinanet_rev_{family}_b_fpn_3x").MODEL
    for sizes, expected in zip(ours.ANCHOR_GENERATOR.SIZES, theirs.ANCHOR_GENERATOR.SIZES, strict=True):
        assert sizes == pytest.approx(expected, rel=1e-3)
    assert ours.RETINANET == theirs.RETINANET
    assert ours.ANCHOR_GENERATOR.ASPECT_RATIOS == theirs.ANCHOR_GENERATOR.ASPECT_RATIOS


def test_a_config_can_be_changed_and_adding_the_keys_once_more_changes_nothing():
    cfg = model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x")
    cfg.MODEL.REV.ACTIVATIONS = "cached"
    before = cfg.dump()
    add_rev_det_config(cfg)
    assert cfg.dump() == before


@pytest.mark.parametrize("name", [n for n in NAMES if "baseline" not in n])
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


def test_weights_that_are_not_published_are_said_not_to_be():
    with pytest.raises(ValueError, match="no ImageNet weights are published for mask_rcnn_rev_vit_h"):
        model_zoo.get("mask_rcnn_rev_vit_h_fpn_3x", "imagenet")
    with pytest.raises(ValueError, match="no trained weights are published for mask_rcnn.*weights="):
        model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x", trained=True)


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
    assert done.stdout.splitlines() == [str(tmp_path / "rev_det/configs" / n) for n in NAMES]


@pytest.mark.parametrize("row", SIZES, ids=[row[0] for row in SIZES])
def test_the_keys_of_a_size_on_the_page_give_that_size(row):
    title, sizes, keys = row
    cfg = default_config()
    opts = [] if keys == "the defaults" else shlex.split(keys.strip("`"))
    name = "build_rev_mvit_backbone" if "MViT" in title else "build_rev_vit_backbone"
    cfg.merge_from_list([*opts, "MODEL.BACKBONE.NAME", name, "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_backbone(cfg)
    size = read_geometry(model.state_dict())
    if sizes == "as -B":
        assert (size.width, size.depth) == (96, int(re.search(r"\d+", title).group()))
        return
    width, depth, heads = (int(re.match(r"\d+", part).group()) for part in sizes.split(", "))
    assert (size.width, size.depth, model.blocks[0].F.attn.num_heads) == (width, depth, heads)
    assert str(size).startswith(f"{title} (") and len(SIZES) == 8


@pytest.mark.parametrize("key, values", [("REV_MVIT.FUSION", FUSIONS), ("REV.TERMINATION", TERMINATIONS)])
def test_all_ablations_are_on_the_page_the_default_first(key, values):
    (row,) = [row for row in ROWS if row[1] == f"`MODEL.{key}`"]
    listed = re.findall(r"`([\w-]+)`", row[2])
    assert sorted(listed) == sorted(values)
    node, name = key.split(".")
    assert listed[0] == values[0] == default_config().MODEL[node][name]
