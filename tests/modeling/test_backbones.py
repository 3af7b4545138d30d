"""RevViT and RevMViT as modules: shapes, gradients in all activation modes, drop path, bad arguments."""

import pytest
import torch

from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.backbone import pad_to_multiple
from rev_det.modeling.layers import ReversibleBlock
from rev_det.modeling.reversible import ACTIVATIONS

NANO = {
    RevViT: {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "pretrain_img_size": 64},
    RevMViT: {"embed_dim": 8, "depth": 9, "last_block_indexes": (0, 2, 6, 8), "pretrain_img_size": 64},
}
FAMILIES = pytest.mark.parametrize("cls", [RevViT, RevMViT])


def make(cls, dtype=torch.float64, **arguments):
    torch.manual_seed(0)
    return cls(**{**NANO[cls], **arguments}).to(dtype)


def images(batch=2, height=75, width=50, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def loss_of(outputs):
    return sum(
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs.values()
    )


def step(model, x, seed=5):
    """Loss, gradients of the images (if wanted) and all trainable parameters; ``seed`` is for drop path."""
    torch.manual_seed(seed)
    loss = loss_of(model(x))
    wanted = [x] * x.requires_grad + [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, wanted)


def assert_same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    scale = float(max(g.abs().max() for g in expected[1]))
    for grad, expected_grad in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance * scale)


@FAMILIES
@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.parametrize("batch, height, width", [(2, 75, 50), (1, 33, 97), (1, 64, 64)])
def test_the_three_activation_modes_have_the_same_gradients(cls, keep_attention, batch, height, width):
    x = images(batch, height, width).requires_grad_()
    results = {
        activations: step(
            make(cls, activations=activations, keep_attention=keep_attention, drop_path_rate=0.4), x
        )
        for activations in ACTIVATIONS
    }
    for activations in ("reversible", "checkpoint"):
        assert_same(results[activations], results["cached"])


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_transitions_cached_or_checkpointed_have_the_same_gradients(activations):
    x = images().requires_grad_()
    results = [
        step(make(RevMViT, activations=activations, transitions=transitions, drop_path_rate=0.4), x)
        for transitions in ("cached", "checkpoint")
    ]
    assert_same(*results)


@FAMILIES
def test_working_in_parts_leaves_the_gradients_equal(cls, monkeypatch):
    x = images().requires_grad_()
    expected = step(make(cls, drop_path_rate=0.4), x)
    monkeypatch.setattr("rev_det.modeling.layers.PART_VALUES", 500)
    model = make(cls, drop_path_rate=0.4)
    tokens = torch.empty(2, 60, 8)
    assert model.blocks[0].G.parts(tokens) > (1, 3)
    assert model.blocks[0].F.parts(tokens) == (0, 2)
    assert_same(step(model, x), expected)


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


