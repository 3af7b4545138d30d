"""The variants of the paper's ablations and the non-reversible baselines."""

import pytest
import torch
from detectron2.modeling import build_backbone
from test_backbones import NANO, assert_same, images, loss_of, make, step
from test_build import nano_config

from rev_det.checkpoint import inspect_weights, load_pretrained
from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.fusion import FUSIONS, TERMINATIONS

VARIANTS = [
    *((RevMViT, {"fusion": fusion}) for fusion in FUSIONS),
    *((cls, {"termination": termination}) for cls in (RevMViT, RevViT) for termination in TERMINATIONS),
    (RevMViT, {"inner_residual": True}),
    (RevViT, {"inner_residual": True}),
]


@pytest.mark.parametrize("cls, variant", VARIANTS)
def test_variants_have_the_same_gradients_in_all_activation_modes(cls, variant, monkeypatch):
    monkeypatch.setattr("rev_det.modeling.layers.CHUNK_VALUES", 2000)
    x = images().requires_grad_()
    expected = step(make(cls, activations="cached", drop_path_rate=0.4, **variant), x)
    for activations in ("reversible", "checkpoint"):
        assert_same(step(make(cls, activations=activations, drop_path_rate=0.4, **variant), x), expected)


@pytest.mark.parametrize("cls, variant", VARIANTS)
def test_variants_learn_and_are_saved_and_loaded(cls, variant, tmp_path):
    model = make(cls, torch.float32, **variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = images(dtype=torch.float32)
    losses = []
    for _ in range(5):
        loss = sum((y - 0.5).square().mean() for y in model(x).values())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    assert inspect_weights(tmp_path / "model.pth").problems == []
    torch.manual_seed(1)
    again = cls(**NANO[cls], **variant)
    report = load_pretrained(again, tmp_path / "model.pth")
    assert report.loaded == len(model.state_dict())
    for a, b in zip(model.eval()(x).values(), again.eval()(x).values(), strict=True):
        assert torch.equal(a, b)


def test_variants_differ_from_each_other_and_the_channels_stay():
    x = images(1, 64, 64)
    outputs = {}
    for cls, variant in VARIANTS:
        features = make(cls, **variant).eval()(x)
        outputs[cls, str(variant)] = loss_of(features).item()
        channels = [y.shape[1] for y in features.values()]
        assert channels == ([32] if cls is RevViT else [16, 32, 64, 128])
    # In eval mode the variants with dropout (one fusion, two terminations) are those without; and Rev-MViT's
    # default is listed twice, as a fusion and as a termination.
    assert len(set(outputs.values())) == len(outputs) - 4


def test_dropout_in_a_fusion_is_active_in_training_only():
    model = make(RevMViT, fusion="2x-mlp-dropout", termination="norm-2x-mlp-dropout")
    x = images(1, 64, 64)
    first, second = loss_of(model(x)), loss_of(model(x))
    assert first != second
    model.eval()
    assert loss_of(model(x)) == loss_of(model(x))


def test_norm_concat_normalises_each_stream_alone():
    from rev_det.modeling.fusion import ScaleNorm

    norm = ScaleNorm(8, "norm-concat").double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x1, x2 = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    expected = [
        torch.nn.functional.layer_norm(x, (8,), w, b, 1e-6)
        for x, w, b in zip((x1, x2), norm.weight.chunk(2), norm.bias.chunk(2), strict=True)
    ]
    torch.testing.assert_close(norm(x1, x2), torch.cat(expected, -1))


@pytest.mark.parametrize(
    "cls, argument, message",
    [
        (RevMViT, {"fusion": "3x-mlp"}, "fusion must be one of 2x-mlp, .* got '3x-mlp'"),
        (RevMViT, {"termination": "none"}, "termination must be one of concat-norm, .* got 'none'"),
        (RevViT, {"termination": "none"}, "termination must be one of concat-norm, .* got 'none'"),
    ],
)
def test_unknown_variants_are_named(cls, argument, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **argument)


@pytest.mark.parametrize("depth, last", [(24, (1, 4, 20, 23)), (48, (3, 9, 41, 47)), (80, (5, 14, 70, 79))])
def test_deeper_models_of_figure_3b_train(depth, last):
    model = make(RevMViT, torch.float32, depth=depth, last_block_indexes=last)
    loss_of(model(images(1, 64, 64, torch.float32))).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("activations", ["cached", "checkpoint"])
@pytest.mark.parametrize("family", ["vit", "mvit"])
def test_detectron2s_own_backbones_train_under_the_same_pyramids(family, activations):
    pytest.importorskip("timm")
    cfg = nano_config(f"build_baseline_{family}_fpn_backbone")
    cfg.MODEL.REV.ACTIVATIONS = activations
    backbone = build_backbone(cfg)
    outputs = backbone(torch.randn(1, 3, 64, 96))
    assert list(outputs) == ["p2", "p3", "p4", "p5", "p6"]
    sum(y.square().mean() for y in outputs.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_a_baseline_without_timm_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="needs timm, which is not installed: pip install timm"):
        build_backbone(nano_config("build_baseline_vit_fpn_backbone"))
