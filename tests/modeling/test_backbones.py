"""RevViT and RevMViT as modules: shapes, gradients in all activation modes, drop path, bad arguments."""

import itertools

import pytest
import torch
from small_backbones import FAMILIES, NANO, images, loss_of, make, step
from small_blocks import REBUILT, assert_as_cached, assert_same
from torch._dynamo.utils import counters

from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.backbone import pad_to_multiple
from rev_det.modeling.layers import ReversibleBlock
from rev_det.modeling.reversible import ACTIVATIONS

MODES = [dict(activations=mode, keep_attention=kept) for mode in REBUILT for kept in (True, False)]
TRANSITIONS = [
    {"activations": mode, "transitions": transitions}
    for mode, transitions in itertools.product(ACTIVATIONS, ("cached", "checkpoint"))
]


@pytest.mark.parametrize(
    "cls, mode", [*itertools.product((RevViT, RevMViT), MODES), *((RevMViT, mode) for mode in TRANSITIONS)]
)
@pytest.mark.parametrize("size", [(2, 75, 50), (1, 33, 97)])
def test_every_mode_has_the_gradients_of_ordinary_autograd(cls, mode, size):
    x = images(*size).requires_grad_()
    expected = step(make(cls, activations="cached", drop_path_rate=0.4), x)
    assert_same(step(make(cls, drop_path_rate=0.4, **mode), x), expected)


@FAMILIES
@pytest.mark.parametrize("freeze_at", [1, 2, 4])
def test_frozen_stem_and_blocks_leave_the_other_gradients_unchanged(cls, freeze_at):
    x = images()
    model = make(cls, freeze_at=freeze_at)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "patch_embed.proj.weight"} <= frozen
    assert any(name.startswith(f"blocks.{freeze_at - 2}.") for name in frozen) == (freeze_at > 1)
    assert not any(name.startswith(f"blocks.{freeze_at - 1}.") for name in frozen)
    assert_same(step(model, x), step(make(cls, freeze_at=freeze_at, activations="cached"), x))


@pytest.mark.parametrize("depth, last", [(24, (1, 4, 20, 23)), (48, (3, 9, 41, 47)), (80, (5, 14, 70, 79))])
def test_deeper_models_of_figure_3b_train(depth, last):
    model = make(RevMViT, torch.float32, depth=depth, last_block_indexes=last)
    loss_of(model(images(1, 64, 64, torch.float32))).backward()
    assert all(p.grad is not None for p in model.parameters())


@FAMILIES
@pytest.mark.parametrize("keep_attention", [True, False])
def test_hooks_on_every_parameter_run_once_and_on_the_whole_gradient(cls, keep_attention):
    def run(activations):
        model, arrived = make(cls, activations=activations, keep_attention=keep_attention), []
        for name, p in model.named_parameters():
            p.register_hook(lambda g: 2 * g)
            p.register_post_accumulate_grad_hook(lambda p, name=name: arrived.append((name, p.grad.clone())))
        loss = loss_of(model(images()))
        loss.backward()
        assert len(arrived) == len(list(model.parameters()))
        return loss, [dict(arrived)[name] for name, _ in model.named_parameters()]

    assert_as_cached(run, *REBUILT)


@FAMILIES
def test_gradients_arrive_along_the_backward_pass(cls):
    """From the last block to the first, as in ordinary autograd: DDP sends some while others are computed."""
    model, arrived = make(cls), []
    rebuilt = {}  # of each block, how many gradients had arrived when it was called again
    for i, block in enumerate(model.blocks):
        for p in block.parameters():
            p.register_post_accumulate_grad_hook(lambda _, i=i: arrived.append(i))
        block.F.norm.register_forward_hook(lambda *_, i=i: rebuilt.setdefault(i, []).append(len(arrived)))
    loss_of(model(images())).backward()
    assert arrived == sorted(arrived, reverse=True)
    for i, block in enumerate(model.blocks):
        later = sum(len(list(block.parameters())) for block in model.blocks[i + 1 :])
        if isinstance(block, ReversibleBlock):  # a transition has the gradients of its G by then
            assert rebuilt[i] == [0, later]


@FAMILIES
@pytest.mark.parametrize("keep_attention", [True, False])
def test_functional_call_has_gradients_of_the_tensors_it_is_given(cls, keep_attention):
    def run(activations):
        model = make(cls, activations=activations, keep_attention=keep_attention, drop_path_rate=0.4)
        given = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        torch.manual_seed(0)
        halves = {name: p / 2 for name, p in given.items()}  # no leaves
        loss = loss_of(torch.func.functional_call(model, halves, (images(),)))
        return loss, torch.autograd.grad(loss, list(given.values()))

    assert_as_cached(run)


