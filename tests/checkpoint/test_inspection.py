"""inspect_weights: what a file is, which model it fits, and whether it is whole."""

import re

import pytest
import torch
from tiny_weights import make_detector, make_mvit, make_vit, mmpretrain_state, pyslowfast_container

from rev_det.checkpoint import inspect_weights
from rev_det.modeling import RevMViT, RevViT


def test_a_published_container(official_vit, tmp_path):
    torch.save(pyslowfast_container(official_vit), tmp_path / "tiny.pyth")
    summary = inspect_weights(tmp_path / "tiny.pyth")
    assert (summary.layout, summary.model, summary.classes) == ("pyslowfast", None, 10)
    assert summary.parameters == sum(p.numel() for p in make_vit().parameters())
    assert summary.training_state == ["epoch", "optimizer_state", "cfg"]
    assert summary.problems == []
    assert str(summary).splitlines() == [
        f"{tmp_path}/tiny.pyth: Rev-ViT (width 32, depth 4)",
        "  layout: pyslowfast",
        "  backbone: 69 tensors, 76,064 parameters (69 float32)",
        "  position embedding: 4 x 4",
        "  classifier: 10 classes",
        "  also holds: epoch, optimizer_state, cfg",
    ]


@pytest.mark.parametrize("name", ["tiny_rev_vit", "tiny_rev_mvit"])
def test_the_official_savers_files_are_sound(shared, name):
    summary = inspect_weights(shared / "reference" / "container" / f"{name}.pyth")
    assert (summary.layout, summary.problems) == ("pyslowfast", [])


def test_other_layouts_and_whole_detectors(official_vit):
    assert inspect_weights(mmpretrain_state(official_vit)).problems == []
    detector = inspect_weights({"model": make_detector().state_dict(), "iteration": 9})
    assert (detector.layout, detector.training_state, detector.problems) == ("rev_det", ["iteration"], [])
    assert detector.others == len(make_detector().state_dict()) - len(make_mvit().state_dict())
    assert detector.geometry.last_block_indexes == (0, 2, 5)
    assert f"  pyramid and heads: {detector.others} tensors" in str(detector).splitlines()


@pytest.mark.parametrize(
    "make, model, title",
    [
        (lambda: RevViT(embed_dim=384, num_heads=6), "rev_vit_s", "Rev-ViT-S (width 384, depth 12)"),
        (lambda: RevViT(), "rev_vit_b", "Rev-ViT-B (width 768, depth 12)"),
        (
            lambda: RevViT(embed_dim=1024, depth=24, num_heads=16),
            "rev_vit_l",
            "Rev-ViT-L (width 1024, depth 24)",
        ),
        (
            lambda: RevViT(embed_dim=1280, depth=32, num_heads=16),
            "rev_vit_h",
            "Rev-ViT-H (width 1280, depth 32)",
        ),
        (lambda: RevViT(patch_size=32), None, "Rev-ViT (width 768, depth 12, patch kernel 32 x 32)"),
        (lambda: RevMViT(), "rev_mvit_b", "Rev-MViT-B (width 96, depth 16)"),
        (
            lambda: RevMViT(depth=24, last_block_indexes=(1, 4, 20, 23)),
            None,
            "Rev-MViT (width 96, depth 24, last block of each stage 1, 4, 20, 23)",
        ),
    ],
)
def test_the_model_that_a_file_fits(make, model, title):
    with torch.device("meta"):
        shapes = make().state_dict()
    # One value for all: a full-size file in no memory.
    state = {key: torch.zeros(()).expand(value.shape) for key, value in shapes.items()}
    summary = inspect_weights(state)
    assert summary.model == model
    assert str(summary.geometry) == title
    assert summary.problems == []


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("norm.bias"), "1 tensors missing, or of another shape: norm.bias"),
        (
            lambda s: s.update({"norm.weight": torch.ones(3)}),
            "1 tensors missing, or of another shape: norm.weight",
        ),
        (lambda s: s.update(extra=torch.ones(3)), "1 tensors unexpected: extra"),
        (lambda s: s.update({"norm.bias": torch.full((64,), torch.nan)}), "NaN"),
        (lambda s: s.update({"norm.bias": torch.ones(64, dtype=torch.int32)}), "norm.bias is int32"),
        (lambda s: s.pop("patch_embed.proj.weight"), "patch embedding.* is not whole"),
        (
            lambda s: s.update({"rev_backbone.layers.90.F.norm.bias": torch.ones(32)}),
            "5 blocks, but the last",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_listed(official_vit, change, words):
    state = dict(official_vit)
    change(state)
    (problem,) = inspect_weights(state).problems
    assert re.search(words, problem)
