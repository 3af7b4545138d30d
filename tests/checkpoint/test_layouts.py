"""Every supported layout becomes our keys, by names and shapes alone; every other file is told what it is."""

import json

import numpy as np
import pytest
import torch
from tiny_weights import make_mvit, make_vit, mmpretrain_state, renumbered, same

from rev_det.checkpoint import convert_state_dict
from rev_det.checkpoint.layouts import convert

HEAD = ["head.projection.weight", "head.projection.bias"]


@pytest.mark.parametrize("family, last_norm", [("vit", "norm"), ("mvit", "scale4_norm")])
def test_an_official_file_becomes_ours_with_every_value(family, last_norm, request):
    official = request.getfixturevalue(f"official_{family}")
    expected = {}  # the conversion written out by hand
    for key, value in official.items():
        name = f"{last_norm}.{key.partition('.')[2]}" if key.startswith("norm.") else renumbered(key)
        expected[name] = value[:, :, 0] if ".pool_" in key else value
    for key in HEAD:
        del expected[key]
    converted = convert_state_dict(official)
    assert same(converted, expected)
    model = make_vit() if family == "vit" else make_mvit(out_features=("scale4",))
    model.load_state_dict(converted, strict=True)


def test_mmpretrain_equals_the_official_file_it_comes_from(official_vit):
    assert same(convert_state_dict(mmpretrain_state(official_vit)), convert_state_dict(official_vit))


def test_our_own_state_stays_as_it_is():
    state = make_mvit().state_dict()
    assert same(convert_state_dict(state), state)


@pytest.mark.parametrize("size", ["small", "base"])
def test_mmpretrain_mapping_of_the_full_models_is_the_measured_one(shared, size):
    record = json.loads((shared / "reference" / "mmpretrain_keys.json").read_text())
    mapping = record[f"mapping_{size}"]
    # Each official tensor is recognised by its own number; the width of 2 keeps fused rows a multiple of 3.
    numbers = {key: i for i, key in enumerate(key for keys in mapping.values() for key in keys)}
    official = {
        key: torch.full((4 if key.startswith("norm.") else 2, 2), float(i)) for key, i in numbers.items()
    }
    theirs = {key: torch.cat([official[k] for k in keys]) for key, keys in mapping.items()}
    assert same(convert_state_dict(theirs), convert_state_dict(official))


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "backbone.bottom_up.", "backbone.net.", "net."])
@pytest.mark.parametrize("layout", ["pyslowfast", "mmpretrain", "rev_det"])
def test_prefixes_are_no_part_of_a_layout(official_vit, layout, prefix):
    bare = {
        "pyslowfast": official_vit,
        "mmpretrain": {k.removeprefix("backbone."): v for k, v in mmpretrain_state(official_vit).items()},
        "rev_det": convert_state_dict(official_vit),
    }[layout]
    converted = convert({prefix + key: value for key, value in bare.items()})
    assert converted.layout == layout
    assert same(converted.backbone, convert_state_dict(official_vit))


@pytest.mark.parametrize("layout", ["vit", "mvit", "mmpretrain"])
def test_conversion_is_linear_so_it_applies_to_gradients(official_vit, official_mvit, layout):
    x = {"vit": official_vit, "mvit": official_mvit, "mmpretrain": mmpretrain_state(official_vit)}[layout]
    y = {key: torch.randn_like(value) for key, value in x.items()}
    mixed = convert_state_dict({key: 3 * x[key] - 2 * y[key] for key in x})
    apart = convert_state_dict(x), convert_state_dict(y)
    assert same(mixed, {key: 3 * apart[0][key] - 2 * apart[1][key] for key in apart[0]})


@pytest.mark.parametrize("layout", ["mvit", "mmpretrain"])
def test_conversion_never_looks_at_values(official_vit, official_mvit, layout):
    state = {"mvit": official_mvit, "mmpretrain": mmpretrain_state(official_vit)}[layout]
    # Tensors without storage have shapes, and raise when a value is asked for.
    converted = convert_state_dict({key: value.to("meta") for key, value in state.items()})
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in convert_state_dict(state).items()
    }


def test_arrays_are_converted_as_tensors_are(official_mvit):
    converted = convert_state_dict({key: value.numpy() for key, value in official_mvit.items()})
    assert all(isinstance(value, np.ndarray) for value in converted.values())
    assert same({k: torch.from_numpy(v) for k, v in converted.items()}, convert_state_dict(official_mvit))


def test_heads_that_are_named_as_another_layout_are_heads():
    ours = make_vit().state_dict()
    heads = {f"decoder.layers.0.{name}": torch.zeros(3) for name in ("ln1.weight", "attn.qkv.bias")}
    converted = convert({**heads, **{f"backbone.net.{key}": value for key, value in ours.items()}})
    assert converted.layout == "rev_det"
    assert same(converted.backbone, ours)
    assert converted.others.keys() == heads.keys()


@pytest.mark.parametrize(
    "state, words",
    [
        (lambda s: {**s, "rev_backbone.layers.0.extra": s["pos_embed"]}, r"pyslowfast.*layers\.0\.extra"),
        (
            lambda s: {f"{who}.{k}": v for who in "ab" for k, v in s.items()},
            r"several backbones.*'a\.', 'b\.'",
        ),
        (lambda s: {"model": s, "model_state": s}, "several sets of weights: model_state, model"),
        (
            lambda s: {**mmpretrain_state(s), "backbone.layers.1.attn.qkv.bias": torch.zeros(95)},
            r"blocks\.1\.F\.attn\.qkv\.bias.*\(95,\)",
        ),
        # Its blocks have the names of mmpretrain's reversible ones.
        (
            lambda s: {**mmpretrain_state(s), "backbone.ln1.weight": torch.ones(32)},
            "plain vision transformer",
        ),
        (lambda s: {**mmpretrain_state(s), "backbone.cls_token": s["pos_embed"]}, "plain vision transformer"),
        (lambda s: {}, "no tensors"),
        (lambda s: {"model": {}}, "no tensors"),
        (lambda s: {"pos_embed": [1.0, 2.0]}, "'pos_embed' is a list"),
        (lambda s: {"pos_embed": np.array(["a"])}, "'pos_embed' is a ndarray"),
        (lambda s: {0: torch.zeros(1)}, "0 is a Tensor"),
        (lambda s: {"epoch": 3, "cfg": "text"}, "'epoch' is a int"),
    ],
)
def test_what_is_no_file_of_a_layout_is_an_error(official_vit, state, words):
    with pytest.raises(ValueError, match=words):
        convert_state_dict(state(official_vit))


@pytest.mark.parametrize(
    "keys, what",
    [
        (
            ["backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.res2.0.conv1.weight"],
            "ResNet of Detectron2",
        ),
        (["conv1_w", "res2_0_branch2a_w"], "ResNet of Caffe2"),
        (["conv1.weight", "layer1.0.conv1.weight"], "ResNet of torchvision"),
        (["cls_token", "pos_embed", "blocks.0.attn.qkv.weight"], "plain vision transformer"),
        (["cls_token", "blocks.0.attn.pool_q.weight"], "MViT that is not reversible"),
        (["layers.0.blocks.0.attn.relative_position_bias_table"], "Swin"),
        (["stages.0.0.dwconv.weight"], "ConvNeXt"),
        (["first", "second"], "first, second"),
    ],
)
def test_another_models_file_is_told_what_it_looks_like(keys, what):
    with pytest.raises(ValueError, match=f"no Rev-ViT or Rev-MViT: .*{what}"):
        convert_state_dict({key: torch.zeros(2, 2) for key in keys})
