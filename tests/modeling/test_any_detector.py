"""Stock Detectron2 detectors train and infer on our backbones when the backbone's name alone is changed."""

import pickle
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from small_backbones import annotated_image, set_small_sizes

from rev_det import model_zoo as rev_model_zoo
from rev_det.modeling import build

LAZY = Path(__file__).resolve().parents[2] / "configs" / "Lazy"
# What each returns for an image, besides boxes and classes.
DETECTORS = {
    "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml": "pred_boxes",
    "COCO-Detection/retinanet_R_50_FPN_3x.yaml": "pred_boxes",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml": "pred_masks",
    "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml": "pred_masks",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml": "pred_keypoints",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml": "panoptic_seg",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml": "proposals",
}
HEIGHT, WIDTH = 90, 122


@pytest.fixture
def nano_defaults(monkeypatch):
    """rev_det's default sizes, which a stock config gets, become those of backbones of a few channels."""
    add_rev_det_config = build.add_rev_det_config
    monkeypatch.setattr(
        build, "add_rev_det_config", lambda cfg: add_rev_det_config(cfg) or set_small_sizes(cfg)
    )


def changed_config(detector: str, family: str):
    """The stock config with our backbone, and heads of a few channels."""
    cfg = model_zoo.get_config(detector)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    prefix = "retinanet_" if "retinanet" in detector else ""
    cfg.MODEL.BACKBONE.NAME = f"build_{prefix}rev_{family}_fpn_backbone"
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (32,)
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    # Untrained scores are all alike, and low.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    return cfg


def training_input() -> dict:
    return annotated_image(HEIGHT, WIDTH, torch.tensor([[8.0, 8.0, 72.0, 60.0], [60.0, 30.0, 110.0, 84.0]]))


def train_once(model: torch.nn.Module, backbone: torch.nn.Module) -> None:
    """A training step; every parameter of the backbone must have a gradient."""
    with EventStorage():
        losses = model.train()([training_input()])
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert all(torch.isfinite(parameter.grad).all() for parameter in backbone.parameters())
    assert not [name for name, parameter in backbone.named_parameters() if not parameter.grad.any()]
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()


@pytest.mark.parametrize("family", ["mvit", "vit"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_changing_the_backbones_name_is_enough(detector, family, nano_defaults):
    torch.manual_seed(0)
    cfg = changed_config(detector, family)
    before = cfg.clone()
    model = build_model(cfg)
    assert cfg == before and "REV" not in cfg.MODEL
    train_once(model, model.backbone)
    with torch.no_grad():
        (result,) = model.eval()([training_input()])
    expected = DETECTORS[detector]
    found = result["proposals" if expected == "proposals" else "instances"]
    assert found.image_size == (HEIGHT, WIDTH) and len(found) > 0
    if expected == "panoptic_seg":
        assert result["panoptic_seg"][0].shape == result["sem_seg"].shape[1:] == (HEIGHT, WIDTH)
    elif expected != "proposals":
        assert found.has(expected)


@pytest.mark.parametrize("family", ["mvit", "vit"])
@pytest.mark.parametrize(
    "detector, name, asked",
    [
        ("COCO-Detection/faster_rcnn_R_50_C4_3x.yaml", "build_rev_{}_fpn_backbone", "res4"),
        ("COCO-Detection/faster_rcnn_R_50_DC5_3x.yaml", "build_rev_{}_backbone", "res5"),
        ("COCO-Detection/retinanet_R_50_FPN_3x.yaml", "build_rev_{}_fpn_backbone", "p7"),
        ("COCO-Detection/retinanet_R_50_FPN_3x.yaml", "build_rev_{}_backbone", "p3"),
        ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "build_rev_{}_backbone", "p2"),
    ],
)
def test_heads_that_ask_for_other_feature_maps_are_an_error_that_says_what_to_do(
    detector, name, asked, family, nano_defaults
):
    cfg = changed_config(detector, family)
    cfg.MODEL.BACKBONE.NAME = name.format(family)
    with pytest.raises(KeyError) as error:
        build_model(cfg)
    returned = ", ".join(build_backbone(cfg).output_shape())
    assert f"asks for '{asked}'; this backbone returns {returned}. For heads" in str(error.value)
    assert "C4 and DC5 configs have no pyramid" in str(error.value)
    # Of another process it arrives as it was.
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


# ---- LazyConfig ----


def lazy_model(name: str):
    """The model of a lazy config, with a backbone of a few channels; and the config."""
    cfg = LazyConfig.load(str(LAZY / f"{name}.py"))
    backbone = cfg.model.backbone
    # What drop path drops has no gradient.
    sizes = {"drop_path_rate": 0.0, "pretrain_img_size": 64}
    if "net" in backbone:
        backbone.net.update(embed_dim=32, depth=2, num_heads=2, **sizes)
        cfg.model.roi_heads.batch_size_per_image = 16
    else:
        backbone.bottom_up.update(embed_dim=8, depth=8, last_block_indexes=(0, 2, 5, 7), **sizes)
        cfg.model.test_score_thresh = 0.0  # untrained scores are low
    return instantiate(cfg.model), cfg


@pytest.mark.parametrize(
    "name, architecture", [("mask_rcnn_rev_vit_b", "GeneralizedRCNN"), ("fcos_rev_mvit_b", "FCOS")]
)
def test_lazy_configs_train_and_infer(name, architecture):
    torch.manual_seed(0)
    model, cfg = lazy_model(name)
    assert type(model).__name__ == architecture
    train_once(model, model.backbone)
    with torch.no_grad():
        (result,) = model.eval()([training_input()])
    assert result["instances"].image_size == (HEIGHT, WIDTH)
    # Colours and statistics belong together.
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])


@pytest.mark.parametrize("name, side", [("mask_rcnn_rev_vit_b", "net"), ("fcos_rev_mvit_b", "bottom_up")])
def test_lazy_backbones_have_the_sizes_of_the_yaml_configs(name, side):
    family = "vit" if side == "net" else "mvit"
    lazy = LazyConfig.load(str(LAZY / f"{name}.py")).model.backbone[side]
    yaml = rev_model_zoo.get_config(f"mask_rcnn_rev_{family}_b_fpn_3x")
    with torch.device("meta"):
        ours = instantiate(lazy)
        yaml.MODEL.BACKBONE.NAME = f"build_rev_{family}_backbone"
        theirs = build_backbone(yaml)
    found, expected = (
        {(key, value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)
    )
    assert found <= expected
    assert all(key.startswith("scale2_norm") for key, _ in expected - found)  # FCOS reads no scale2
    assert ours.drop_path_rates == theirs.drop_path_rates
