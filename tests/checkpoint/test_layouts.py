"""Every supported layout becomes our keys, by names and shapes alone; every other file is told what it is."""

import json

import numpy as np
import pytest
import torch
from tiny_weights import make_mvit, make_vit, mmpretrain_state, pyslowfast_container, renumbered, same

from rev_det.checkpoint import convert_state_dict
from rev_det.checkpoint.layouts import convert

HEAD = ["head.projection.weight", "head.projection.bias"]


def expected_backbone(official, last_norm):
    """The conversion written out by hand."""
    expected = {}
    for key, value in official.items():
        if key in HEAD:
            continue
        if ".pool_" in key:
            value = value[:, :, 0]
        expected[
            renumbered(key).replace("norm.", f"{last_norm}.") if key.startswith("norm.") else renumbered(key)
        ] = value
    return expected


def test_official_vit_becomes_ours_with_every_value(official_vit):
    converted = convert_state_dict(official_vit)
    assert same(converted, expected_backbone(official_vit, "norm"))
    make_vit().load_state_dict(converted, strict=True)


def test_official_mvit_becomes_ours_with_every_value(official_mvit):
    converted = convert_state_dict(official_mvit)
    assert same(converted, expected_backbone(official_mvit, "scale4_norm"))
    make_mvit(out_features=("scale4",)).load_state_dict(converted, strict=True)


def test_mmpretrain_equals_the_official_file_it_comes_from(official_vit):
    theirs = mmpretrain_state(official_vit)
    assert same(convert_state_dict(theirs), convert_state_dict(official_vit))
    bare = {
        key.removeprefix("backbone."): value for key, value in theirs.items() if key.startswith("backbone.")
    }
    assert same(convert_state_dict(bare), convert_state_dict(official_vit))


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


@pytest.mark.parametrize("container", ["model_state", "state_dict", "model"])
def test_containers_are_opened(official_vit, container):
    held = {container: official_vit, "epoch": 3, "cfg": "text", "optimizer_state": {"state": {}}}
    assert same(convert_state_dict(held), convert_state_dict(official_vit))


def test_heads_and_pyramids_are_kept_apart(official_vit):
    converted = convert(pyslowfast_container(official_vit))
    assert list(converted.dropped) == HEAD
    assert converted.dropped[HEAD[0]] is official_vit[HEAD[0]]
    state = {f"backbone.bottom_up.{key}": value for key, value in make_mvit().state_dict().items()}
    others = {"backbone.fpn_lateral2.weight": torch.zeros(1), "roi_heads.x": torch.zeros(1)}
    converted = convert({**state, **others})
    assert converted.prefix == "backbone.bottom_up."
    assert same(converted.others, others)


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


def test_an_entry_without_a_place_is_an_error(official_vit):
    with pytest.raises(ValueError, match=r"pyslowfast.*rev_backbone\.layers\.0\.extra"):
        convert_state_dict({**official_vit, "rev_backbone.layers.0.extra": torch.zeros(1)})


def test_two_backbones_in_one_file_are_an_error(official_vit):
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in official_vit.items()}
    with pytest.raises(ValueError, match=r"several backbones.*student.*teacher"):
        convert_state_dict(both)


def test_two_sets_of_weights_in_one_container_are_an_error(official_vit):
    with pytest.raises(ValueError, match="model_state, model"):
        convert_state_dict({"model": official_vit, "model_state": official_vit})


def test_fused_rows_that_are_no_multiple_of_three_are_an_error(official_vit):
    state = mmpretrain_state(official_vit)
    state["backbone.layers.1.attn.qkv.bias"] = torch.zeros(95)
    with pytest.raises(ValueError, match=r"blocks\.1\.F\.attn\.qkv\.bias.*\(95,\)"):
        convert_state_dict(state)


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


@pytest.mark.parametrize("telling", ["cls_token", "width"])
def test_mmpretrains_plain_vit_is_not_taken_for_a_reversible_one(official_vit, telling):
    state = mmpretrain_state(official_vit)
    if telling == "width":
        state["backbone.ln1.weight"] = torch.ones(32)
    else:
        state["backbone.cls_token"] = torch.zeros(1, 1, 32)
    with pytest.raises(ValueError, match="mmpretrain's plain vision transformer"):
        convert_state_dict(state)


@pytest.mark.parametrize(
    "state, what",
    [
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({"pos_embed": [1.0, 2.0]}, "'pos_embed' is a list"),
        ({"pos_embed": np.array(["a"])}, "'pos_embed' is a ndarray"),
        ({0: torch.zeros(1)}, "0 is a Tensor"),
        ({"epoch": 3, "cfg": "text"}, "'epoch' is a int"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_an_error(state, what):
    with pytest.raises(ValueError, match=what):
        convert_state_dict(state)
