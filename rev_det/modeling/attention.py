"""Multi-head attention of Rev-ViT and multi-head pooling attention of Rev-MViT, on fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .kept_attention import attention, autocast_dtype, to_autocast_dtype
from .layers import Linear, layer_norm


class MultiHeadAttention(nn.Module):
    """Global self-attention. (B, N, C) -> (B, N, C); head h owns channels h*d .. h*d+d-1.

    Args:
        dim: C.
        num_heads: must divide ``dim``.
        qkv_bias: give the query, key and value projections a bias.
        in_dim: width of the input, if it is not C: the projections then widen it.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, in_dim: int | None = None):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the width: {dim} is not a multiple of {num_heads}")
        self.num_heads = num_heads
        self.q, self.k, self.v = (Linear(in_dim or dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        layers = self.q, self.k, self.v
        dtype = autocast_dtype(x)
        if dtype is not None and all(type(m) is Linear and not _has_hooks(m) for m in layers):
            # As one product of weights that are cast anyway: x is read once, its gradient is written once.
            weight = torch.cat([m.weight.to(dtype) for m in layers])
            bias = None if self.q.bias is None else torch.cat([m.bias.to(dtype) for m in layers])
            qkv = functional.linear(x, weight, bias).chunk(3, -1)
        else:  # somebody's own layers, or hooks that want to see them
            qkv = (layer(x) for layer in layers)
        return self.proj(self.attend(*(y.unflatten(-1, (self.num_heads, -1)) for y in qkv)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v. (B, N, heads, d) each -> (B, Nq, heads * d)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v).transpose(1, 2).flatten(2)


def _has_hooks(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


class MultiHeadPoolingAttention(MultiHeadAttention):
    """Self-attention whose keys and values, and in stage transitions queries, are pooled on their H x W grid.

    Each of q, k and v has its own depthwise convolution and LayerNorm over one head's channels, shared by all
    heads, applied after the projection (MViT, section 3.1; keys and values are pooled at stride 1 too).

    Args:
        dim: C.
        num_heads: must divide ``dim``.
        qkv_bias: give the query, key and value projections a bias.
        pool_kernel: odd sizes (kh, kw) of the pooling convolutions.
        stride_kv: stride of the key and value pooling.
        stride_q: stride of the query pooling; None leaves queries as they are.
        in_dim: width of the input, if it is not C: the projections then widen it.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an even kernel size.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        pool_kernel: tuple[int, int] = (3, 3),
        stride_kv: int = 1,
        stride_q: int | None = None,
        in_dim: int | None = None,
    ):
        super().__init__(dim, num_heads, qkv_bias, in_dim)
        if any(k % 2 == 0 for k in pool_kernel):
            raise ValueError(f"qkv_pool_kernel must have odd sizes, got {tuple(pool_kernel)}")
        head_dim = dim // num_heads
        self.pooled = {"k": stride_kv, "v": stride_kv}
        if stride_q is not None:
            self.pooled["q"] = stride_q
        for name, stride in sorted(self.pooled.items()):
            padding = tuple(k // 2 for k in pool_kernel)
            conv = nn.Conv2d(head_dim, head_dim, pool_kernel, stride, padding, groups=head_dim, bias=False)
            self.add_module(f"pool_{name}", conv)
            self.add_module(f"norm_{name}", layer_norm(head_dim))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        return self.proj(self.attend(*(self.project(name, x, hw) for name in "qkv")))

    def project(self, name: str, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Queries, keys or values (``name`` "q", "k" or "v") of x. (B, H*W, C) -> (B, N', heads, d)."""
        x = getattr(self, name)(x)
        if name not in self.pooled:
            return x.unflatten(-1, (self.num_heads, -1))
        return to_autocast_dtype(self.pool(name, x, hw))

    def modules_of(self, name: str) -> list[nn.Module]:
        """What `project` and `pool` use of this module for queries, keys or values."""
        pooling = (
            [getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")] if name in self.pooled else []
        )
        return [getattr(self, name), *pooling]

    def pool(self, name: str, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Pool x as ``name`` is pooled. (B, H*W, C) -> (B, ceil(H/s) * ceil(W/s), heads, d)."""
        conv, norm = getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")
        # Channels-last throughout, with the kernel repeated for each head: no copy into another layout.
        x = x.unflatten(1, hw).permute(0, 3, 1, 2)  # (B, H*W, C) -> (B, C, H, W)
        weight = conv.weight if self.num_heads == 1 else conv.weight.repeat(self.num_heads, 1, 1, 1)
        x = functional.conv2d(x, weight, None, conv.stride, conv.padding, groups=x.shape[1])
        return norm(x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (self.num_heads, -1)))
