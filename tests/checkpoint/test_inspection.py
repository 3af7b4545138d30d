"""inspect_weights: what a file is, which model it fits, and whether it is whole."""

import re

import pytest
import torch
from tiny_weights import make_detector, make_mvit, make_vit, mmpretrain_state, pyslowfast_container

from rev_det.checkpoint import inspect_weights
from rev_det.modeling import RevMViT, RevViT

CLASS_SCORES = "roi_heads.box_predictor.cls_score.weight"


def test_a_published_container(official_vit, tmp_path):
    torch.save(pyslowfast_container(official_vit), tmp_path / "tiny.pyth")
    summary = inspect_weights(tmp_path / "tiny.pyth")
    assert (summary.layout, summary.model, summary.classes) == ("pyslowfast", None, 10)
    assert summary.parameters == sum(p.numel() for p in make_vit().parameters())
    assert summary.training_state == ["epoch", "optimizer_state", "cfg"]
    assert summary.problems == []


@pytest.mark.parametrize("name", ["tiny_rev_vit", "tiny_rev_mvit"])
def test_the_official_savers_files_are_sound(shared, name):
    summary = inspect_weights(shared / "reference" / "container" / f"{name}.pyth")
    assert (summary.layout, summary.problems) == ("pyslowfast", [])


@pytest.mark.parametrize("norm", ["", "BN"])  # batch norms count their batches, in integers
def test_other_layouts_and_whole_detectors(official_vit, norm):
    assert inspect_weights(mmpretrain_state(official_vit)).problems == []
    model = make_detector(norm=norm)
    detector = inspect_weights({"model": model.state_dict(), "iteration": 9})
    assert (detector.layout, detector.training_state, detector.problems) == ("rev_det", ["iteration"], [])
    assert detector.others == len(model.state_dict()) - len(make_mvit().state_dict())
    assert detector.geometry.last_block_indexes == (0, 2, 5)
    assert f"  pyramid and heads: {detector.others} tensors" in str(detector).splitlines()


@pytest.mark.parametrize(
    "make, model, title",
    [
        (lambda: RevViT(embed_dim=384, num_heads=6), "rev_vit_s", "Rev-ViT-S (width 384, depth 12)"),
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


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda x: x.long(), "int64, allowed are dense floating-point tensors"),
        (lambda x: x.to(torch.uint8), "uint8, allowed"),
        (lambda x: x > 0, "bool, allowed"),
        (lambda x: x.to(torch.complex64), "complex64, allowed"),
        (lambda x: x.to_sparse(), "float32 sparse_coo, allowed"),
        (lambda x: x.to("meta"), r"float32 without values \(on the meta device\), allowed"),
        (lambda x: torch.full_like(x, torch.inf), None),
    ],
)
def test_what_is_no_weight_is_a_problem_in_the_backbone_the_classifier_and_the_heads(
    official_vit, change, found
):
    detector = make_detector().state_dict()
    for state, key in (
        (official_vit, "norm.bias"),
        (official_vit, "head.projection.bias"),
        (detector, CLASS_SCORES),
        (detector, "backbone.fpn_lateral3.bias"),
    ):
        (problem,) = inspect_weights({**state, key: change(state[key])}).problems
        assert re.search(f"{key} is {found}" if found else f"NaN, infinite .*: {key}", problem)
