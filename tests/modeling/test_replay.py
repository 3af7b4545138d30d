"""What the rebuild repeats of the forward pass: random numbers, training flags, what hooks do."""

from types import SimpleNamespace

import pytest
import torch
from rev_det.modeling.recompute import CallRecord, OutputLinear, recompute
from test_reversible import DIM, assert_same, blocks, step, stream
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rev_det.modeling.reversible import ACTIVATIONS, ReversibleSequence


class Noisy(nn.Module):
    """Adds numbers of a generator to its input."""

    def __init__(self, generator=None):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return x + torch.rand(x.shape, dtype=x.dtype, generator=self.generator)


class DroppedAttention(nn.Module):
    """Attention with dropout between two attentions without, whose results may be kept."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.out = OutputLinear(DIM, DIM)

    def forward(self, x):
        q = self.linear(x)[:, None]
        for scale, dropout in ((1, 0.0), (2, 0.3), (3, 0.0)):
            q = functional.scaled_dot_product_attention(q, scale * q, q, dropout_p=dropout)
        return self.out(q[:, 0])


class Normed(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, momentum=momentum)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.linear(self.norm(x))


def normed_blocks(count, momentum=0.1):
    body = blocks(count)
    for block in body:
        block.G = Normed(momentum).double()
    return body


class Generator:
    """Stands for the module of an accelerator (torch.xpu, …) with one device."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def get_rng_state(self, device):
        return self.generator.get_state()

    def set_rng_state(self, state, device):
        self.generator.set_state(state)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_generator_of_any_accelerator_is_replayed_and_then_left_as_it_was(kind, monkeypatch):
    accelerator = Generator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerator)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    record = CallRecord(torch.device(kind, 0))
    module, x = Noisy(accelerator.generator), stream()
    first = record.first(module, x)
    assert not torch.equal(module(x), first)
    torch.rand(1)
    before = accelerator.generator.get_state(), torch.get_rng_state()
    assert torch.equal(record.again(module, x), first)
    assert torch.equal(accelerator.generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_while_a_cuda_graph_is_captured_its_generator_is_left_alone(monkeypatch):
    """Reading or setting it is an error then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    record = CallRecord(torch.device("cuda", 0))
    module, x = nn.Linear(DIM, DIM).double(), stream()
    assert torch.equal(record.first(module, x), record.again(module, x))


@pytest.mark.parametrize("activations", ["reversible", "checkpoint"])
@pytest.mark.parametrize("keep_attention", [True, False])
def test_dropout_of_attention_is_repeated_beside_kept_attention(activations, keep_attention):
    body = blocks(3, dropout=0.2)
    for block in body:
        block.F = DroppedAttention().double()
    x = stream().requires_grad_()
    expected = step(ReversibleSequence(body, "cached"), x, x)
    assert_same(step(ReversibleSequence(body, activations, keep_attention), x, x), expected)
    with pytest.raises(AssertionError):  # the dropout does something
        assert_same(step(ReversibleSequence(body, "cached"), x, x, seed=4), expected)


@pytest.mark.parametrize(
    "make", [lambda: blocks(3, dropout=0.4), lambda: normed_blocks(3)], ids=["dropout", "batch norm"]
)
def test_modules_put_into_eval_mode_before_the_backward_pass(make):
    """Ordinary autograd has the gradients of the forward pass as it was; so has the rebuild."""
    x = stream().requires_grad_()
    grads = {}
    for activations in ("cached", "reversible"):
        sequence = ReversibleSequence(make(), activations)
        torch.manual_seed(0)
        y1, y2 = sequence(x, x)
        last = sequence.blocks[0].G
        loss = (y1 * (last(y2) if activations == "cached" else recompute(last, y2))).sin().sum()
        sequence.eval()
        grads[activations] = loss, torch.autograd.grad(loss, [x, *sequence.parameters()])
        assert not any(m.training for m in sequence.modules()), "the rebuild changed the modules' mode"
    assert_same(grads["reversible"], grads["cached"])


@pytest.mark.parametrize("activations", ["reversible", "checkpoint"])
def test_batch_norm_updates_its_statistics_twice_which_another_momentum_undoes(activations):
    x = stream(batch=4)
    momentum = {"cached": 0.1, activations: 1 - 0.9**0.5}
    bodies = {key: normed_blocks(3, value) for key, value in momentum.items()}
    results = {key: step(ReversibleSequence(body, key), x, x) for key, body in bodies.items()}
    assert_same(results[activations], results["cached"])
    for expected, actual in zip(bodies["cached"], bodies[activations], strict=True):
        assert actual.G.norm.num_batches_tracked == 2 * expected.G.norm.num_batches_tracked
        torch.testing.assert_close(actual.G.norm.running_mean, expected.G.norm.running_mean)
        torch.testing.assert_close(actual.G.norm.running_var, expected.G.norm.running_var)


@pytest.mark.parametrize("where", ["F", "F.out", "G", "G.out"])
def test_a_forward_hook_may_do_anything_with_the_last_product(where):
    """The first block's is skipped otherwise, for its value is not needed."""
    body = blocks(2)
    body[0].get_submodule(where).register_forward_hook(lambda module, inputs, y: y.sin())
    x = stream().requires_grad_()
    assert_same(step(ReversibleSequence(body), x, x), step(ReversibleSequence(body, "cached"), x, x))
    expected = torch.autograd.grad(body[0].G(x).cos().sum(), x)
    actual = torch.autograd.grad(recompute(body[0].G, x).cos().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("inside", ["save_on_cpu", "checkpoint"])
def test_inside_hooks_on_saved_tensors(activations, inside):
    """They hand out copies of the tensors that were saved, and only once."""
    sequence = ReversibleSequence(blocks(2), activations)
    x = stream().requires_grad_()

    def loss_of(x):
        y1, y2 = sequence(x, x)
        return (y1 * recompute(sequence.blocks[0].G, y2)).sum()

    wanted = [x, *sequence.parameters()]
    expected = torch.autograd.grad(loss_of(x), wanted)
    if inside == "checkpoint":
        loss = checkpoint(loss_of, x, use_reentrant=False)
    else:
        with save_on_cpu():
            loss = loss_of(x)
    for a, b in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
