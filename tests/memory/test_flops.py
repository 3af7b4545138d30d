"""FLOPs and parameters against the official models' and the paper's."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from rev_det.comparison.models import CACHED, MODELS, build
from rev_det.memory.counting import count_step
from rev_det.memory.flops import FULL_HEADS, analyze_detector, count_flops

OFFICIAL = {
    # From the official models at 224x224, without their classifiers (fvcore: a multiply-add is one).
    "rev_vit_s": 4_583_427_072,
    "rev_vit_b": 17_490_450_432,
    "rev_mvit_b": 8_672_783_616,
}


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_flops_equal_the_official_models(name):
    model = build(MODELS[name], CACHED, device="cpu")
    with torch.no_grad():
        analysis = count_flops(model, torch.zeros(1, 3, 224, 224))
    # Ours has a norm for every scale, the official Rev-MViT-B for the last one only.
    assert analysis.total() == pytest.approx(OFFICIAL[name], rel=1e-3)
    assert analysis.total() >= OFFICIAL[name]
    # The counter of training steps counts the same, but no norms, and twice for multiply and add.
    counted = count_step(build(MODELS[name], CACHED), lambda: torch.empty(1, 3, 224, 224)).forward.flops
    assert counted == 2 * (analysis.total() - analysis.by_operator()["layer_norm"])


def test_official_flops_are_those_of_the_reference_data(shared):
    reference = json.loads((shared / "reference" / "params.json").read_text())
    for name, flops in OFFICIAL.items():
        assert flops == reference[name]["flops_224"] - reference[name]["flops_by_module"]["head"]


def test_the_two_products_of_fused_attention_are_counted():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.zeros(2, 3, 10, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 5)
    analysis = count_flops(Attention(), (q, k, v))
    assert analysis.total() == 2 * 3 * 10 * 7 * (8 + 5)


def test_the_pyramid_on_rev_mvit_b_costs_what_the_paper_counts(config):
    """Of the 683 G of the paper, 567.7 are the backbone's with its FPN; the rest is Detectron2's heads."""
    detector = build_model(config(file="rev_mvit_b"))
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(58.80e6, rel=1e-4)
    flops = count_step(detector.backbone, lambda: torch.empty(1, 3, 800, 1280)).forward.flops / 2
    # Its norms, which are not counted here, are the difference.
    assert flops == pytest.approx(567.67e9, rel=2e-3)


@pytest.mark.slow
def test_mask_rcnn_on_rev_mvit_b_costs_what_the_paper_counts(config):
    whole = costs(config(*FULL_HEADS, file="rev_mvit_b"), (800, 1280), 3)[""]
    assert whole["parameters"] == pytest.approx(58.80e6, rel=1e-4)
    assert 683e9 <= whole["FLOPs"] <= 686e9


def test_modules_of_a_detector_add_up(config):
    found = costs(config(*FULL_HEADS), (128, 128), 2)
    parts = [found[name] for name in ("backbone", "proposal_generator", "roi_heads")]
    for what in ("parameters", "FLOPs"):
        assert sum(part[what] for part in parts) == found[""][what]
    assert "backbone.bottom_up" in found and "backbone.bottom_up.blocks" not in found
    # 100 detections in the mask head, by hand: two convolutions of 64 channels on 14 x 14, the upsampling to
    # 28 x 28 by 2 x 2, and 80 classes.
    convolutions = 2 * 14 * 14 * 9 * 64 * 64
    assert found["roi_heads.mask_head"]["FLOPs"] == 100 * (convolutions + 28 * 28 * 64 * (64 + 80))


def costs(cfg, size, depth):
    rows = analyze_detector(build_model(cfg), size, depth)
    return {row.labels["module"]: {name: f.value for name, f in row.figures.items()} for row in rows}
