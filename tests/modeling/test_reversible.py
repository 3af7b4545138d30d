"""The reversible sequence on its own, against ordinary autograd."""

import gc
from functools import partial

import pytest
import torch
from small_blocks import (
    DIM,
    REBUILT,
    Attention,
    Mlp,
    assert_as_cached,
    assert_equals_cached,
    assert_same,
    blocks,
    stream,
)
from torch import nn

from rev_det.modeling.recomputation import recompute
from rev_det.modeling.reversible import ACTIVATIONS, ReversibleSequence


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("same_start", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_gradients_equal_ordinary_autograd(keep_attention, count, same_start, parts):
    low, high, third = (torch.tensor(m, dtype=torch.float64) for m in ([0.0, 2.0], [2.0, 0.0], [3.0, 1.0]))
    masks = ([(low, high), (None, third)] * count)[:count]
    x1 = stream().requires_grad_()
    x2 = x1 if same_start else stream(seed=2).requires_grad_()
    body = blocks(count, F=partial(Attention, parts=parts), G=partial(Mlp, parts=parts))
    assert_equals_cached(body, x1, x2, masks=masks, modes=REBUILT, keep_attention=keep_attention)


def test_gradcheck():
    sequence = ReversibleSequence(blocks(2), keep_attention=True)
    x1, x2 = (stream(1, 3, seed=seed).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda a, b: sequence(a, b), (x1, x2))
    weight = sequence.blocks[1].F.qkv.weight
    assert torch.autograd.gradcheck(lambda w: sequence(x1.detach(), x2.detach()), (weight,))


class AnyArguments(Attention):
    """Takes (context, scale, name), any of which may be None.

    The context's gradient, if there is no scale, is the gradient of the result: the very tensor.
    """

    def forward(self, x, context, scale, name):
        assert name is None or isinstance(name, str)
        y = super().forward(x)
        y = y if context is None else y + context
        return y if scale is None else y * scale.view(-1, 1, 1)


@pytest.mark.parametrize("context", [stream(seed=4), None])
@pytest.mark.parametrize("scale", [torch.tensor([3, 1]), torch.tensor([True, False]), None])
@pytest.mark.parametrize("name", ["a", None])
@pytest.mark.parametrize("parts", [1, 2])
def test_arguments_of_f_may_be_tensors_that_want_a_gradient_or_others_or_none(context, scale, name, parts):
    x1, x2, body = stream(), stream(seed=2), blocks(3, F=partial(AnyArguments, parts=parts))
    context = context if context is None else context.clone().requires_grad_()
    assert_equals_cached(body, x1.clone().requires_grad_(), x2, context, scale, name)
    if context is not None:  # where nothing else needs a gradient, too
        frozen = [block.requires_grad_(False) for block in body]
        assert_equals_cached(frozen, x1, x2, context, scale, name)


@pytest.mark.parametrize("same_start", [True, False])
def test_views_of_one_tensor_as_streams(same_start):
    """Expanded, transposed, and the second one overlapping the first."""
    base = torch.randn(DIM, 5, 1, dtype=torch.float64, requires_grad=True)
    x1 = base.permute(2, 1, 0).expand(3, -1, -1)
    x2 = x1 if same_start else x1.flip(1).view_as(x1)
    assert_equals_cached(blocks(3, G=partial(Mlp, parts=2)), x1, x2)


@pytest.mark.parametrize("shape", [(0, 5, DIM), (2, 0, DIM)])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("keep_attention", [True, False])
def test_empty_streams_have_empty_or_zero_gradients(shape, activations, keep_attention):
    body = blocks(2, F=partial(Attention, parts=2), G=partial(Mlp, parts=3))
    sequence = ReversibleSequence(body, activations, keep_attention)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y1, y2 = sequence(x, x)
    assert y1.shape == y2.shape == shape
    (y1 * recompute(sequence.blocks[0].G, y2, parts=(1, 2))).sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in sequence.parameters())


FROZEN = {"forward": [(0,), (0, 1), (1,), (2,)], "backward": [(0,), (1, 2), (0, 1, 2)]}


