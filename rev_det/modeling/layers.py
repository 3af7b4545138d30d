"""Layers of Rev-ViT and Rev-MViT: the two branches F and G of a block, the MLP, and drop-path masks."""

from __future__ import annotations

from torch import Tensor, nn

from .kept_attention import to_autocast_dtype
from .repetition import WHOLE, Parts

LAYER_NORM_EPS = 1e-6
# The widest tensors of a part of a branch have at most this many values (128 MiB in bfloat16): large enough
# for few launches, small enough not to be the peak. The number of parts is a function of shapes alone: every
# process, a resumed run and the count of memory take the same parts.
PART_VALUES = 2**26


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS)


class Linear(nn.Linear):
    """torch's, with parameters that only its own product reads: under autocast in no other type."""

    casts_parameters = True  # see `repetition.CallRecord`


class Mlp(nn.Module):
    """Linear, GELU (erf), linear; dropout after each linear layer if asked for. (B, N, C) -> (B, N, C).

    Args:
        dim: C.
        hidden_dim: width between the linear layers.
        dropout: probability of dropping a value after each.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.dropout.p:
            return self.fc2(self.act(self.fc1(x)))
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))

    def parts(self, x: Tensor) -> Parts:
        """Parts of the tokens x, (B, N, C), in which to compute this MLP."""
        if self.dropout.p and self.training:
            return WHOLE  # so that the random numbers are drawn as in ordinary training
        return parts_along(1, x, x.shape[0] * x.shape[1] * self.fc1.out_features)


class MlpBranch(nn.Module):
    """G of a reversible block: pre-norm MLP. (B, N, C) -> (B, N, C).

    ``inner_residual`` gives it a skip connection, which the paper's models do not have: its naive variant.
    """

    def __init__(self, dim: int, mlp_ratio: float, inner_residual: bool = False):
        super().__init__()
        self.norm = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.inner_residual = inner_residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(to_autocast_dtype(self.norm(x)))
        return x + y if self.inner_residual else y

    def parts(self, x: Tensor) -> Parts:
        """Parts of the tokens x, (B, N, C), in which to compute this branch."""
        return self.mlp.parts(x)


class AttentionBranch(nn.Module):
    """F of a reversible block: pre-norm attention. (B, N, C) -> (B, N, C).

    ``inner_residual`` gives it a skip connection, which the paper's models do not have: its naive variant.
    """

    def __init__(self, dim: int, attn: nn.Module, inner_residual: bool = False):
        super().__init__()
        self.norm = layer_norm(dim)
        self.attn = attn
        self.inner_residual = inner_residual

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        y = self.attn(to_autocast_dtype(self.norm(x)), hw)
        return x + y if self.inner_residual else y

    def parts(self, x: Tensor) -> Parts:
        """Parts of the batch x, (B, N, C), in which to compute this branch."""
        return parts_along(0, x, 2 * x.numel())


class ReversibleBlock(nn.Module):
    """The F and G of one block; `ReversibleSequence` says how they are applied."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, inner_residual: bool = False):
        super().__init__()
        self.F = AttentionBranch(dim, attn, inner_residual)
        self.G = MlpBranch(dim, mlp_ratio, inner_residual)


def parts_along(dim: int, x: Tensor, values: int) -> Parts:
    """Parts of x along a dimension such that each has at most `PART_VALUES` of so many values."""
    return dim, max(1, min(x.shape[dim], -(-values // PART_VALUES)))


def drop_path_masks(rate: float, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Multipliers (mF, mG) of shape (B,) that drop F and G of each sample of x with probability ``rate``."""
    if rate == 0.0:
        return None, None
    keep = 1.0 - rate
    return x.new_empty(2, x.shape[0]).bernoulli_(keep).div_(keep).unbind()
