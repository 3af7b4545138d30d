"""The variants of the paper's ablations."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from small_backbones import FAMILIES, images, loss_of, make, step
from small_blocks import REBUILT, assert_as_cached
from torch.nn import functional

from rev_det.checkpoint import inspect_weights, load_pretrained
from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.fusion import FUSIONS, TERMINATIONS, ScaleNorm, build_fusion

# Rev-MViT's default is listed twice, as a fusion and as a termination.
VARIANTS = pytest.mark.parametrize(
    "cls, variant",
    [
        *((RevMViT, {"fusion": fusion}) for fusion in FUSIONS),
        *itertools.product((RevMViT, RevViT), ({"termination": t} for t in TERMINATIONS)),
        *itertools.product((RevMViT, RevViT), [{"inner_residual": True}]),
    ],
)


@VARIANTS
def test_in_parts_they_have_the_gradients_of_ordinary_autograd(cls, variant, monkeypatch):
    monkeypatch.setattr("rev_det.modeling.layers.PART_VALUES", 500)
    variant, x = {"drop_path_rate": 0.4, **variant}, images().requires_grad_()
    assert_as_cached(lambda mode: step(make(cls, activations=mode, **variant), x), *REBUILT)
    block, tokens = make(cls).blocks[0], torch.empty(2, 60, 8)
    assert block.G.parts(tokens) > (1, 3) and block.F.parts(tokens) == (0, 2)


@VARIANTS
def test_they_are_saved_and_loaded(cls, variant, tmp_path):
    model, x = make(cls, torch.float32, **variant).eval(), images(1, 64, 64, torch.float32)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    assert inspect_weights(tmp_path / "model.pth").problems == []
    again = make(cls, torch.float32, **variant).apply(randomise).eval()
    assert loss_of(again(x)) != loss_of(model(x))
    assert load_pretrained(again, tmp_path / "model.pth").loaded == len(model.state_dict())
    assert loss_of(again(x)) == loss_of(model(x))


def randomise(module):
    for p in module.parameters(recurse=False):
        torch.nn.init.normal_(p)


def test_they_differ_and_dropout_is_active_in_training_only():
    """In eval mode the variants with dropout, one fusion and two terminations, are those without."""
    x, cases = images(1, 64, 64), VARIANTS.args[1]
    models = [make(cls, **variant) for cls, variant in cases]
    dropout = [any("dropout" in str(value) for value in variant.values()) for _, variant in cases]
    assert [loss_of(model(x)).item() != loss_of(model(x)).item() for model in models] == dropout
    assert len({loss_of(model.eval()(x)).item() for model in models}) == len(models) - sum(dropout) - 1


def randomised(module):
    """In float64 and eval mode, with random values for all parameters, norms included."""
    torch.manual_seed(3)
    return module.apply(randomise).double().eval()


def norm(x, module):
    return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, eps=1e-6)


def mlp(x, module):
    return module.fc2(functional.gelu(module.fc1(x)))


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


@FAMILIES
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