@FAMILIES
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_parameter_receives_a_gradient(cls, activations):
    model = make(cls, activations=activations)
    loss_of(model(images())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@FAMILIES
@pytest.mark.parametrize("activations", ["reversible", "checkpoint"])
@pytest.mark.parametrize("keep_attention", [True, False])
def test_hooks_on_every_parameter_run_once_and_on_the_whole_gradient(cls, activations, keep_attention):
    def gradients(**arguments):
        model, arrived = make(cls, **arguments), []
        for name, p in model.named_parameters():
            p.register_hook(lambda g: 2 * g)
            p.register_post_accumulate_grad_hook(lambda p, name=name: arrived.append((name, p.grad.clone())))
        loss = loss_of(model(images()))
        loss.backward()
        assert len(arrived) == len(list(model.parameters()))
        return loss, [dict(arrived)[name] for name, _ in model.named_parameters()]

    actual = gradients(activations=activations, keep_attention=keep_attention)
    assert_same(actual, gradients(activations="cached"))


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
    results = []
    for activations in ("reversible", "cached"):
        model = make(cls, activations=activations, keep_attention=keep_attention, drop_path_rate=0.4)
        given = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        torch.manual_seed(0)
        halves = {name: p / 2 for name, p in given.items()}  # no leaves
        loss = loss_of(torch.func.functional_call(model, halves, (images(),)))
        results.append((loss, torch.autograd.grad(loss, list(given.values()))))
    assert_same(*results)


@FAMILIES
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("keep_attention", [True, False])
def test_the_meta_device_trains_and_predicts(cls, activations, keep_attention):
    """Shapes without memory, as initialisation on it and sharding tools need."""
    with torch.device("meta"):
        model = make(
            cls, torch.float32, activations=activations, keep_attention=keep_attention, drop_path_rate=0.4
        )
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
def test_the_same_seed_gives_the_same_losses_and_the_generator_is_only_used_by_drop_path(cls):
    def losses(drop_path_rate):
        torch.manual_seed(0)
        model = make(cls, torch.float32, drop_path_rate=drop_path_rate)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.manual_seed(7)
        values = []
        for _ in range(3):
            loss = loss_of(model(images(dtype=torch.float32)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values, torch.rand(2)

    first, second = losses(0.4), losses(0.4)
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    assert len(set(first[0])) == 3
    after_training = losses(0.0)[1]
    torch.manual_seed(7)
    assert torch.equal(after_training, torch.rand(2)), "a model without randomness advanced the generator"


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


def test_rev_mvit_outputs_are_ceil_of_size_over_stride():
    model = make(RevMViT, torch.float32).eval()
    for height, width in ((64, 64), (75, 50), (33, 1), (128, 31)):
        with torch.no_grad():
            outputs = model(images(1, height, width, torch.float32))
        assert list(outputs) == ["scale2", "scale3", "scale4", "scale5"]
        for (name, y), channels, stride in zip(
            outputs.items(), (16, 32, 64, 128), (4, 8, 16, 32), strict=True
        ):
            assert y.shape == (1, channels, -(-height // stride), -(-width // stride)), name
            assert y.is_contiguous()
            shape = model.output_shape()[name]
            assert (shape.channels, shape.stride) == (channels, stride)


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


def test_fewer_stages_number_their_scales_from_two():
    model = make(
        RevMViT, torch.float32, depth=6, last_block_indexes=(0, 2, 5), out_features=("scale4", "scale2")
    )
    assert list(model(images(1, 64, 64, torch.float32))) == ["scale2", "scale4"]


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


@pytest.mark.parametrize(
    "cls, arguments, message",
    [
        (RevMViT, {"activations": "stored"}, "activations must be one of .* got 'stored'"),
        (RevViT, {"activations": "stored"}, "activations must be one of .* got 'stored'"),
        (RevMViT, {"transitions": "reversible"}, "transitions must be one of .* got 'reversible'"),
        (
            RevMViT,
            {"out_features": ("scale2", "res5")},
            r"out_features must be some of scale2, .* got .*res5",
        ),
        (RevMViT, {"out_features": ()}, "out_features must be some of"),
        (
            RevMViT,
            {"last_block_indexes": (0, 2, 6, 7)},
            r"last_block_indexes must be whole numbers that increase.* got \(0, 2, 6, 7\)",
        ),
        (
            RevMViT,
            {"last_block_indexes": (0, 6, 2, 8)},
            r"last_block_indexes must be whole numbers that increase.* got \(0, 6, 2, 8\)",
        ),
        (RevMViT, {"last_block_indexes": (0, 1, 6, 8)}, "leave every stage a reversible block"),
        (RevMViT, {"last_block_indexes": ()}, "last_block_indexes"),
        (
            RevMViT,
            {"embed_dim": 9, "num_heads": 2},
            "num_heads must divide the width: 9 is not a multiple of 2",
        ),
        (RevViT, {"embed_dim": 15}, "num_heads must divide the width: 15 is not a multiple of 2"),
        (RevViT, {"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        (RevViT, {"pretrain_img_size": 65}, "pretrain_img_size must be a multiple of the patch stride"),
        (RevViT, {"freeze_at": 6}, r"freeze_at must be 0 .* to 5"),
        (RevViT, {"freeze_at": True}, "freeze_at must be 0 .* got True"),
        (RevViT, {"patch_size": 0}, "patch_size must be a whole number of at least 1, got 0"),
        (
            RevMViT,
            {"patch_stride": (4, 8)},
            r"patch_stride must be the same in both directions, got \(4, 8\)",
        ),
        (
            RevMViT,
            {"patch_padding": (0, 0)},
            r"patch_padding must be .* got padding \(0, 0\), kernel \(7, 7\)",
        ),
        (RevMViT, {"patch_padding": (3, 4)}, "patch_padding must be at least half of patch_kernel"),
        (
            RevMViT,
            {"last_block_indexes": ("0", "2", "6", "8")},
            "last_block_indexes must be whole .*'0', '2'",
        ),
        (RevMViT, {"last_block_indexes": (0, 2.5, 6, 8)}, "last_block_indexes must be whole .*2.5"),
        (RevMViT, {"last_block_indexes": (0, 2, 6, 8), "depth": 9.0}, "depth must be a whole number"),
        (
            RevMViT,
            {"adaptive_kv_stride": 0},
            "adaptive_kv_stride must be a whole number of at least 1, got 0",
        ),
        (RevMViT, {"qkv_pool_kernel": (2, 2)}, "qkv_pool_kernel must have odd sizes"),
    ],
)
def test_bad_arguments_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **arguments)


@FAMILIES
@pytest.mark.parametrize(
    "name, values",
    {
        "in_chans": (0, -3, "3"),
        "embed_dim": (0, -8, 8.0, "8", True),
        "depth": (0, -1, 9.0, "9"),
        "num_heads": (0, -1, 1.0),
        "mlp_ratio": (0.0, -1.0, 0.01, float("inf"), float("nan"), "4", True),
        "drop_path_rate": (-0.1, 1.0, float("nan"), "0"),
        "pretrain_img_size": (0, -64, 64.0),
    }.items(),
)
def test_sizes_that_are_none_are_named_by_both_families(cls, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make(cls, **{name: value})


@pytest.mark.parametrize("name", ["patch_kernel", "patch_stride", "patch_padding", "qkv_pool_kernel"])
@pytest.mark.parametrize("value", [(3,), (), (3, 3, 3), (-1, -1), (3.0, 3.0), ("3", "3"), 3, None])
def test_pairs_that_are_none_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be two whole numbers of at least [01], "):
        make(RevMViT, **{name: value})


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
