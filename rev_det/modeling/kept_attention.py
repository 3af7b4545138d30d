"""Fused attention whose results are kept, so that a repeated call does not run its kernel again.

A fused kernel returns the attention's output and the log-sum-exp of its logits; with q, k and v that is all
its backward pass reads. `attention` is ``scaled_dot_product_attention`` for branches that are called twice:
under an `AttentionTape` the first call leaves these results on the tape, and the repeated call takes them
from there, together with the kernel's own backward operator. Without a tape it is torch's function.

This module needs torch alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy

logger = logging.getLogger(__name__)
_aten = torch.ops.aten

# The fused kernels that return all their backward pass needs.
FUSED_ATTENTION = frozenset(
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(_aten, name)
)


def keep_attention_policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """A policy for torch's selective checkpointing that keeps the results of fused attention only."""
    return CheckpointPolicy.MUST_SAVE if op in FUSED_ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's type on x's device; None without autocast, which the meta device never has."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast once what several layers would cast each for itself under autocast."""
    dtype = autocast_dtype(x) if x.is_floating_point() else None
    return x if dtype is None else x.to(dtype)


class KeptResult(NamedTuple):
    """What a fused kernel returned: the name of its autograd node; output, log-sum-exp and random state."""

    kernel: str
    tensors: tuple[Tensor | None, ...]


class AttentionTape:
    """The results of the `attention` calls inside one module call, in their order.

    Attributes:
        results: of each call; None where no fused kernel took it, which is then computed again.
    """

    def __init__(self, results: Sequence[KeptResult | None] = ()):
        self.results = list(results)
        self._position: int | None = None  # of the next result, while they are replayed

    def record(self, call: Callable, *args) -> tuple[Any, list[KeptResult | None]]:
        """Call a function and keep what `attention` computes in it: its result and what was kept."""
        return self._run(call, args), self.results

    def replay(self, call: Callable, *args) -> Any:
        """Call a function in which `attention` returns what was kept, with gradients to q, k and v."""
        self._position = 0
        return self._run(call, args)

    def _run(self, call: Callable, args: Sequence) -> Any:
        if getattr(_running, "tape", None) is not None:
            return call(*args)  # within another call, whose tape stays in charge and so remains in step
        _running.tape = self
        try:
            return call(*args)
        finally:
            _running.tape = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, keep: bool) -> Tensor:
        if self._position is None:
            out, result = _compute(q, k, v, scale) if keep else (_fused(q, k, v, scale), None)
            self.results.append(result)
            return out
        result = self.results[self._position] if self._position < len(self.results) else None
        self._position += 1
        if result is None or _hooks_on_saved_tensors():
            return _fused(q, k, v, scale)
        return _KeptAttention.apply(result.kernel, scale, q, k, v, *result.tensors)


_running = threading.local()  # its attribute ``tape`` is the one in charge


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, keep: bool = True) -> Tensor:
    """softmax(scale q k^T) v, by the kernel that torch chooses.

    Args:
        q: (B, heads, Nq, d).
        k: (B, heads, Nk, d).
        v: (B, heads, Nk, dv).
        scale: of the logits; None for 1 / sqrt(d).
        keep: whether the result is worth keeping where a tape keeps results.

    Returns:
        (B, heads, Nq, dv), in autocast's type under autocast.
    """
    # A graph that is being traced has no second call.
    tape = None if torch.compiler.is_compiling() else getattr(_running, "tape", None)
    if tape is None:
        return _fused(q, k, v, scale)
    return tape.attend(*map(to_autocast_dtype, (q, k, v)), scale, keep)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """torch's function; the CPU's fused kernel wants values as wide as queries."""
    width = v.shape[-1]
    out = scaled_dot_product_attention(q, k, _as_wide(v, q), scale=scale)
    return out if out.shape[-1] == width else out[..., :width]


def _as_wide(x: Tensor, q: Tensor) -> Tensor:
    missing = q.shape[-1] - x.shape[-1]
    return functional.pad(x, (0, missing)) if missing > 0 and x.device.type == "cpu" else x


