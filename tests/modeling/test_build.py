"""The registered builders: pyramids, padding, stock configs, config keys."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from rev_det import add_rev_det_config
from rev_det.modeling import RevMViT, RevViT, build

BUILDERS = [
    f"build_{prefix}rev_{family}_{suffix}"
    for family in ("vit", "mvit")
    for prefix, suffix in (("", "backbone"), ("", "fpn_backbone"), ("retinanet_", "fpn_backbone"))
]


def nano_config(name):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.IN_FEATURES = ["scale2", "scale3", "scale4", "scale5"]
    if "retinanet" in name:
        cfg.MODEL.FPN.IN_FEATURES = ["scale3", "scale4", "scale5"]
    vit, mvit = cfg.MODEL.REV_VIT, cfg.MODEL.REV_MVIT
    vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS, vit.PRETRAIN_IMG_SIZE = 32, 2, 2, 64
    mvit.EMBED_DIM, mvit.DEPTH, mvit.LAST_BLOCK_INDEXES, mvit.PRETRAIN_IMG_SIZE = 8, 8, (0, 2, 5, 7), 64
    return cfg


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_trains_every_parameter_at_any_size(name):
    backbone = build_backbone(nano_config(name))
    x = torch.randn(1, 3, 90, 131)
    outputs = backbone(x)
    assert list(outputs) == list(backbone.output_shape())
    for key, shape in backbone.output_shape().items():
        y = outputs[key]
        # The plain backbones round up; the pyramids pad to 32 pixels first; P6 and P7 round up once more.
        height, width = (90, 131) if "fpn" not in name else (96, 160)
        assert y.shape == (1, shape.channels, -(-height // shape.stride), -(-width // shape.stride)), key
    sum(y.square().sum() for y in outputs.values()).backward()
    unused = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("name", BUILDERS)
def test_levels_are_the_ones_detectron2s_heads_expect(name):
    names = list(build_backbone(nano_config(name)).output_shape())
    if "retinanet" in name:
        assert names == ["p3", "p4", "p5", "p6", "p7"]
    elif "fpn" in name:
        assert names == ["p2", "p3", "p4", "p5", "p6"]
    elif "mvit" in name:
        assert names == ["scale2", "scale3", "scale4", "scale5"]
    else:
        assert names == ["last_feat"]


def test_three_stages_end_at_p4_with_detectron2s_max_pool_above():
    cfg = nano_config("build_rev_mvit_fpn_backbone")
    cfg.MODEL.REV_MVIT.LAST_BLOCK_INDEXES, cfg.MODEL.REV_MVIT.DEPTH = (0, 2, 5), 6
    cfg.MODEL.REV_MVIT.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["scale2", "scale3", "scale4"]
    backbone = build_backbone(cfg)
    outputs = backbone(torch.randn(1, 3, 64, 64))
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {
        name: 64 // outputs[name].shape[-1] for name in ("p2", "p3", "p4", "p5")
    }


@pytest.mark.parametrize("name", [n for n in BUILDERS if "fpn" in n])
def test_detectors_pad_images_to_multiples_of_32(name):
    backbone = build_backbone(nano_config(name))
    assert backbone.size_divisibility == 32
    images = [torch.zeros(3, 40, 65), torch.zeros(3, 33, 20)]
    padded = ImageList.from_tensors(
        images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    )
    assert padded.tensor.shape == (2, 3, 64, 96)


@pytest.mark.parametrize("name", [n for n in BUILDERS if "fpn" in n])
def test_a_stock_config_needs_no_other_key_than_the_backbones_name(name):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = (
        ["res3", "res4", "res5"] if "retinanet" in name else ["res2", "res3", "res4", "res5"]
    )
    before = copy.deepcopy(cfg)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert cfg == before and "REV" not in cfg.MODEL
    expected = ["p3", "p4", "p5", "p6", "p7"] if "retinanet" in name else ["p2", "p3", "p4", "p5", "p6"]
    assert list(backbone.output_shape()) == expected


@pytest.mark.parametrize(
    "name, architecture",
    [
        ("build_rev_mvit_fpn_backbone", "GeneralizedRCNN"),
        ("build_rev_vit_fpn_backbone", "GeneralizedRCNN"),
        ("build_retinanet_rev_mvit_fpn_backbone", "RetinaNet"),
        ("build_retinanet_rev_vit_fpn_backbone", "RetinaNet"),
    ],
)
def test_detectors_train_and_infer(name, architecture):
    cfg = nano_config(name)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 16
    model = build_model(cfg)
    instances = Instances((70, 90))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 60.0, 50.0]]))
    instances.gt_classes = torch.tensor([1])
    inputs = [{"image": torch.zeros(3, 70, 90), "instances": instances, "height": 70, "width": 90}]
    with EventStorage():
        losses = model(inputs)
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert model.eval()(inputs)[0]["instances"].image_size == (70, 90)


@pytest.mark.parametrize("cls, node", [(RevViT, "REV_VIT"), (RevMViT, "REV_MVIT")])
def test_the_config_holds_every_constructor_argument_with_its_default(cls, node):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    arguments = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
    shared = {"activations", "transitions", "keep_attention", "freeze_at", "termination", "inner_residual"}
    shared &= set(arguments)
    from_input = {"in_chans"}
    for key in shared:
        assert cfg.MODEL.REV[key.upper()] == arguments[key], key
    own = {k.upper(): v for k, v in arguments.items() if k not in shared | from_input}
    assert dict(cfg.MODEL[node]) == own


def test_values_of_the_config_reach_the_backbone():
    cfg = nano_config("build_rev_mvit_backbone")
    cfg.MODEL.REV.ACTIVATIONS = "checkpoint"
    cfg.MODEL.REV.TRANSITIONS = "cached"
    cfg.MODEL.REV.KEEP_ATTENTION = False
    cfg.MODEL.REV.FREEZE_AT = 2
    cfg.MODEL.REV_MVIT.DROP_PATH_RATE = 0.3
    backbone = build_backbone(cfg)
    assert (backbone.activations, backbone.checkpoint_transitions, backbone.keep_attention) == (
        "checkpoint",
        False,
        False,
    )
    assert backbone.drop_path_rates[-1] == 0.3
    assert (
        not backbone.blocks[0].F.norm.weight.requires_grad and backbone.blocks[1].F.norm.weight.requires_grad
    )


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.REV_MVIT.OUT_FEATURES", ("scale2", "scale9"), "out_features must be some of scale2"),
        ("MODEL.FPN.IN_FEATURES", ["scale2", "p3"], r"MODEL.FPN.IN_FEATURES has \['p3'\].*OUT_FEATURES"),
        (
            "MODEL.REV.ACTIVATIONS",
            "store",
            "activations must be one of reversible, cached, checkpoint; got 'store'",
        ),
        ("MODEL.REV_MVIT.LAST_BLOCK_INDEXES", (0, 2, 5, 6), "end with depth - 1 = 7"),
        ("MODEL.REV_MVIT.EMBED_DIM", -8, "^MODEL.REV_MVIT.EMBED_DIM: embed_dim must be .* got -8"),
        ("MODEL.REV.FREEZE_AT", 99, "^MODEL.REV.FREEZE_AT: freeze_at must be .* got 99"),
        ("MODEL.REV.TRANSITIONS", "kept", "^MODEL.REV.TRANSITIONS: transitions must be one of"),
        (
            "MODEL.FPN.IN_FEATURES",
            ["scale2", "scale4"],
            r"IN_FEATURES is .* strides \[4, 16\].* neighbouring",
        ),
        ("MODEL.FPN.IN_FEATURES", ["scale3", "scale2"], r"IN_FEATURES is .* strides \[8, 4\].* neighbouring"),
        ("MODEL.FPN.NORM", "FOO", "MODEL.FPN.NORM is 'FOO'; allowed are '' for none, BN"),
        (
            "MODEL.FPN.NORM",
            "GN",
            r"MODEL.FPN.NORM is 'GN', which 16 channels \(from MODEL.FPN.OUT_CHANNELS\)",
        ),
        ("MODEL.FPN.OUT_CHANNELS", 0, "MODEL.FPN.OUT_CHANNELS must be a whole number"),
        ("MODEL.FPN.FUSE_TYPE", "max", "MODEL.FPN.FUSE_TYPE is 'max'; allowed are 'sum', 'avg'"),
    ],
)
def test_bad_config_values_are_named(key, value, message):
    cfg = nano_config("build_rev_mvit_fpn_backbone")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


@pytest.mark.parametrize("family, node", [("vit", "REV_VIT"), ("mvit", "REV_MVIT")])
@pytest.mark.parametrize("key, value", [("EMBED_DIM", -8), ("DEPTH", 0), ("MLP_RATIO", 0.0)])
def test_baselines_refuse_the_same_sizes(family, node, key, value):
    pytest.importorskip("timm")
    cfg = nano_config(f"build_baseline_{family}_fpn_backbone")
    cfg.MODEL[node][key] = value
    with pytest.raises(ValueError, match=f"MODEL.{node}.{key}"):
        build_backbone(cfg)


def test_checking_a_baselines_sizes_draws_no_random_numbers():
    cfg = nano_config("build_rev_mvit_backbone")
    before = torch.get_rng_state()
    with torch.device("meta"):
        build.rev_mvit(cfg, ShapeSpec(channels=3))
        build.rev_vit(cfg, ShapeSpec(channels=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_norm_that_the_simple_pyramids_first_level_cannot_have_is_an_error():
    cfg = nano_config("build_rev_vit_fpn_backbone")
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.REV_VIT.EMBED_DIM = "GN", 64, 48
    with pytest.raises(ValueError, match=r"'GN', which 48 channels \(from MODEL.REV_VIT.EMBED_DIM\)"):
        build_backbone(cfg)


def test_what_a_stock_config_means_for_a_resnet_and_not_here_is_said_once(caplog):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_rev_mvit_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    with caplog.at_level("WARNING"), torch.device("meta"):
        build_backbone(cfg)
    freezing, features = (record.getMessage() for record in caplog.records)
    assert "MODEL.BACKBONE.FREEZE_AT 2" in freezing and "is ignored; MODEL.REV.FREEZE_AT" in freezing
    assert features.startswith("MODEL.FPN.IN_FEATURES ['res2'") and "replaced with ['scale2'" in features


@pytest.mark.parametrize("freeze_at, warned", [(0, False), (2, False), (3, True)])
def test_freezing_stages_is_warned_about_where_it_is_not_detectron2s_default(caplog, freeze_at, warned):
    cfg = nano_config("build_rev_vit_backbone")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    build_backbone(cfg)
    assert ("MODEL.BACKBONE.FREEZE_AT 3" in caplog.text) == warned == bool(caplog.records)


def test_pretrained_weights_under_other_colours_are_warned_about(caplog):
    cfg = nano_config("build_rev_mvit_fpn_backbone")
    assert cfg.INPUT.FORMAT == "BGR"
    build_backbone(cfg)
    assert not caplog.records  # without weights any colours will do
    cfg.MODEL.WEIGHTS = "REV_MVIT_B.pyth"
    build_backbone(cfg)
    assert "INPUT.FORMAT is BGR" in caplog.text and "MODEL.PIXEL_STD" in caplog.text
    caplog.clear()
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD = "RGB", [58.395, 57.12, 57.375]
    build_backbone(cfg)
    assert not caplog.records


def test_a_patch_size_without_a_simple_pyramid_is_an_error():
    cfg = nano_config("build_rev_vit_fpn_backbone")
    cfg.MODEL.REV_VIT.PATCH_SIZE = 8
    with pytest.raises(ValueError, match="MODEL.REV_VIT.PATCH_SIZE must be 16"):
        build_backbone(cfg)


def test_importing_registers_the_builders_and_does_nothing_else():
    code = """
import random, numpy, torch, logging, os
def state():
    return torch.get_rng_state().tolist(), random.getstate(), logging.getLogger().handlers[:], os.listdir(".")
before = state()
import rev_det
from detectron2.modeling import BACKBONE_REGISTRY
assert before == state()
print(sorted(name for name, _ in BACKBONE_REGISTRY if "rev_" in name))
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str(sorted(BUILDERS))
    assert all(name in BACKBONE_REGISTRY for name in BUILDERS)


def test_without_detectron2_the_core_works_and_a_backbone_says_what_is_missing():
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith("detectron2") else real(name, *args)
sys.meta_path.insert(0, Hide())
import rev_det
rev_det.ReversibleSequence
try:
    from rev_det.modeling import RevMViT
except ImportError as error:
    print(error)
try:
    rev_det.float32_boxes
except ImportError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    lines = out.stdout.splitlines()
    for name, line in zip(("RevMViT", "float32_boxes"), lines, strict=True):
        assert f"{name} needs Detectron2, which is not installed" in line and "make setup" in line