@FAMILIES
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_meta_device_trains_and_predicts(cls, activations):
    """Shapes without memory, as initialisation on it and sharding tools need."""
    with torch.device("meta"):
        model = make(cls, torch.float32, activations=activations, drop_path_rate=0.4)
        x = images(dtype=torch.float32).to("meta")
    outputs = model(x)
    expected = make(cls, torch.float32)(images(dtype=torch.float32))
    assert {k: y.shape for k, y in outputs.items()} == {k: y.shape for k, y in expected.items()}
    sum(y.sum() for y in outputs.values()).backward()
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(x).keys() == expected.keys()


@FAMILIES
def test_bfloat16_autocast_is_as_close_to_float32_as_ordinary_autograd_is(cls):
    x = images(2, 128, 128, torch.float32)

    def flat(activations, enabled):
        model = make(cls, torch.float32, activations=activations)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(x)
        assert all(y.dtype == (torch.bfloat16 if enabled else torch.float32) for y in outputs.values())
        loss = loss_of({k: y.float() for k, y in outputs.items()})
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    exact = flat("cached", enabled=False)
    error_cached = (flat("cached", enabled=True) - exact).norm()
    error_reversible = (flat("reversible", enabled=True) - exact).norm()
    assert error_cached > 1e-4 * exact.norm(), "bfloat16 was not used"
    # Measured: 1.000 (Rev-ViT) and 0.997 (Rev-MViT) times the error of ordinary autograd.
    assert error_reversible < 1.01 * error_cached


@FAMILIES
def test_the_same_seed_gives_the_same_step_and_the_generator_is_only_used_by_drop_path(cls):
    def seeded_step(drop_path_rate):
        model = make(cls, drop_path_rate=drop_path_rate)
        loss, grads = step(model, images(), seed=7)
        return loss, [*grads, torch.rand(2)]

    first, second = seeded_step(0.4), seeded_step(0.4)
    assert first[0] == second[0] and all(map(torch.equal, first[1], second[1]))
    torch.manual_seed(7)
    following = torch.rand(2)
    assert not torch.equal(first[1][-1], following)
    assert torch.equal(seeded_step(0.0)[1][-1], following)


@FAMILIES
def test_drop_path_is_off_in_eval_mode_and_drops_branches_of_samples_in_training(cls):
    model = make(cls, drop_path_rate=0.5)
    x = images()
    model.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x).values(), model(x).values(), strict=True))
    model.train()
    masks = model.draw_masks(torch.empty(4000, 1, dtype=torch.float64))
    assert masks[0] == (None, None)  # the rate grows linearly from 0
    for mask in masks[-1]:
        assert set(mask.tolist()) == {0.0, 2.0}
        assert abs(mask.mean() - 1.0) < 0.1
    assert not torch.equal(*masks[-1])  # F and G have masks of their own


def test_rev_vit_pads_zeros_on_the_right_and_at_the_bottom():
    model = make(RevViT, torch.float32).eval()
    x = images(1, 60, 41, torch.float32)
    with torch.no_grad():
        (y,) = model(x).values()
        (padded,) = model(torch.nn.functional.pad(x, (0, 7, 0, 4))).values()
    assert y.shape == (1, 32, 8, 6)
    assert torch.equal(y, padded)
    assert torch.equal(pad_to_multiple(x, 1), x)


def test_position_embedding_is_exact_at_the_pretraining_size_and_interpolated_elsewhere():
    model = make(RevViT, torch.float64)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.copy_(
            torch.linspace(0, 1, 8, dtype=torch.float64).repeat_interleave(8)[None, :, None]
        )
        exact, hw = model.embed(images(1, 64, 64))
        assert hw == (8, 8) and torch.equal(exact, model.pos_embed)
        wide, hw = model.embed(images(1, 64, 128))
    assert hw == (8, 16)
    # A ramp along the height stays one, whatever the width.
    torch.testing.assert_close(wide.view(8, 16, 16)[:, :, 0], exact.view(8, 8, 16)[:, :1, 0].expand(8, 16))


