"""Small reversible blocks, and one step of a sequence of them: what the tests of the core share."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from rev_det.modeling.kept_attention import attention
from rev_det.modeling.reversible import ReversibleSequence

DIM = 8
REBUILT = ("reversible", "checkpoint")


class Attention(nn.Module):
    """Self-attention of one head, with an additive context if it is given one."""

    def __init__(self, parts=1, attend=attention):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.number, self.attend = parts, attend

    def forward(self, x, context=None):
        y = self.norm(x) if context is None else self.norm(x) + context
        q, k, v = self.qkv(y)[:, None].chunk(3, dim=-1)
        return self.out(self.attend(q, k, v)[:, 0])

    def parts(self, x):
        return 0, self.number  # samples


class Mlp(nn.Module):
    def __init__(self, dropout=0.0, parts=1):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.hidden = nn.Linear(DIM, 2 * DIM)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(2 * DIM, DIM)
        self.number = parts

    def forward(self, x):
        return self.out(self.dropout(functional.gelu(self.hidden(self.norm(x)))))

    def parts(self, x):
        return 1, self.number  # tokens


class Block(nn.Module):
    def __init__(self, F, G):
        super().__init__()
        self.F, self.G = F, G


def blocks(count, dtype=torch.float64, F=Attention, G=Mlp):
    """Blocks of an F and a G, each made by a function without arguments; the same weights every time."""
    torch.manual_seed(0)
    return [Block(F(), G()).to(dtype) for _ in range(count)]


def stream(batch=2, tokens=5, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, DIM, generator=generator, dtype=dtype)


def step(sequence, x1, x2, *args, masks=None, seed=3):
    """Loss and gradients of everything that requires one, inputs first."""
    torch.manual_seed(seed)
    y1, y2 = sequence(x1, x2, *args, masks=masks)
    weights = torch.linspace(0, 1, y1.numel(), dtype=y1.dtype, device=y1.device).view_as(y1)
    loss = (y1 * weights).sum() + (y1 * y2).sin().sum()
    inputs = dict.fromkeys(t for t in (x1, x2, *args) if isinstance(t, torch.Tensor) and t.requires_grad)
    wanted = [*inputs, *(p for p in sequence.parameters() if p.requires_grad)]
    return loss, torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_same(actual, expected, tolerance=1e-10):
    """Losses and gradients are the same up to rounding, measured against the largest; some may be None."""
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    scale = max((float(x.detach().abs().max()) for x in expected if x is not None), default=0.0)
    for x, y in zip(actual, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


def assert_as_cached(run, *modes):
    """What a function of the activation mode returns, loss and gradients, is that of ordinary autograd."""
    expected = run("cached")
    for mode in modes or ("reversible",):
        assert_same(run(mode), expected)


def assert_equals_cached(body, *inputs, modes=("reversible",), keep_attention=False, **options):
    """A sequence of these blocks has the loss and the gradients of ordinary autograd."""
    assert_as_cached(
        lambda mode: step(ReversibleSequence(body, mode, keep_attention), *inputs, **options), *modes
    )
