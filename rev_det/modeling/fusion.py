"""Where the two streams become one: in stage transitions and at the outputs (the paper's Table 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .kept_attention import to_autocast_dtype
from .layers import LAYER_NORM_EPS, Mlp, layer_norm, parts_along
from .repetition import Parts

# How a stage transition fuses the streams; [X1, X2] is their concatenation z, of 2C channels:
# "max": max(X1, X2), of C channels; the transition's projections then widen to 2C
# "concat": z
# "2x-mlp", "4x-mlp": z + MLP(z) with a hidden width of 2 or 4 times 2C
# "norm-2x-mlp": z + MLP(LayerNorm(z))
# "2x-mlp-dropout": z + MLP(z) with dropout in the MLP
FUSIONS = ("2x-mlp", "4x-mlp", "norm-2x-mlp", "2x-mlp-dropout", "concat", "max")

# How an output is made of the streams, always of 2C channels:
# "concat-norm": LayerNorm(z), whose statistics mix the streams; what the published models do
# "norm-concat": [LayerNorm(X1), LayerNorm(X2)]
# "norm-1-layer": a linear layer after LayerNorm(z)
# "norm-2x-mlp": y + MLP(y) with y = LayerNorm(z)
# "norm-2x-mlp-dropout": the same with dropout in the MLP
# "norm-2x-mlp-norm": the same with a final LayerNorm
TERMINATIONS = (
    "concat-norm",
    "norm-concat",
    "norm-1-layer",
    "norm-2x-mlp",
    "norm-2x-mlp-dropout",
    "norm-2x-mlp-norm",
)
FUSION_DROPOUT = 0.2


class ConcatFusion(nn.Module):
    """[X1, X2]. 2 x (B, N, C) -> (B, N, 2C)."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat([x1, x2], dim=-1)


class MaxFusion(nn.Module):
    """max(X1, X2). 2 x (B, N, C) -> (B, N, C)."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.maximum(x1, x2)


class MlpFusion(Mlp):
    """z + MLP(z) with z = [X1, X2], or z + MLP(LayerNorm(z)). 2 x (B, N, C) -> (B, N, 2C)."""

    def __init__(self, dim: int, ratio: int = 2, normalise: bool = False, dropout: float = 0.0):
        super().__init__(2 * dim, ratio * 2 * dim, dropout)
        self.norm = layer_norm(2 * dim) if normalise else nn.Identity()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z = torch.cat([x1, x2], dim=-1)
        return z + super().forward(to_autocast_dtype(self.norm(z)))


def build_fusion(fusion: str, dim: int) -> nn.Module:
    """The two streams as one, in a stage transition: a module of (x1, x2), each (B, N, dim).

    Raises:
        ValueError: ``fusion`` is none of `FUSIONS`.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}; got {fusion!r}")
    if fusion == "max":
        return MaxFusion()
    if fusion == "concat":
        return ConcatFusion()
    return MlpFusion(
        dim,
        ratio=4 if fusion == "4x-mlp" else 2,
        normalise=fusion.startswith("norm"),
        dropout=FUSION_DROPOUT if fusion.endswith("dropout") else 0.0,
    )


class ScaleNorm(nn.LayerNorm):
    """An output of the backbone from both streams. 2 x (B, N, C) -> (B, N, 2C) in autocast's dtype.

    Args:
        dim: width C of each stream.
        termination: one of `TERMINATIONS`.

    Raises:
        ValueError: an unknown ``termination``.
    """

    def __init__(self, dim: int, termination: str = "concat-norm"):
        if termination not in TERMINATIONS:
            raise ValueError(f"termination must be one of {', '.join(TERMINATIONS)}; got {termination!r}")
        super().__init__(2 * dim, eps=LAYER_NORM_EPS)
        self.termination = termination
        if termination == "norm-1-layer":
            self.linear = nn.Linear(2 * dim, 2 * dim)
        elif "mlp" in termination:
            dropout = FUSION_DROPOUT if termination.endswith("dropout") else 0.0
            self.mlp = Mlp(2 * dim, 4 * dim, dropout)
        if termination.endswith("mlp-norm"):
            self.final_norm = layer_norm(2 * dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        if self.termination == "norm-concat":
            halves = zip((x1, x2), self.weight.chunk(2), self.bias.chunk(2), strict=True)
            y = torch.cat([functional.layer_norm(x, x.shape[-1:], w, b, self.eps) for x, w, b in halves], -1)
        else:
            y = super().forward(torch.cat([x1, x2], dim=-1))
        if self.termination == "norm-1-layer":
            y = self.linear(to_autocast_dtype(y))
        elif "mlp" in self.termination:
            y = y + self.mlp(to_autocast_dtype(y))
        if self.termination.endswith("mlp-norm"):
            y = self.final_norm(y)
        return to_autocast_dtype(y)

    def parts(self, x: Tensor) -> Parts:
        """Parts of the tokens in which to compute this output of two streams like x, (B, N, C)."""
        if "mlp" in self.termination:
            return self.mlp.parts(x)
        return parts_along(1, x, 2 * x.numel())
