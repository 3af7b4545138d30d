"""The variants of the paper's ablations and the non-reversible baselines."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from test_backbones import NANO, assert_same, images, loss_of, make, step
from test_build import nano_config

from rev_det import add_rev_det_config
from rev_det.checkpoint import RevCheckpointer, inspect_weights, load_pretrained
from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.fusion import FUSIONS, TERMINATIONS, ScaleNorm, build_fusion

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VARIANTS = [
    *((RevMViT, {"fusion": fusion}) for fusion in FUSIONS),
    *((cls, {"termination": termination}) for cls in (RevMViT, RevViT) for termination in TERMINATIONS),
    (RevMViT, {"inner_residual": True}),
    (RevViT, {"inner_residual": True}),
]


@pytest.mark.parametrize("cls, variant", VARIANTS)
def test_variants_have_the_same_gradients_in_all_activation_modes(cls, variant, monkeypatch):
    monkeypatch.setattr("rev_det.modeling.layers.PART_VALUES", 2000)
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


OPTIONS = [
    *(("MODEL.REV_MVIT.FUSION", fusion) for fusion in FUSIONS),
    *(("MODEL.REV.TERMINATION", termination) for termination in TERMINATIONS[1:]),
    ("MODEL.REV.INNER_RESIDUAL", True),
]


@pytest.mark.parametrize("option", OPTIONS, ids=[str(value) for _, value in OPTIONS])
def test_the_nano_config_trains_with_every_option_and_is_saved_and_loaded(option, tmp_path):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 3, *option])
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)  # the same draws of boxes to train on
        with EventStorage():
            loss = sum(model([square_image()]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    RevCheckpointer(model, str(tmp_path)).save("model_final")
    again = build_model(cfg)
    RevCheckpointer(again, evaluation=True).load(str(tmp_path / "model_final.pth"))
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    x = images(1, 64, 64, torch.float32)
    features, expected = again.eval().backbone(x), model.eval().backbone(x)
    assert all(torch.equal(features[name], expected[name]) for name in expected)


def square_image():
    """A picture of 64 px with one square on it, as Detectron2's data loader would give it."""
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[16.0, 16.0, 48.0, 48.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = PolygonMasks([[np.array([16.0, 16, 48, 16, 48, 48, 16, 48])]])
    image = torch.zeros(3, 64, 64)
    image[:, 16:48, 16:48] = 255.0
    return {"image": image, "instances": instances, "height": 64, "width": 64}


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


def randomised(module):
    """In float64 and eval mode, with random values for all parameters, norms included."""
    torch.manual_seed(3)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module.double().eval()


def norm(x, module):
    """LayerNorm written out, with a module's parameters."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias


def mlp(x, module):
    hidden = x @ module.fc1.weight.T + module.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ module.fc2.weight.T + module.fc2.bias


STREAMS = torch.randn(2, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Z = torch.cat(list(STREAMS), -1)
# What the paper's Table 6 says of each, of the module m.
FUSED = {
    "2x-mlp": lambda m: Z + mlp(Z, m),
    "4x-mlp": lambda m: Z + mlp(Z, m),
    "norm-2x-mlp": lambda m: Z + mlp(norm(Z, m.norm), m),
    "2x-mlp-dropout": lambda m: Z + mlp(Z, m),
    "concat": lambda m: Z,
    "max": lambda m: STREAMS.amax(0),
}
ENDED = {
    "concat-norm": lambda m: norm(Z, m),
    "norm-concat": lambda m: torch.cat([norm(x, p) for x, p in zip(STREAMS, halves(m), strict=True)], -1),
    "norm-1-layer": lambda m: norm(Z, m) @ m.linear.weight.T + m.linear.bias,
    "norm-2x-mlp": lambda m: norm(Z, m) + mlp(norm(Z, m), m.mlp),
    "norm-2x-mlp-dropout": lambda m: norm(Z, m) + mlp(norm(Z, m), m.mlp),
    "norm-2x-mlp-norm": lambda m: norm(norm(Z, m) + mlp(norm(Z, m), m.mlp), m.final_norm),
}


def halves(module):
    pairs = zip(module.weight.chunk(2), module.bias.chunk(2), strict=True)
    return [SimpleNamespace(weight=w, bias=b) for w, b in pairs]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_is_its_equation(fusion):
    module = randomised(build_fusion(fusion, 8))
    torch.testing.assert_close(module(*STREAMS), FUSED[fusion](module))
    if "mlp" in fusion:
        assert module.fc1.out_features == (64 if fusion == "4x-mlp" else 32)


@pytest.mark.parametrize("termination", TERMINATIONS)
def test_a_termination_is_its_equation(termination):
    module = randomised(ScaleNorm(8, termination))
    torch.testing.assert_close(module(*STREAMS), ENDED[termination](module))
    if "mlp" in termination:
        assert module.mlp.fc1.out_features == 32


@pytest.mark.parametrize("cls", [RevViT, RevMViT])
def test_inner_residuals_are_added_inside_f_and_g(cls):
    naive, plain = make(cls, inner_residual=True).eval(), make(cls).eval()
    naive.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, naive.pos_embed.shape[-1], dtype=torch.float64)
    for name, hw in (("F", [(4, 3)]), ("G", [])):
        with_skip, without = (getattr(model.blocks[0], name) for model in (naive, plain))
        torch.testing.assert_close(with_skip(x, *hw), x + without(x, *hw))


def test_where_streams_are_reduced_the_projection_widens():
    transitions = [block for block in make(RevMViT, fusion="max").blocks if hasattr(block, "widen")]
    assert [(t.widen.in_features, t.widen.out_features) for t in transitions] == [(8, 16), (16, 32), (32, 64)]


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
