"""Fused attention whose results are kept for the repeated call: same gradients, no kernel run twice."""

import itertools
from functools import partial

import pytest
import torch
from small_blocks import DIM, REBUILT, Attention, Mlp, assert_equals_cached, assert_same, blocks, step, stream
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rev_det.modeling import RevViT, kept_attention
from rev_det.modeling.kept_attention import AttentionTape, attention
from rev_det.modeling.reversible import ACTIVATIONS, ReversibleSequence


class Count(TorchDispatchMode):
    """Counts the runs of fused attention kernels."""

    def __init__(self):
        super().__init__()
        self.runs = {"forward": 0, "backward": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.runs["backward" if "backward" in str(func) else "forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options, activations, keep_attention, forwards, backwards",
    [
        ({}, "reversible", True, 3, 3),
        ({}, "reversible", False, 6, 3),
        ({}, "checkpoint", True, 3, 3),
        ({}, "checkpoint", False, 6, 3),
        ({"attend": scaled_dot_product_attention}, "reversible", True, 6, 3),  # somebody's F
        ({"parts": 2}, "reversible", True, 6, 6),
    ],
)
def test_kept_attention_is_not_computed_again(options, activations, keep_attention, forwards, backwards):
    x, body = stream().requires_grad_(), blocks(3, F=partial(Attention, **options))
    with Count() as count:
        step(ReversibleSequence(body, activations, keep_attention), x, x)
    assert count.runs == {"forward": forwards, "backward": backwards}
    assert_equals_cached(body, x, x, modes=[activations], keep_attention=keep_attention)


def dropped(q, k, v):
    """Attention with dropout, which is never kept, between two attentions without."""
    q = attention(q, k, v, scale=0.7)
    q = scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    return attention(q, k, 3 * v)


@pytest.mark.parametrize("keep_attention", [True, False])
def test_dropout_of_attention_is_repeated_beside_kept_attention(keep_attention):
    body = blocks(3, F=partial(Attention, attend=dropped), G=partial(Mlp, dropout=0.2))
    x = stream().requires_grad_()
    assert_equals_cached(body, x, x, modes=REBUILT, keep_attention=keep_attention)
    first, second = (step(ReversibleSequence(body, "cached"), x, x, seed=seed)[0] for seed in (3, 4))
    assert first != second, "the dropout does nothing"


def two_kernels(q, k, v):
    """The first attention is computed by no fused kernel, the second by one."""
    with sdpa_kernel(SDPBackend.MATH):
        y = attention(q, k, v)
    return attention(y, k, v)


def test_kept_attention_stays_in_step_when_a_call_keeps_nothing():
    x, body = stream().requires_grad_(), blocks(3, F=partial(Attention, attend=two_kernels))
    assert_equals_cached(body, x, x, keep_attention=True)
    with Count() as count:
        step(ReversibleSequence(body, keep_attention=True), x, x)
    assert count.runs["forward"] == 3


@pytest.mark.parametrize("in_forward", [True, False])
def test_kept_attention_when_another_kernel_is_chosen_in_the_backward_pass(in_forward):
    x = stream().requires_grad_()
    sequence = ReversibleSequence(blocks(2), keep_attention=True)
    wanted = [x, *sequence.parameters()]
    expected = torch.autograd.grad(sequence(x, x)[0].sum(), wanted)
    kernels = [SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(kernels[not in_forward]):
        y = sequence(x, x)[0]
    with sdpa_kernel(kernels[in_forward]):
        assert_same(torch.autograd.grad(y.sum(), wanted), expected)


class Checkpointed(Attention):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Nested(Attention):
    """A sequence inside F, before an attention."""

    def __init__(self, activations, keep_attention):
        super().__init__()
        self.inner = ReversibleSequence(blocks(2), activations, keep_attention)

    def forward(self, x):
        y1, y2 = self.inner(x, x.cos())
        return super().forward(y1 + y2)


NESTED = [partial(Nested, *options) for options in itertools.product(ACTIVATIONS, (True, False))]


@pytest.mark.parametrize("F", [Checkpointed, *NESTED])
@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_checkpoints_and_sequences_inside_f(F, keep_attention):
    x1, x2 = stream().requires_grad_(), stream(seed=2).requires_grad_()
    assert_equals_cached(blocks(2, F=F), x1, x2, modes=REBUILT, keep_attention=keep_attention)


def test_attention_of_f_is_kept_beside_a_sequence_inside_f():
    sequence = ReversibleSequence(blocks(2, F=partial(Nested, "reversible", True)), keep_attention=True)
    with Count() as count:
        step(sequence, stream(), stream())
    # In each block three attentions, of which the two in the inner sequence have no tape of their own.
    assert count.runs["forward"] == 2 * (3 + 2)


@pytest.mark.parametrize("keep_attention", [True, False])
def test_a_result_of_attention_that_is_changed_in_place_is_noticed(keep_attention):
    x, body = stream().requires_grad_(), blocks(2, F=partial(Attention, attend=in_place))
    y, _ = ReversibleSequence(body, keep_attention=keep_attention)(x, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def in_place(q, k, v):
    return attention(q, k, v).add_(q)


SHAPES = {  # (B, heads, Nq, Nk, d, dv)
    "plain": (2, 3, 7, 11, 16, 16),
    "one token": (1, 1, 1, 1, 16, 16),
    "odd width": (2, 3, 7, 11, 5, 5),
    "wide": (1, 1, 3, 4, 200, 200),
    "other width of values": (2, 3, 7, 11, 16, 8),
    "no images": (0, 3, 7, 11, 16, 16),
    "no tokens": (2, 3, 0, 0, 16, 16),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_any_shape_gives_the_attention_and_says_once_if_nothing_is_kept(shape, dtype, scale, caplog):
    batch, heads, queries, keys, width, width_v = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, width), (keys, width), (keys, width_v))
    inputs = [torch.randn(batch, heads, *n, generator=generator).to(dtype).requires_grad_() for n in sizes]
    q, k, v = inputs
    logits = q.double() @ k.double().transpose(-2, -1) * (width**-0.5 if scale is None else scale)
    expected = logits.softmax(-1) @ v.double()
    dout = torch.randn(expected.shape, generator=generator)
    expected_grads = torch.autograd.grad(expected, inputs, dout.double())
    empty = not expected.numel()
    as_wide = v if width < width_v else k  # narrower values are widened
    fused = not empty and torch._fused_sdp_choice(q, k, as_wide) != SDPBackend.MATH.value
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    kept_attention._say_not_kept.cache_clear()
    for _ in range(2):
        with torch.no_grad():
            first, kept = AttentionTape().record(attention, q, k, v, scale)
        with Count() as count:
            y = AttentionTape(kept).replay(attention, q, k, v, scale)
            grads = torch.autograd.grad(y, inputs, dout.to(dtype))
        assert torch.equal(first, y) and y.dtype == dtype
        assert not (fused and count.runs["forward"])
        for found, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
            torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    assert [kept_one is None for kept_one in kept] == [not fused]
    said = [record.message for record in caplog.records if "cannot be kept" in record.message]
    assert len(said) == (not fused and not empty)


def test_a_kernel_that_keeps_nothing_is_named_once_for_all_sizes_of_images(caplog):
    kept_attention._say_not_kept.cache_clear()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for tokens in (3, 4, 5):
            AttentionTape().record(attention, *[torch.randn(1, 1, tokens, DIM)] * 3)
    (message,) = [record.message for record in caplog.records]
    assert "computed again in the backward pass" in message and "float32" in message


KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 20, 64, 96, 128])
def test_every_kernel_of_a_gpu_is_kept_and_has_the_gradients_of_ordinary_autograd(kernel, dtype, width):
    """Where the kernel takes such heads; where torch pads these for it, nothing is kept."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    grads, forwards = {}, {}
    cases = ("exact", "cached", False), ("cached", "cached", True), ("kept", "reversible", True)
    for name, activations, enabled in cases:
        torch.manual_seed(0)
        model = RevViT(8, embed_dim=2 * width, depth=3, num_heads=2, pretrain_img_size=64).cuda()
        model.activations = activations
        kernels = [kernel] if enabled else [SDPBackend.MATH]
        with sdpa_kernel(kernels), torch.autocast("cuda", dtype, enabled=enabled and dtype != torch.float32):
            probe = torch.empty(2, 2, 64, width, device="cuda", dtype=dtype, requires_grad=True)
            try:
                padded = type(attention(probe, probe, probe).grad_fn).__name__.startswith("Slice")
            except RuntimeError:
                assert enabled
                pytest.skip(f"{kernel.name} takes no heads {width} wide in {dtype}")
            with Count() as count:
                (y,) = model(x).values()
                loss = (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum()
                found = torch.autograd.grad(loss, list(model.parameters()))
        grads[name] = torch.cat([g.flatten() for g in found])
        forwards[name] = count.runs["forward"]
    assert forwards["cached"] == 3 and forwards["kept"] == (6 if padded else 3)
    # In float32 the rebuilt streams differ by rounding; below that, no more than by what the type loses.
    error, error_cached = (float((grads[name] - grads["exact"]).norm()) for name in ("kept", "cached"))
    scale = float(grads["exact"].norm())
    assert error <= 1.05 * error_cached + 1e-4 * scale


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_random_numbers_on_a_gpu_are_repeated(activations):
    body = blocks(3, dtype=torch.float32, F=partial(Attention, attend=dropped), G=partial(Mlp, dropout=0.4))
    sequence = ReversibleSequence(body, "cached").cuda()
    x = stream(dtype=torch.float32).cuda().requires_grad_()
    expected = step(sequence, x, x)
    following = torch.rand(3, device="cuda")
    sequence.activations, sequence.keep_attention = activations, True
    assert_same(step(sequence, x, x), expected, tolerance=1e-4)
    assert torch.equal(torch.rand(3, device="cuda"), following)
