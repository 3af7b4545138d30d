"""What a repeated call repeats of the first: random numbers, training flags, autocast, hooks; `recompute`."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small_blocks import (
    DIM,
    REBUILT,
    Mlp,
    assert_as_cached,
    assert_equals_cached,
    assert_same,
    blocks,
    step,
    stream,
)
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rev_det.modeling.layers import Linear
from rev_det.modeling.recomputation import recompute, recompute_each
from rev_det.modeling.repetition import CallRecord, Generators, Replay
from rev_det.modeling.reversible import ACTIVATIONS, ReversibleSequence


def repeated(record, number, x):
    """The result of a record's call, when it is repeated."""
    seen = []
    replay = Replay(record, iter(record.saved()))
    replay.gradients(0, number, [x], [True], lambda y: seen.append(y) or torch.ones_like(y))
    return seen[0]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_generator_of_any_accelerator_is_replayed_and_then_left_as_it_was(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    module = SimpleNamespace(
        get_rng_state=lambda device: generator.get_state(),
        set_rng_state=lambda state, device: generator.set_state(state),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = stream()
    noise = partial(torch.rand, x.shape, dtype=x.dtype, generator=generator)
    record = CallRecord([(lambda x: x + noise(), [])], Generators(torch.device(kind, 0)))
    results = [record.first(0, x), record.first(0, x)]
    assert not torch.equal(*results)
    torch.rand(1)
    before = generator.get_state(), torch.get_rng_state()
    for i in (1, 0, 1):
        assert torch.equal(repeated(record, i, x), results[i])
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_while_a_cuda_graph_is_captured_its_generator_is_left_alone(monkeypatch):
    """Reading or setting it is an error then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    record, x = CallRecord([(torch.sin, [])], Generators(torch.device("cuda", 0))), stream()
    assert torch.equal(record.first(0, x), repeated(record, 0, x))


class Normed(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, momentum=momentum)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.linear(self.norm(x))


@pytest.mark.parametrize("G", [partial(Mlp, dropout=0.4), Normed])
def test_modules_put_into_eval_mode_before_the_backward_pass(G):
    """Ordinary autograd has the gradients of the forward pass as it was; so has the rebuild."""
    x = stream().requires_grad_()

    def run(activations):
        sequence = ReversibleSequence(blocks(3, G=G), activations)
        torch.manual_seed(0)
        y1, y2 = sequence(x, x)
        last = sequence.blocks[0].G
        loss = (y1 * (last(y2) if activations == "cached" else recompute(last, y2))).sin().sum()
        sequence.eval()
        grads = torch.autograd.grad(loss, [x, *sequence.parameters()])
        assert not any(m.training for m in sequence.modules()), "the rebuild changed the modules' mode"
        return loss, grads

    assert_as_cached(run)


@pytest.mark.parametrize("activations", REBUILT)
def test_batch_norm_updates_its_statistics_twice_which_another_momentum_undoes(activations):
    x = stream(batch=4)
    momentum = {"cached": 0.1, activations: 1 - 0.9**0.5}
    bodies = {key: blocks(3, G=partial(Normed, value)) for key, value in momentum.items()}
    results = {key: step(ReversibleSequence(body, key), x, x) for key, body in bodies.items()}
    assert_same(results[activations], results["cached"])
    for expected, actual in zip(bodies["cached"], bodies[activations], strict=True):
        assert actual.G.norm.num_batches_tracked == 2 * expected.G.norm.num_batches_tracked
        torch.testing.assert_close(actual.G.norm.running_mean, expected.G.norm.running_mean)
        torch.testing.assert_close(actual.G.norm.running_var, expected.G.norm.running_var)


def test_the_rebuild_enters_the_autocast_state_of_the_forward_pass():
    """Backward outside autocast, as every training loop does, must rebuild in bfloat16; and the reverse."""
    seen = []
    body = blocks(2, dtype=torch.float32)
    for block in body:
        block.G.register_forward_hook(
            lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        )
    x = stream(dtype=torch.float32).requires_grad_()
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = ReversibleSequence(body)(x, x)[0].sum()
        with torch.autocast("cpu", dtype=torch.float16, enabled=not enabled):
            loss.backward()
    assert seen[:4] == [(True, torch.bfloat16)] * 4 and not any(enabled for enabled, _ in seen[4:])


@pytest.mark.parametrize("where", ["F", "F.out", "G", "G.out"])
def test_a_forward_hook_may_change_what_a_module_returns(where):
    body, x = blocks(2), stream().requires_grad_()
    without = ReversibleSequence(body)(x, x)[0]
    body[0].get_submodule(where).register_forward_hook(lambda module, inputs, y: y.sin())
    assert_equals_cached(body, x, x)
    assert not torch.equal(ReversibleSequence(body)(x, x)[0], without)


def on_cpu(function, x):
    with save_on_cpu():
        return function(x)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.parametrize("inside", [on_cpu, partial(checkpoint, use_reentrant=False)])
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_inside_hooks_on_saved_tensors(activations, keep_attention, inside):
    """They hand out copies of the tensors that were saved, and only once."""
    sequence = ReversibleSequence(blocks(2), activations, keep_attention)
    x = stream().requires_grad_()

    def loss_of(x):
        y1, y2 = sequence(x, x)
        return (y1 * recompute(sequence.blocks[0].G, y2)).sum()

    wanted = [x, *sequence.parameters()]
    expected = torch.autograd.grad(loss_of(x), wanted)
    assert_same(torch.autograd.grad(inside(loss_of, x), wanted), expected)


class Fails(nn.Module):
    """Fails in a call with or without gradients, whichever it is asked to."""

    def __init__(self, repeated):
        super().__init__()
        self.linear = Linear(DIM, DIM)
        self.repeated = repeated

    def forward(self, x):
        if torch.is_grad_enabled() == self.repeated:
            raise ArithmeticError("as it was asked to")
        return self.linear(x) + torch.rand(1)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_call_that_fails_leaves_the_modules_as_they_were(repeated):
    """Parameters, of which calls use copies, training flags and random numbers."""
    module = Fails(repeated)
    before = dict(module.named_parameters())
    with pytest.raises(ArithmeticError):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = recompute(module, stream(dtype=torch.float32)).sum()
        module.eval()
        state = torch.get_rng_state()
        loss.backward()
    assert all(p is before[name] for name, p in module.named_parameters())
    assert module.linear.training == (not repeated)
    assert not repeated or torch.equal(torch.get_rng_state(), state)
    assert torch.is_autocast_cache_enabled() and not torch.is_autocast_enabled("cpu")


class CastOnce(nn.Module):
    """A linear layer that reads its parameters in autocast's type, and a norm that shares its bias."""

    def __init__(self, shared=False):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.linear = Linear(DIM, DIM)
        if shared:
            self.linear.bias = self.norm.bias
        self.seen = []

    def forward(self, x):
        self.seen.append((self.linear.weight.dtype, self.norm.bias.dtype))
        return self.linear(self.norm(x))


@pytest.mark.parametrize("shared", [False, True])
def test_linear_layers_have_their_weights_cast_and_float32_gradients(shared):
    torch.manual_seed(0)
    module = CastOnce(shared)
    x = stream(dtype=torch.float32).requires_grad_()
    wanted = [x, *module.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = recompute(module, x), module(x)
        assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.float().sin().sum(), wanted)
    expected_grads = torch.autograd.grad(expected.float().sin().sum(), wanted)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert_same(grads, expected_grads, tolerance=1e-2)
    ordinary, copied = (torch.float32, torch.float32), (torch.bfloat16, torch.float32)
    assert module.seen == [copied, ordinary, copied]


@pytest.mark.parametrize("parts", [(1, 1), (1, 2), (1, 7), (0, 2)])
def test_recompute_equals_ordinary_autograd(parts):
    """Of two inputs with different last dimensions, and one that is no tensor."""
    (block,) = blocks(1)
    wide = nn.Bilinear(DIM, 3, DIM, dtype=torch.float64)

    def call(x, y, exponent):
        return wide(block.G(x), y) if exponent is None else block.G(x) ** exponent

    x, y = stream(tokens=7).requires_grad_(), stream(tokens=7, seed=2)[..., :3].contiguous().requires_grad_()
    wanted = [x, y, *block.G.parameters(), *wide.parameters()]
    for exponent in (None, 2):
        results = []
        in_parts = recompute(call, x, y, exponent, parts=parts, modules=[block.G, wide])
        for result in (in_parts, call(x, y, exponent)):
            loss = result.sin().sum()
            results.append((loss, torch.autograd.grad(loss, wanted, allow_unused=True)))
        assert_same(*results)


@pytest.mark.parametrize("first", range(4))
def test_recompute_each_equals_ordinary_autograd(first):
    """Also where a branch hands its gradient on unchanged, expands it, or has none."""
    trunk, linear = Mlp().double(), nn.Linear(DIM, 3, dtype=torch.float64)
    branches = [
        (lambda x: x.sum(-1), []),
        (lambda x: x, []),
        (linear, [linear]),
        (lambda x: linear.weight.sum() + torch.zeros_like(x), [linear]),
    ]
    branches = branches[first:] + branches[:first]
    x = stream().requires_grad_()
    wanted = [x, *trunk.parameters(), *linear.parameters()]
    results = []
    for y in (recompute_each((trunk, [trunk]), branches, x), [b(trunk(x)) for b, _ in branches]):
        given = [torch.ones_like(z) for z in y]
        results.append(torch.autograd.grad(y, wanted, given))
        assert all(bool((dz == 1).all()) for dz in given), "the caller's gradient was changed"
    assert_same(*results)


def test_threads_that_share_a_module_leave_it_its_parameters_and_all_gradients():
    body = blocks(3)
    for layer in (layer for block in body for layer in (block.F.qkv, block.G.hidden)):
        layer.register_forward_hook(lambda *_: time.sleep(0.001))  # lets other threads in
    sequence, x = ReversibleSequence(body), stream()
    parameters = list(sequence.parameters())

    def train(_):
        for _ in range(4):
            y1, y2 = sequence(x, x)
            (y1 * y2).sum().backward()

    train(None)
    alone = [p.grad.clone() for p in parameters]
    sequence.zero_grad()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(4)))
    assert [id(p) for p in sequence.parameters()] == [id(p) for p in parameters]
    for p, grad in zip(parameters, alone, strict=True):
        torch.testing.assert_close(p.grad, 4 * grad, rtol=1e-10, atol=1e-10)


