"""MODEL_ZOO.md says what the configs and the options are."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

import rev_det
from rev_det.checkpoint.named import read_geometry
from rev_det.modeling.fusion import FUSIONS, TERMINATIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in row[1:-1].split("|")] for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
]
CONFIGS = {row[0].strip("`"): row for row in ROWS if row[0].endswith(".yaml`")}
SIZES = [row for row in ROWS if re.match(r"Rev-M?ViT", row[0]) and len(row) == 3]


def config(*opts, file=None):
    cfg = get_cfg()
    rev_det.add_rev_det_config(cfg)
    if file is not None:
        cfg.merge_from_file(str(ROOT / "configs/COCO-Detection" / file))
    cfg.merge_from_list([*opts, "MODEL.DEVICE", "meta"])
    return cfg


def test_every_coco_config_is_listed():
    assert CONFIGS.keys() == {path.name for path in ROOT.glob("configs/COCO-Detection/*.yaml")}


# Detectron2's own backbones cannot be built without values; tests/engine/test_configs.py counts them.
@pytest.mark.parametrize("name", [name for name in CONFIGS if "baseline" not in name])
def test_the_parameters_are_the_models(name):
    with torch.device("meta"):
        model = build_model(config(file=name))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" in CONFIGS[name]


@pytest.mark.parametrize("row", SIZES, ids=[row[0] for row in SIZES])
def test_the_keys_of_a_size_give_that_size(row):
    title, sizes, keys = row
    opts = [] if keys == "the defaults" else shlex.split(keys.strip("`"))
    name = "build_rev_mvit_backbone" if "MViT" in title else "build_rev_vit_backbone"
    cfg = config(*opts, "MODEL.BACKBONE.NAME", name)
    with torch.device("meta"):
        model = build_backbone(cfg)
    size = read_geometry(model.state_dict())
    if sizes == "as -B":
        assert (size.width, size.depth) == (96, int(re.search(r"\d+", title).group()))
        return
    width, depth, heads = (int(re.match(r"\d+", part).group()) for part in sizes.split(", "))
    assert (size.width, size.depth, model.blocks[0].F.attn.num_heads) == (width, depth, heads)
    assert str(size).startswith(f"{title} (")


def test_the_sizes_are_the_papers():
    assert len(SIZES) == 8


@pytest.mark.parametrize(
    "key, values", [("MODEL.REV_MVIT.FUSION", FUSIONS), ("MODEL.REV.TERMINATION", TERMINATIONS)]
)
def test_all_ablations_are_listed_the_default_first(key, values):
    (row,) = [row for row in ROWS if row[1] == f"`{key}`"]
    listed = re.findall(r"`([\w-]+)`", row[2])
    assert sorted(listed) == sorted(values)
    assert listed[0] == values[0]
    node = config()
    for part in key.split("."):
        node = node[part]
    assert node == values[0]
