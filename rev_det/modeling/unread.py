"""The last layer of a repeated call, of whose result only the gradients are wanted.

The gradients of a product need its operands, not its value: where a linear layer or a convolution ends a call
that is repeated for its gradients alone, the product itself need not be computed again.

This module needs torch alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kept_attention import to_autocast_dtype


@contextmanager
def without_value(layer: nn.Module | None) -> Iterator[None]:
    """A context in which a layer, called in this thread, returns zeros that have the layer's gradients.

    A layer that computes more than its product, or that hooks look at, computes its value.

    Args:
        layer: the last of a call, which nothing but sums and multipliers may follow.
    """
    if layer is None or not _is_a_product(layer):
        yield
        return
    layer.forward = partial(_forward, layer, threading.get_ident())
    try:
        yield
    finally:
        del layer.forward


def _is_a_product(layer: nn.Module) -> bool:
    # Hooks on all modules are those of tools that count and time, not of anybody who reads values.
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    backward_hooks = layer._backward_hooks or layer._backward_pre_hooks
    if hooks or backward_hooks or "forward" in vars(layer):
        return False
    if isinstance(layer, nn.Conv2d):
        plain = getattr(layer, "norm", None) is None and getattr(layer, "activation", None) is None
        return plain and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def _forward(layer: nn.Module, thread: int, x: Tensor) -> Tensor:
    if threading.get_ident() != thread:
        return type(layer).forward(layer, x)
    x, weight = to_autocast_dtype(x), to_autocast_dtype(layer.weight)
    bias = None if layer.bias is None else to_autocast_dtype(layer.bias)
    return _Unread.apply(layer, x, weight, bias)


class _Unread(torch.autograd.Function):
    """A product without its value."""

    @staticmethod
    def forward(ctx, layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        if isinstance(layer, nn.Linear):
            shape = *x.shape[:-1], len(weight)
        else:
            sizes = zip(
                x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
            )
            shape = len(x), len(weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
        return x.new_zeros(1).expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        layer, (x, weight) = ctx.layer, ctx.saved_tensors
        _, *wanted = ctx.needs_input_grad
        if not isinstance(layer, nn.Linear):
            where = layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups
            sizes = [len(weight)] if wanted[2] else None
            return None, *torch.ops.aten.convolution_backward(dy, x, weight, sizes, *where, wanted)
        rows = dy.flatten(0, -2)
        dx = dy @ weight if wanted[0] else None
        dweight = rows.T @ x.flatten(0, -2) if wanted[1] else None
        return None, dx, dweight, rows.sum(0) if wanted[2] else None