@pytest.mark.parametrize("before, frozen", [(key, blocks) for key in FROZEN for blocks in FROZEN[key]])
def test_blocks_frozen_before_the_forward_or_the_backward_pass(before, frozen):
    """The streams are without a gradient, too."""

    def run(activations):
        body = blocks(3)
        chosen = nn.ModuleList(body[i] for i in frozen)
        chosen.requires_grad_(before == "backward")
        y1, y2 = ReversibleSequence(body, activations)(stream(), stream())
        chosen.requires_grad_(False)
        loss = (y1 * y2).sum()
        loss.backward()
        return loss, [p.grad for block in body for p in block.parameters()]

    assert_as_cached(run)


def test_parameters_unfrozen_before_the_backward_pass_get_no_gradient():
    sequence = ReversibleSequence(blocks(2)).requires_grad_(False)
    x = stream().requires_grad_()
    y = sequence(x, x)[0]
    sequence.requires_grad_(True)
    y.sum().backward()
    assert x.grad is not None and all(p.grad is None for p in sequence.parameters())


def test_shared_parameters_sum_their_gradients():
    body = blocks(3)
    body[2].G.hidden.weight = body[0].G.hidden.weight  # by two blocks
    body[1].F.norm.bias = body[1].G.norm.bias  # by F and G
    body[1].F.out.bias = body[1].F.norm.weight  # inside F
    x = stream().requires_grad_()
    assert_equals_cached([*body, body[0]], x, x)  # a whole block


class Table(nn.Module):
    """A linear layer and additive tables, whose gradient torch hands out as the very tensor it was given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.first, self.second = (nn.Parameter(torch.randn(1, 5, DIM)) for _ in range(2))

    def forward(self, x):
        return self.linear(x) + self.first + self.second


class OnlyTable(Table):
    def forward(self, x):
        return (self.first + self.second).expand_as(x)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("F", [Table, OnlyTable])
@pytest.mark.parametrize("G", [Table, OnlyTable])
@pytest.mark.parametrize("same_gradients", [True, False])
def test_gradients_that_torch_hands_on_unchanged_are_not_written_to(batch, F, G, same_gradients):
    """The streams' own gradients, those of additive parameters, and those of a branch that ignores x."""
    x1, x2 = (stream(batch, seed=seed).requires_grad_() for seed in (1, 2))
    body = [*blocks(2), *blocks(1, F=F, G=G)]
    wanted = [x1, x2, *(p for block in body for p in block.parameters())]
    results = []
    for activations in ("reversible", "cached"):
        y = ReversibleSequence(body, activations)(x1, x2)
        dy = stream(batch, seed=3)
        given = [dy, dy if same_gradients else torch.ones(DIM, dtype=dy.dtype).expand_as(dy)]
        results.append(torch.autograd.grad(y, wanted, given, allow_unused=True))
        assert torch.equal(dy, stream(batch, seed=3)), "the caller's gradient was changed"
    assert_same(*results)


def test_dropout_is_replayed_and_the_global_generator_advances_as_in_ordinary_autograd():
    """With two forward passes before the backward pass."""
    x = stream().requires_grad_()
    body = blocks(3, G=partial(Mlp, dropout=0.4))

    def run(activations):
        sequence = ReversibleSequence(body, activations)
        torch.manual_seed(0)
        loss = sequence(x, x)[0].sin().sum() + sequence(x.cos(), x.cos())[1].sum()
        grads = torch.autograd.grad(loss, [x, *sequence.parameters()])
        return loss, [*grads, torch.rand(3)]

    assert_as_cached(run, *REBUILT)


@pytest.mark.parametrize("keep_attention", [True, False])
def test_backward_twice_needs_retain_graph_and_gives_the_same_gradients(keep_attention):
    """Inputs and outputs are left as they were."""
    sequence = ReversibleSequence(blocks(3), keep_attention=keep_attention)
    x = stream().requires_grad_()
    y1, y2 = sequence(x, x)
    loss = y1.sin().sum() + y2.sum()
    wanted, copies = [x, *sequence.parameters()], [t.detach().clone() for t in (x, y1, y2)]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    again = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, again, first))
    assert all(map(torch.equal, (x, y1, y2), copies))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize(
    "names",
    [["blocks.2.F.out.weight"], ["blocks.1.G.norm.bias"], ["blocks.0.F.qkv.bias", "blocks.2.G.out.bias"]],
)
def test_gradients_of_some_parameters_alone(names):
    results = []
    for activations in ("cached", *REBUILT):
        sequence = ReversibleSequence(blocks(3), activations)
        loss = sequence(stream(), stream())[1].sin().sum()
        wanted = [sequence.get_parameter(name) for name in names]
        results += [torch.autograd.grad(loss, wanted, retain_graph=retain) for retain in (True, False)]
        assert all(p.grad is None for p in sequence.parameters())
    for result in results[1:]:
        assert_same(result, results[0])