@pytest.mark.parametrize(
    "cls, arguments, parameters",
    [
        # The official models' less the classifier: 22,434,664 - 769,000; 87,335,656 - 1,537,000.
        (RevViT, {"embed_dim": 384, "num_heads": 6}, 21_665_664),
        (RevViT, {}, 85_798_656),
        # By hand: depth (12 C^2 + 13 C) + patch embedding (768 + 1) C + 196 C + final norm 4 C.
        (RevViT, {"embed_dim": 1024, "depth": 24, "num_heads": 16}, 303_301_632),
        # 39,689,320 - 1,537,000; then with the norms of the other scales.
        (RevMViT, {"out_features": ("scale5",)}, 38_152_320),
        (RevMViT, {}, 38_152_320 + 2 * (192 + 384 + 768)),
    ],
)
def test_parameter_counts_equal_the_official_models(cls, arguments, parameters):
    with torch.device("meta"):
        model = cls(**arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_initialisation_is_the_official_one():
    model = RevMViT(**{**NANO[RevMViT], "embed_dim": 32})
    for name, p in model.named_parameters():
        if name == "patch_embed.proj.bias":
            assert p.abs().max() <= 1 / (3 * 49) ** 0.5  # torch's own
        elif name.endswith("bias"):
            assert torch.all(p == 0.02), name
        elif p.dim() == 1:
            assert torch.all(p == 1.0), name
        elif p.numel() > 2000:
            assert abs(p.std() - 0.02) < 0.002 and abs(p.mean()) < 0.002, name


# By argument: what is said after its name, and values that are refused.
WHOLE = "must be a whole number of at least 1, got "
BAD = {
    "activations": ("must be one of reversible, cached, checkpoint; got 'stored'", ["stored"]),
    "termination": ("must be one of concat-norm, .* got 'none'", ["none"]),
    "in_chans": (WHOLE, [0, -3, "3"]),
    "embed_dim": (WHOLE, [0, -8, 8.0, "8", True]),
    "depth": (WHOLE, [0, -1, 9.0, "9"]),
    "num_heads": (f"({WHOLE}|must divide the width: (8|16) is not a multiple of 3)", [0, -1, 1.0, 3]),
    "mlp_ratio": ("must be a number that .* got ", [0.0, -1.0, 0.01, float("inf"), float("nan"), "4", True]),
    "drop_path_rate": ("must be at least 0 and below 1, got ", [-0.1, 1.0, float("nan"), "0"]),
    "pretrain_img_size": (f"({WHOLE}|must be a multiple of the patch stride)", [0, -64, 64.0, 65]),
    "freeze_at": ("must be 0 .* to (5|10) .* got ", [-1, 11, True]),
}
PAIR = "must be two whole numbers of at least [01], "
NO_PAIRS = [(3,), (), (3, 3, 3), (-1, -1), (3.0, 3.0), ("3", "3"), 3, None]
BAD_MVIT = {
    "transitions": ("must be one of auto, .* got 'reversible'", ["reversible"]),
    "fusion": ("must be one of 2x-mlp, .* got '3x-mlp'", ["3x-mlp"]),
    "out_features": ("must be some of scale2, .* got ", [("scale2", "res5"), ()]),
    "last_block_indexes": (
        "must be whole numbers that increase, leave every stage a reversible block .* got ",
        [(0, 2, 6, 7), (0, 6, 2, 8), (0, 1, 6, 8), (), ("0", "2", "6", "8"), (0, 2.5, 6, 8)],
    ),
    "adaptive_kv_stride": (WHOLE, [0]),
    "patch_kernel": (PAIR, NO_PAIRS),
    "patch_stride": (f"({PAIR}|must be the same in both directions, got )", [*NO_PAIRS, (4, 8)]),
    "patch_padding": (
        rf"({PAIR}|must be at least half of patch_kernel - .* got padding \(., .\), kernel \(7, 7\))",
        [*NO_PAIRS, (0, 0), (3, 4)],
    ),
    "qkv_pool_kernel": (f"({PAIR}|must have odd sizes, got )", [*NO_PAIRS, (2, 2)]),
}


@pytest.mark.parametrize(
    "cls, name, message, values",
    [
        *((cls, name, *case) for cls in (RevViT, RevMViT) for name, case in BAD.items()),
        *((RevMViT, name, *case) for name, case in BAD_MVIT.items()),
        (RevViT, "patch_size", WHOLE, [0]),
    ],
)
def test_bad_arguments_are_named(cls, name, message, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            make(cls, **{name: value})


@pytest.mark.parametrize("kernel, stride, padding", [(7, 4, 3), (4, 4, 0), (8, 4, 3), (3, 2, 1), (5, 4, 1)])
def test_patches_that_overlap_or_not_give_one_token_per_stride(kernel, stride, padding):
    model = make(
        RevMViT,
        torch.float32,
        patch_kernel=(kernel, kernel),
        patch_stride=[stride, stride],
        patch_padding=(padding, padding),
    )
    assert model.embed(images(1, 96, 64, torch.float32))[1] == (96 // stride, 64 // stride)


def assert_compiled_has_the_same_gradients(cls, **arguments):
    x = images(1, 40, 50)
    expected = step(make(cls, drop_path_rate=0.4, **arguments), x)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(make(cls, drop_path_rate=0.4, **arguments), backend="aot_eager")
    assert_same(step(compiled, x), expected)
    assert counters["stats"]["unique_graphs"] > 1, "nothing was compiled"
    breaks = list(counters["graph_break"])
    assert all("_run_reversible" in reason or "function _recompute" in reason for reason in breaks), breaks


def test_compiled_runs_and_recomputed_modules_break_the_graph_and_nothing_else_does():
    """With a transition, and a run of one block on either side of it."""
    two_stages = {"depth": 3, "last_block_indexes": (0, 2), "out_features": ("scale2", "scale3")}
    assert_compiled_has_the_same_gradients(RevMViT, **two_stages)


@pytest.mark.slow
@FAMILIES
def test_compiled_backbones_of_all_stages_have_the_same_gradients(cls):
    assert_compiled_has_the_same_gradients(cls)
