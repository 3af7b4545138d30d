"""FLOPs and parameters against the official models' and the paper's; images that fit; inversion errors."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from rev_det.analysis.cases import Case, Counting
from rev_det.analysis.counting import count_backbone
from rev_det.analysis.fits import CARDS, images_that_fit
from rev_det.analysis.flops import analyze_detector, attention_flops, count_flops
from rev_det.analysis.inversion import inversion_errors, reversible_backbone
from rev_det.analysis.peers import CACHED, MODELS, REVERSIBLE_KEPT, build
from rev_det.modeling import RevMViT, RevViT

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
    counted = count_backbone(build(MODELS[name], CACHED), 1, (224, 224)).forward.flops
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
    assert attention_flops.__doc__


def test_the_pyramid_on_rev_mvit_b_costs_what_the_paper_counts(config):
    """Of the 683 G of the paper, 567.7 are the backbone's with its FPN; the rest is Detectron2's heads."""
    detector = build_model(config(file="rev_mvit_b"))
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(58.80e6, rel=1e-4)
    flops = count_backbone(detector.backbone, 1, (800, 1280)).forward.flops / 2
    # Its norms, which are not counted here, are the difference.
    assert flops == pytest.approx(567.67e9, rel=2e-3)


@pytest.mark.slow
def test_mask_rcnn_on_rev_mvit_b_costs_what_the_paper_counts(config):
    whole, *_ = analyze_detector(config(file="rev_mvit_b"), (800, 1280))
    assert whole.parameters == pytest.approx(58.80e6, rel=1e-4)
    assert 683e9 <= whole.flops <= 686e9


def test_modules_of_a_detector_add_up(config):
    costs = {cost.name: cost for cost in analyze_detector(config(), (128, 128), depth=2)}
    parts = [costs[name] for name in ("backbone", "proposal_generator", "roi_heads")]
    assert sum(cost.parameters for cost in parts) == costs[""].parameters
    assert sum(cost.flops for cost in parts) == costs[""].flops
    assert (costs[""].kind, costs["backbone.bottom_up"].kind) == ("GeneralizedRCNN", "RevMViT")
    assert "backbone.bottom_up.blocks" not in costs
    # 100 detections in the mask head, by hand: two convolutions of 64 channels on 14 x 14, the upsampling to
    # 28 x 28 by 2 x 2, and 80 classes.
    convolutions = 2 * 14 * 14 * 9 * 64 * 64
    assert costs["roi_heads.mask_head"].flops == 100 * (convolutions + 28 * 28 * 64 * (64 + 80))


def case(scheme, cfg=None):
    model = None if cfg is not None else MODELS["rev_vit_s"]
    return Case("it", model, scheme, 1, (64, 64) if cfg else (224, 224), "fp32", cfg=cfg)


def test_images_that_fit_fill_the_card_and_no_more():
    done = []
    row, other = images_that_fit([case(CACHED), case(REVERSIBLE_KEPT)], lambda: done.append(1))
    assert len(done) == 4
    images = [int(row.figures[f"{card} GB"].value) for card in CARDS]
    assert images == sorted(images) and images[0] > 100
    one, each = (Counting().count(case(CACHED)).total, row.figures["each further one"].value * 2**30)
    for card, n in zip(CARDS, images, strict=True):
        assert one + (n - 1) * each <= card * 1e9 < one + n * each
    assert other.figures["12 GB"].value > row.figures["12 GB"].value
    assert {f.method for f in row.figures.values()} == {"counted"}


def test_a_card_that_is_too_small_fits_nothing(config, monkeypatch):
    monkeypatch.setattr("rev_det.analysis.fits.CARDS", (0.01, 12))
    few = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4)
    (row,) = images_that_fit([case(REVERSIBLE_KEPT, config(*few))])
    assert row.figures["0.01 GB"].value == 0
    assert row.figures["12 GB"].value > 10


NANO = {
    RevViT: {"patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2, "pretrain_img_size": 64},
    RevMViT: {"embed_dim": 16, "depth": 9, "last_block_indexes": (0, 2, 6, 8), "pretrain_img_size": 64},
}


@pytest.mark.parametrize("cls", [RevViT, RevMViT])
def test_inversion_is_exact_up_to_the_precision_of_the_streams(cls):
    torch.manual_seed(0)
    model = cls(**NANO[cls])
    for p in model.parameters():  # larger than at the start, as in the course of training
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    images = torch.randn(1, 3, 64, 64)
    exact, rough = inversion_errors(model, images), inversion_errors(model, images, torch.bfloat16)
    double = inversion_errors(model.double(), images.double())
    assert model.training
    assert max(e.error for e in double) < 1e-13
    assert 1e-9 < max(e.error for e in exact) < 1e-4
    assert max(e.error for e in rough) < 0.2
    names = [e.block for e in exact]
    assert names == sorted(names, key=lambda name: int(name.split(".")[1]))
    if cls is RevMViT:
        stages = {"blocks.0": 0, "blocks.2": 1, "blocks.4": 2, "blocks.5": 2, "blocks.6": 2, "blocks.8": 3}
        assert {e.block: e.stage for e in exact} == stages
    else:
        # Errors grow from the end of the run to its start.
        assert exact[0].error > exact[-1].error


def test_a_wrong_inverse_is_seen(monkeypatch):
    model = RevViT(**NANO[RevViT])
    g = model.blocks[5].G
    calls = []

    def different_the_second_time(module, inputs, result):
        calls.append(1)
        return result if len(calls) == 1 else result + 1.0

    g.register_forward_hook(different_the_second_time)
    errors = [e.error for e in inversion_errors(model, torch.randn(1, 3, 64, 64))]
    assert min(errors[:6]) > 0.1 and max(errors[6:]) < 1e-5


def test_only_reversible_backbones_are_inverted(config):
    assert isinstance(reversible_backbone(config()), RevMViT)
    resnet = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res4"])
    resnet += ("MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "MODEL.RESNETS.OUT_FEATURES", ["res4"])
    levels = ("MODEL.RPN.IN_FEATURES", ["p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p4"])
    with pytest.raises(ValueError, match="build_resnet_fpn_backbone is not reversible"):
        reversible_backbone(config(*resnet, *levels))
