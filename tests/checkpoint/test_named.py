"""The named models: their sizes, their published files, and the classifier's head put back."""

import re
from urllib.parse import urlparse

import pytest
import torch
from tiny_named import add_tiny_model, container, save_tiny, tiny_state
from tiny_weights import mmpretrain_state

from rev_det.checkpoint.geometry import NAMED_HEADS, NAMED_MODELS, read_geometry
from rev_det.checkpoint.named import PUBLISHED, build_named_model, load_named_model


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    add_tiny_model(monkeypatch)


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_a_named_model_has_its_size_and_its_heads(name):
    with torch.device("meta"):
        model = build_named_model(name)
    assert read_geometry(model.state_dict()).model == name
    assert model.blocks[0].F.attn.num_heads == NAMED_HEADS[name]
    assert model.pos_embed.shape[1] == (56 if name == "rev_mvit_b" else 14) ** 2


def test_an_unknown_model_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="no model 'rev_vit_xl'.*rev_vit_s, rev_vit_b, rev_vit_l"):
        build_named_model("rev_vit_xl")


def test_the_published_files_are_three_addresses_of_pyslowfast():
    files = {name: urlparse(PUBLISHED[name].url) for name in ("rev_vit_s", "rev_vit_b", "rev_mvit_b")}
    for name, url in files.items():
        assert (url.scheme, url.netloc) == ("https", "dl.fbaipublicfiles.com")
        assert url.path == f"/pyslowfast/rev/{name.upper()}.pyth"
    assert [PUBLISHED[name].top1 for name in files] == [79.9, 81.8, 82.9]


def test_the_file_chooses_the_model_and_brings_its_head(tmp_path):
    weights = load_named_model(save_tiny(tmp_path / "tiny.pyth"))
    assert weights.model == "rev_vit_tiny"
    assert not weights.backbone.training
    state = tiny_state()
    assert torch.equal(weights.head.weight, state["head.projection.weight"])
    assert torch.equal(weights.head.bias, state["head.projection.bias"])
    assert (weights.report.loaded, weights.report.expected, weights.report.dropped) == (69, 69, [])
    assert "  the classifier of 10 classes was put back" in str(weights.report).splitlines()


def test_mmpretrains_head_is_the_same_one():
    ours, theirs = (load_named_model(s) for s in (container(tiny_state()), mmpretrain_state(tiny_state())))
    assert theirs.report.layout == "mmpretrain"
    assert torch.equal(ours.head.weight, theirs.head.weight)
    assert torch.equal(ours.head.bias, theirs.head.bias)


def test_a_file_without_a_head_is_loaded_without(tmp_path):
    path = save_tiny(tmp_path / "t.pyth", **{"head.projection.weight": None, "head.projection.bias": None})
    weights = load_named_model(path)
    assert weights.head is None
    assert weights.report.notes == ["pos_embed was resized from 4 x 4 to 14 x 14 (bicubic)"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head.projection.bias": None}, "head is not whole: .* found weight (10, 64)"),
        ({"head.projection.bias": torch.zeros(9)}, "found weight (10, 64), bias (9,)"),
        ({"head.projection.weight": torch.zeros(10, 2, 32)}, "found weight (10, 2, 32), bias (10,)"),
        ({"head.projection.weight": torch.zeros(10, 32)}, "for 32 channels, .* has 64"),
        ({"head.projection.bias": torch.full((10,), torch.nan)}, "head holds NaN"),
        ({"norm.bias": torch.zeros(9)}, "norm.bias (9,) in the file, (64,) in the model"),
    ],
)
def test_a_damaged_head_or_backbone_is_an_error(tmp_path, changes, words):
    path = save_tiny(tmp_path / "tiny.pyth", **changes)
    pattern = re.escape(words).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern) as info:
        load_named_model(path)
    assert str(info.value).startswith(path)


def test_a_file_for_another_model_than_the_one_asked_for_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Another size: the file holds a Rev-ViT-TINY .* is a Rev-ViT-S"):
        load_named_model(save_tiny(tmp_path / "tiny.pyth"), "rev_vit_s")


def test_a_file_of_no_named_size_is_an_error_that_says_its_size(official_mvit):
    with pytest.raises(ValueError, match=r"the state holds a Rev-MViT \(width 16, .* none of the named"):
        load_named_model(official_mvit)