def _compute(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, KeptResult | None]:
    """The attention, and what its backward pass will need besides q, k and v."""
    # Which kernel torch chooses, and whether that returns the log-sum-exp, depends on whether gradients are
    # wanted: they will be in the repeated call.
    # Hooks, of torch.utils.checkpoint for instance, would take what is read below for the backward pass.
    hooks = saved_tensors_hooks(_same, _same) if _hooks_on_saved_tensors() else nullcontext()
    with torch.enable_grad(), hooks:
        q, k, wide = (x.detach().requires_grad_() for x in (q, k, _as_wide(v.detach(), q)))
        out = scaled_dot_product_attention(q, k, wide, scale=scale)
    node, out = out.grad_fn, out.detach()
    if wide.shape != v.shape:
        out = out[..., : v.shape[-1]].contiguous()
    kernel = type(node).__name__
    if kernel not in _KERNELS:
        if out.numel() and not out.is_meta:
            _say_not_kept(kernel, q.shape[-1], str(q.dtype))
        return out, None
    saved = (getattr(node, f"_saved_{name}") for name in _saved_names(type(node)))
    return out, KeptResult(kernel, (out, *(None if x is None else x.detach() for x in saved)))


def _hooks_on_saved_tensors() -> bool:
    """Whether hooks decide what is kept here: a checkpoint inside the call computes attention for itself."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _same(x: Tensor) -> Tensor:
    return x


@cache
def _saved_names(node: type) -> list[str]:
    """What the autograd node of a kernel calls the values that `_KERNELS` names, in this version of torch."""
    alternatives = (names.split("|") for names in _KERNELS[node.__name__].saved)
    return [next(name for name in names if hasattr(node, f"_saved_{name}")) for names in alternatives]


@cache
def _say_not_kept(kernel: str, width: int, dtype: str) -> None:
    logger.warning(
        "Attention with heads %s wide in %s is computed again in the backward pass: torch chose %s, whose "
        "result cannot be kept",
        width,
        dtype,
        kernel,
    )


class _KeptAttention(torch.autograd.Function):
    """The attention's gradients from the kept result; nothing is computed in the forward pass."""

    @staticmethod
    def forward(ctx, kernel: str, scale: float | None, q: Tensor, k: Tensor, v: Tensor, *kept) -> Tensor:
        ctx.kernel, ctx.scale = kernel, scale
        ctx.save_for_backward(q, k, v, *kept)
        return kept[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        grads = _KERNELS[ctx.kernel].backward(dout, q, k, v, *kept, scale=ctx.scale)
        return None, None, *grads[:3], *(None for _ in kept)


# Each kernel's backward operator, called as torch's own autograd calls it: no mask, no dropout, not causal.


def _flash(dout, q, k, v, out, lse, cum_q, cum_k, state, offset, scale):
    lengths = (cum_q, cum_k, q.shape[-2], k.shape[-2])
    backward = _aten._scaled_dot_product_flash_attention_backward
    return backward(dout, q, k, v, out, lse, *lengths, 0.0, False, state, offset, scale=scale)


def _efficient(dout, q, k, v, out, lse, seed, offset, scale):
    backward = _aten._scaled_dot_product_efficient_attention_backward
    wanted = (True, True, True, False)
    return backward(dout, q, k, v, None, out, lse, seed, offset, 0.0, wanted, False, scale=scale)


def _cudnn(dout, q, k, v, out, lse, cum_q, cum_k, seed, offset, scale):
    lengths = (cum_q, cum_k, q.shape[-2], k.shape[-2])
    backward = _aten._scaled_dot_product_cudnn_attention_backward
    return backward(dout, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, False, scale=scale)


def _cpu(dout, q, k, v, out, lse, scale):
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    dout, wide, out = (_as_wide(x, q) for x in (dout, v, out))
    dq, dk, dv = backward(dout, q, k, wide, out, lse, 0.0, False, scale=scale)
    return dq, dk, dv[..., : v.shape[-1]]


class _Kernel(NamedTuple):
    backward: object
    saved: tuple[str, ...]  # attributes of the autograd node, besides the output


_LENGTHS = ("cum_seq_q", "cum_seq_k")
_SEED = ("philox_seed", "philox_offset")
_STATE = ("rng_state|philox_seed", "unused|philox_offset")  # the second name of each is torch 2.6's
_KERNELS = {
    "ScaledDotProductFlashAttentionBackward0": _Kernel(_flash, ("logsumexp", *_LENGTHS, *_STATE)),
    "ScaledDotProductEfficientAttentionBackward0": _Kernel(_efficient, ("log_sumexp", *_SEED)),
    "ScaledDotProductCudnnAttentionBackward0": _Kernel(_cudnn, ("logsumexp", *_LENGTHS, *_SEED)),
    "ScaledDotProductFlashAttentionForCpuBackward0": _Kernel(_cpu, ("logsumexp",)),
}
