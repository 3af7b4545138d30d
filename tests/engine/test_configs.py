"""The YAML configs."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import rev_det

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml"))
COCO = [name for name in MODELS if name.startswith("COCO-Detection/")]
MASK_RCNN = [name for name in COCO if "/mask_rcnn_" in name]
# Of the whole detector, in millions; the paper prints 58 for Rev-MViT-B.
PARAMETERS = {
    "rev_mvit_b": 58.80,
    "rev_vit_s": 44.77,
    "rev_vit_b": 117.41,
    "rev_vit_l": 343.53,
    "rev_vit_h": 682.12,
    "baseline_mvit_b": 54.57,
    "baseline_vit_s": 42.51,
    "baseline_vit_b": 108.90,
    "baseline_vit_l": 328.65,
}


def load(name: str):
    cfg = get_cfg()
    rev_det.add_rev_det_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


@pytest.mark.parametrize("name", MODELS)
def test_images_are_rgb_with_imagenets_statistics(name):
    cfg = load(name)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("name", COCO)
def test_the_coco_recipe_is_the_papers(name):
    solver = load(name).SOLVER
    assert (solver.OPTIMIZER, tuple(solver.BETAS), solver.WEIGHT_DECAY) == ("AdamW", (0.9, 0.999), 0.1)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.AMP.ENABLED) == (64, 1.6e-4, True)
    # COCO's 117266 annotated images, 36 epochs; the rate drops after 27 and 33.
    per_epoch = 117266 / solver.IMS_PER_BATCH
    assert solver.MAX_ITER == round(36 * per_epoch)
    assert tuple(solver.STEPS) == (round(27 * per_epoch), round(33 * per_epoch))


@pytest.mark.parametrize("name", MASK_RCNN)
def test_the_coco_models_have_their_size(name):
    # Detectron2's own backbones cannot be built without values.
    device = "meta"
    if "baseline" in name:
        pytest.importorskip("timm")
        device = "cpu"
    cfg = load(name)
    cfg.MODEL.DEVICE = device
    with torch.device(device):
        model = build_model(cfg)
    size = Path(name).stem.removeprefix("mask_rcnn_").removesuffix("_fpn_3x")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[size], abs=0.005)