def test_parametrizations_that_the_caller_caches_get_their_gradients():
    """A weight that was computed in a first call, without gradients, must not be found in the second."""
    body, x = blocks(2), stream()
    for block in body:
        parametrizations.weight_norm(block.G.out)
    expected = step(ReversibleSequence(body, "cached"), x, x)
    with parametrize.cached():
        assert_same(step(ReversibleSequence(body), x, x), expected)


@pytest.mark.parametrize("pack", [lambda x: [x], lambda x: (1, x), lambda x: {"context": [x]}])
def test_tensors_inside_other_arguments_are_refused_where_they_want_a_gradient(pack):
    body, x = blocks(1), stream()
    body[0].F = SumOfLeaves()
    ReversibleSequence(body)(x.requires_grad_(), x, pack(x.detach()))
    with pytest.raises(ValueError, match="would get no gradient .* an argument of its own"):
        ReversibleSequence(body)(x, x, pack(x))


class SumOfLeaves(nn.Module):
    def forward(self, x, packed):
        return x + sum(tree_leaves(packed))


def test_masks_that_want_a_gradient_and_parts_that_are_none_are_refused():
    body, x = blocks(1, G=partial(Mlp, parts=0)), stream().requires_grad_()
    mask = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="masks get no gradient .* use activations='cached'"):
        ReversibleSequence(body)(x, x, masks=[(mask, None)])
    with pytest.raises(ValueError, match="Mlp must return .* at least 1"):
        ReversibleSequence(body)(x, x)