def test_double_backward_raises():
    sequence = ReversibleSequence(blocks(2))
    x = stream().requires_grad_()
    (grad,) = torch.autograd.grad(sequence(x, x)[0].sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "changed", ["blocks.0.F.qkv.weight", "blocks.1.G.out.weight", "blocks.2.F.out.weight", "y", "context"]
)
def test_what_is_changed_between_forward_and_backward_is_noticed(changed):
    """Parameters, of the frozen block 1 too, the sequence's results and arguments."""
    sequence = ReversibleSequence(blocks(3))
    sequence.blocks[1].requires_grad_(False)
    x, context = stream().requires_grad_(), torch.ones((), dtype=torch.float64)
    y1, y2 = sequence(x, x, context)
    loss = (y1 + y2).square().sum()
    tensors = {"y": y2, "context": context, **dict(sequence.named_parameters())}
    with torch.no_grad():
        tensors[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_loop(context):
    body = blocks(3)
    with context():
        expected = ReversibleSequence(body, "cached")(stream(), stream())
        actual = ReversibleSequence(body, "reversible", True)(stream(), stream())
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
def test_transforms_of_torch_func_are_refused_with_the_way_out(transform):
    sequence = ReversibleSequence(blocks(2, F=Mlp))
    with pytest.raises(RuntimeError, match="activations='cached'"):
        transform(lambda x: sequence(x, x)[0].sum())(stream())
    sequence.activations = "cached"
    if transform is torch.func.grad:
        assert torch.func.grad(lambda x: sequence(x, x)[0].sum())(stream()).shape == stream().shape
    with torch.no_grad():
        sequence.activations = "reversible"
        torch.func.vmap(lambda x: sequence(x, x))(stream()[:, None])


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_half_precision_streams_become_float32_under_autocast(activations):
    x1, x2 = (stream(dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y1, y2 = ReversibleSequence(blocks(2, dtype=torch.float32), activations)(x1, x2)
    assert y1.dtype == y2.dtype == torch.float32
    (y1 * y2).sum().backward()
    assert x1.grad.dtype == x2.grad.dtype == torch.bfloat16


def held(activations, count):
    """Bytes that are alive between forward and backward because of a sequence, without its parameters."""
    sequence, x = ReversibleSequence(blocks(count), activations), stream(tokens=64).requires_grad_()
    kept = {}  # of each storage its bytes

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    gc.freeze()  # what there is already is not listed below
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = sequence(x, x)
        for t in gc.get_objects():  # and what Python objects of the graph hold
            if issubclass(type(t), torch.Tensor):
                pack(t)
    finally:
        gc.unfreeze()
    parameters = {p.untyped_storage().data_ptr() for p in sequence.parameters()}
    assert y[0].requires_grad
    return sum(n for key, n in kept.items() if key not in parameters)


def test_activation_memory_is_flat_in_depth():
    assert held("reversible", 12) == held("reversible", 2) > 0
    assert held("cached", 12) > 5 * held("cached", 2)


@pytest.mark.parametrize(
    "body, options, message",
    [
        (blocks(1), ["revers"], "activations must be one of reversible, cached, checkpoint; got 'revers'"),
        ([], [], "at least one block"),
        ([*blocks(1), nn.Linear(2, 2)], [], "block 1 .* Linear, must have submodules F and G"),
    ],
)
def test_sequences_that_cannot_be_are_named(body, options, message):
    with pytest.raises(ValueError, match=message):
        ReversibleSequence(body, *options)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_inputs_that_cannot_be_are_named(activations):
    x = stream()
    sequence = ReversibleSequence(blocks(2, G=lambda: nn.Linear(DIM, DIM + 1)), activations)
    for x2, masks, message in (
        (x[:1], None, "must have one shape"),
        (x, [(None, None)], "one .* for each of 2 blocks, got 1"),
        (x, [(torch.ones(3), None)] * 2, r"mask must have shape \(2,\), got \(3,\)"),
        (x, None, "must keep the shape"),  # what G returns
    ):
        with pytest.raises(ValueError, match=message):
            sequence(x, x2, masks=masks)
