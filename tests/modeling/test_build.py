"""The registered builders: pyramids, padding, config keys, warnings, and the baselines."""

import inspect
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, MViT, ViT, build_backbone
from detectron2.structures import ImageList
from small_backbones import set_small_sizes

from rev_det import add_rev_det_config
from rev_det.modeling import RevMViT, RevViT, build

SCALES = ["scale2", "scale3", "scale4", "scale5"]
LEVELS = ["p2", "p3", "p4", "p5", "p6", "p7"]
# The levels of the pyramids are the ones that Detectron2's heads expect.
BUILDERS = {
    "build_rev_vit_backbone": ["last_feat"],
    "build_rev_vit_fpn_backbone": LEVELS[:5],
    "build_retinanet_rev_vit_fpn_backbone": LEVELS[1:],
    "build_rev_mvit_backbone": SCALES,
    "build_rev_mvit_fpn_backbone": LEVELS[:5],
    "build_retinanet_rev_mvit_fpn_backbone": LEVELS[1:],
}


def nano_config(name, *changes):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    set_small_sizes(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.IN_FEATURES = SCALES[1:] if "retinanet" in name else SCALES
    cfg.merge_from_list(list(changes))
    return cfg


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("size", [(90, 131), (33, 1)])
def test_every_builder_trains_every_parameter_at_any_size(name, size):
    backbone = build_backbone(nano_config(name))
    outputs = backbone(torch.randn(1, 3, *size))
    assert list(outputs) == list(backbone.output_shape()) == BUILDERS[name]
    if "fpn" in name:
        size = [-(-n // 32) * 32 for n in size]
    for key, shape in backbone.output_shape().items():
        # The plain backbones round up; the pyramids pad to 32 pixels first; P6 and P7 round up once more.
        assert outputs[key].shape == (1, shape.channels, *(-(-n // shape.stride) for n in size)), key
        assert outputs[key].is_contiguous()
    sum(y.square().sum() for y in outputs.values()).backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]
    if "fpn" in name:  # a detector pads its images to multiples of 32 pixels
        padding = backbone.size_divisibility, 0.0, backbone.padding_constraints
        padded = ImageList.from_tensors([torch.zeros(3, 40, 65), torch.zeros(3, 33, 20)], *padding)
        assert padding[0] == 32 and padded.tensor.shape == (2, 3, 64, 96)


def test_three_stages_end_at_p4_with_detectron2s_max_pool_above():
    cfg = nano_config("build_rev_mvit_fpn_backbone", "MODEL.REV_MVIT.LAST_BLOCK_INDEXES", (0, 2, 5))
    cfg.MODEL.REV_MVIT.DEPTH = 6
    cfg.MODEL.REV_MVIT.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = SCALES[:3]
    backbone = build_backbone(cfg)
    outputs = backbone(torch.randn(1, 3, 64, 64))
    strides = {name: 64 // y.shape[-1] for name, y in outputs.items()}
    assert strides == {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert list(strides.items()) == [("p2", 4), ("p3", 8), ("p4", 16), ("p5", 32)]


@pytest.mark.parametrize("cls, node", [(RevViT, "REV_VIT"), (RevMViT, "REV_MVIT")])
def test_every_constructor_argument_is_a_key_of_the_config_with_its_default(cls, node, monkeypatch):
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    cfg, images = get_cfg(), ShapeSpec(channels=3)
    add_rev_det_config(cfg)
    construct = getattr(build, node.lower())
    monkeypatch.setattr(build, cls.__name__, dict)  # instead of a backbone its arguments
    assert construct(cfg, images) == defaults
    for keys in (cfg.MODEL.REV, cfg.MODEL[node]):
        keys.update({key: key for key in keys})
    assert construct(cfg, images) == {name: name.upper() for name in defaults} | {"in_chans": 3}


MVIT = "MODEL.REV_MVIT."


@pytest.mark.parametrize(
    "changes, message",
    [
        ([MVIT + "OUT_FEATURES", ("scale2", "scale9")], "OUT_FEATURES: out_features must be some of scale2"),
        ([MVIT + "LAST_BLOCK_INDEXES", (0, 2, 5, 6)], "end with depth - 1 = 7"),
        ([MVIT + "EMBED_DIM", -8], "^MODEL.REV_MVIT.EMBED_DIM: embed_dim must be .* got -8"),
        (["MODEL.REV.ACTIVATIONS", "store"], "^MODEL.REV.ACTIVATIONS: activations must be .* got 'store'"),
        (["MODEL.REV.FREEZE_AT", 99], "^MODEL.REV.FREEZE_AT: freeze_at must be .* got 99"),
        (["MODEL.REV.TRANSITIONS", "kept"], "^MODEL.REV.TRANSITIONS: transitions must be one of"),
        (["MODEL.FPN.IN_FEATURES", ["scale2", "p3"]], r"FPN.IN_FEATURES has \['p3'\].*OUT_FEATURES"),
        (["MODEL.FPN.IN_FEATURES", ["scale2", "scale4"]], r"FPN.IN_FEATURES is .* \[4, 16\].* neighbouring"),
        (["MODEL.FPN.IN_FEATURES", ["scale3", "scale2"]], r"FPN.IN_FEATURES is .* \[8, 4\].* neighbouring"),
        (["MODEL.FPN.NORM", "FOO"], "MODEL.FPN.NORM is 'FOO'; allowed are '' for none, BN"),
        (["MODEL.FPN.NORM", "GN"], r"FPN.NORM is 'GN', which 16 channels \(from MODEL.FPN.OUT_CHANNELS\)"),
        (["MODEL.FPN.OUT_CHANNELS", 0], "MODEL.FPN.OUT_CHANNELS must be a whole number"),
        (["MODEL.FPN.FUSE_TYPE", "max"], "MODEL.FPN.FUSE_TYPE is 'max'; allowed are 'sum', 'avg'"),
    ],
)
def test_bad_config_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(nano_config("build_rev_mvit_fpn_backbone", *changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"PATCH_SIZE": 8}, "MODEL.REV_VIT.PATCH_SIZE must be 16"),
        ({"EMBED_DIM": 48}, r"'GN', which 48 channels \(from MODEL.REV_VIT.EMBED_DIM\)"),
    ],
)
def test_what_the_simple_pyramid_cannot_have_is_an_error(changes, message):
    cfg = nano_config("build_rev_vit_fpn_backbone", "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 64)
    cfg.MODEL.REV_VIT.update(changes)
    with pytest.raises(ValueError, match=message):
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


OURS = ["MODEL.WEIGHTS", "REV_MVIT_B.pyth"]
RGB = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
R_50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize("name", ["build_rev_vit_fpn_backbone", "build_rev_mvit_fpn_backbone"])
@pytest.mark.parametrize(
    "changes, warning",
    [
        ([], ""),  # without weights any colours will do; Detectron2's FREEZE_AT is 2
        (["MODEL.BACKBONE.FREEZE_AT", 0], ""),
        (["MODEL.BACKBONE.FREEZE_AT", 3], "MODEL.BACKBONE.FREEZE_AT 3 counts the stages of a ResNet"),
        (OURS, "INPUT.FORMAT is BGR and MODEL.PIXEL_STD [1.0, 1.0, 1.0]; set INPUT.FORMAT RGB"),
        (OURS + RGB[:2], "INPUT.FORMAT is RGB and MODEL.PIXEL_STD [1.0, 1.0, 1.0]; set INPUT.FORMAT RGB"),
        (OURS + RGB, ""),
        (["MODEL.WEIGHTS", R_50], f"{R_50} is of Detectron2's model zoo, which has nothing for this"),
    ],
)
def test_what_fits_a_resnet_and_not_this_backbone_is_warned_about(name, changes, warning, caplog):
    build_backbone(nano_config(name, *changes))
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == bool(warning) and warning in "".join(messages)


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


# ---- baselines ----


@pytest.mark.parametrize("activations", ["cached", "checkpoint"])
@pytest.mark.parametrize("family", ["vit", "mvit"])
def test_detectron2s_own_backbones_train_under_the_same_pyramids(family, activations):
    pytest.importorskip("timm")
    cfg = nano_config(f"build_baseline_{family}_fpn_backbone", "MODEL.REV.ACTIVATIONS", activations)
    backbone = build_backbone(cfg)
    outputs = backbone(torch.randn(1, 3, 64, 96))
    assert list(outputs) == LEVELS[:5]
    sum(y.square().mean() for y in outputs.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("family", ["VIT", "MVIT"])
@pytest.mark.parametrize("key, value", [("EMBED_DIM", -8), ("DEPTH", 0), ("MLP_RATIO", 0.0)])
def test_baselines_refuse_the_same_sizes(family, key, value):
    pytest.importorskip("timm")
    key = f"MODEL.REV_{family}.{key}"
    with pytest.raises(ValueError, match=key):
        build_backbone(nano_config(f"build_baseline_{family.lower()}_fpn_backbone", key, value))


@pytest.mark.parametrize("family", ["vit", "mvit"])
def test_the_baseline_of_a_seed_is_what_detectron2_makes_of_it(family):
    """Checking the sizes draws no random numbers."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    pyramid = build_backbone(nano_config(f"build_baseline_{family}_fpn_backbone"))
    torch.manual_seed(0)
    options = {"img_size": 64, "pretrain_img_size": 64, "pretrain_use_cls_token": False, "use_abs_pos": True}
    if family == "vit":
        baseline, stock = pyramid.net, ViT(embed_dim=32, depth=2, num_heads=2, **options)
    else:
        options |= {"adaptive_window_size": 0, "residual_pooling": False, "use_rel_pos": False}
        sizes = {"embed_dim": 8, "depth": 8, "last_block_indexes": (0, 2, 5, 7)}
        baseline, stock = pyramid.bottom_up, MViT(**sizes, **options)
    x = torch.randn(1, 3, 64, 96)
    for found, expected in ((baseline.state_dict(), stock.state_dict()), (baseline(x), stock(x))):
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_baseline_without_timm_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="needs timm, which is not installed: pip install timm"):
        build_backbone(nano_config("build_baseline_vit_fpn_backbone"))
