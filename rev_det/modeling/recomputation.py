"""Keeping the inputs of a module only: activation checkpointing, in parts, and of what has several results.

The backward pass computes the rest again, by a `repetition.Replay` of the first call.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .repetition import (
    WHOLE,
    CallRecord,
    Parts,
    Replay,
    Used,
    first_calls,
    part,
    split,
    with_tensors,
    without_tensors,
)


def recompute(
    call: Callable[..., Tensor],
    *inputs,
    parts: Parts = WHOLE,
    modules: Sequence[nn.Module] | None = None,
    keep_attention: bool = False,
    last: nn.Module | None = None,
) -> Tensor:
    """Apply a module and keep its inputs only; the backward pass computes the rest again.

    Unlike ``torch.utils.checkpoint`` it can do so in parts, of which only one is in memory at a time.

    Args:
        call: the module, or a function that uses ``modules``.
        inputs: tensors, and other values.
        parts: (dimension, number): apply the module to that many parts of its inputs, which have one shape
            but for the last dimension and are treated independently along that dimension.
        modules: all modules whose parameters and buffers a function uses.
        keep_attention: keep what `kept_attention.attention` computes, too.
        last: a layer that nothing but sums and multipliers follow: its product is not computed again.
    """
    if not torch.is_grad_enabled():
        return call(*inputs)
    functions = [(call, (call,) if modules is None else modules, last)]
    return _recompute(functions, parts, keep_attention, inputs)


def recompute_each(
    trunk: Used,
    branches: Sequence[Used],
    *inputs,
    parts: Parts = WHOLE,
    keep_attention: bool = False,
) -> tuple[Tensor, ...]:
    """Apply several functions to one result and keep the inputs only.

    The backward pass computes that result again once, and then one function after the other: what only one of
    them needs is never in memory beside what another does.

    Args:
        trunk: of the inputs, which are tensors and other values.
        branches: of its result; each may have a third entry, a last layer as `recompute` has it.
        parts: (dimension, number) of the trunk's result, to which the branches are applied part by part.
        keep_attention: keep what `kept_attention.attention` computes, too.

    Returns:
        what each branch returns.
    """
    if not torch.is_grad_enabled():
        x = trunk[0](*inputs)
        return tuple(branch(x) for branch, *_ in branches)
    return _recompute([trunk, *branches], parts, keep_attention, inputs)


# torch.compile cannot trace the nested graph of the backward pass: in training it breaks its graph here.
@torch.compiler.disable
def _recompute(functions: Sequence[Used], parts: Parts, keep_attention: bool, inputs: Sequence):
    with first_calls(next(x for x in inputs if isinstance(x, Tensor)).device) as generators:
        record = CallRecord(functions, generators, keep_attention)
        return _Recompute.apply(record, parts, len(inputs), *inputs, *record.parameters)


class _Recompute(torch.autograd.Function):
    """A trunk, in parts; or a trunk and the branches that are applied to its result, in parts."""

    @staticmethod
    def forward(ctx, record: CallRecord, parts: Parts, count: int, *inputs_and_parameters):
        inputs, branches = inputs_and_parameters[:count], range(1, len(record.functions))
        ctx.record, ctx.parts, ctx.branches = record, parts, branches
        ctx.inputs = without_tensors(inputs)
        if branches:
            trunk = record.first(0, *inputs)
            y = tuple(_in_parts(record, i, [trunk], parts) for i in branches)
        else:
            y = _in_parts(record, 0, inputs, parts)
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *record.saved())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        saved = iter(ctx.saved_tensors)
        inputs = with_tensors(ctx.inputs, saved)
        wanted = ctx.needs_input_grad[3 : 3 + len(inputs)]
        replay = Replay(ctx.record, saved)

        def through_branches(y: Tensor) -> Tensor:
            total = None
            for i, dy in zip(ctx.branches, dys, strict=True):
                (dx,) = _gradients_in_parts(replay, i, [y], [True], dy, ctx.parts)
                if dx is not None:
                    # In place: what `Replay.gradients` returns is nobody else's.
                    total = dx if total is None else total.add_(dx)
                del dx
            return torch.zeros_like(y) if total is None else total

        if ctx.branches:
            grads = replay.gradients(0, 0, inputs, wanted, through_branches)
        else:
            grads = _gradients_in_parts(replay, 0, inputs, wanted, dys[0], ctx.parts)
        return None, None, None, *grads, *replay.parameter_gradients()


def _in_parts(record: CallRecord, function: int, inputs: Sequence, parts: Parts) -> Tensor:
    """The first calls of a function, on parts of its inputs."""
    y = None
    for bounds in split(inputs, parts):
        result = record.first(function, *(part(x, parts[0], bounds) for x in inputs))
        if bounds.start is None:
            return result
        if y is None:
            shape = list(result.shape)
            shape[parts[0]] = next(x for x in inputs if isinstance(x, Tensor)).shape[parts[0]]
            y = result.new_empty(shape)
        part(y, parts[0], bounds).copy_(result)
    return y


def _gradients_in_parts(
    replay: Replay, function: int, inputs: Sequence, wanted: Sequence[bool], dy: Tensor, parts: Parts
) -> list[Tensor | None]:
    """The gradients of the inputs of `_in_parts`."""
    grads: list[Tensor | None] = [None] * len(inputs)
    for number, bounds in enumerate(split(inputs, parts)):
        pieces = [part(x, parts[0], bounds) for x in inputs]
        given = part(dy, parts[0], bounds)
        found = replay.gradients(function, number, pieces, wanted, lambda y, given=given: given.to(y.dtype))
        for i, dx in enumerate(found):
            if dx is None or bounds.start is None:
                grads[i] = dx
            elif dx.shape == inputs[i].shape:  # of all parts
                grads[i] = dx if grads[i] is None else grads[i] + dx
            else:
                if grads[i] is None:
                    grads[i] = torch.empty_like(inputs[i])
                part(grads[i], parts[0], bounds).copy_(dx)
    return grads
