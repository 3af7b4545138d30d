"""Reversible sequences: activations are rebuilt in the backward pass instead of stored.

A block maps two streams to two of the same shape (*Reversible Vision Transformers*, CVPR 2022, section 3)::

    Y1 = X1 + F(X2)            X2 = Y2 - G(Y1)
    Y2 = X2 + G(Y1)            X1 = Y1 - F(X2)

The forward pass keeps the outputs of the last block only. The backward pass walks from there to the first
block; one evaluation of F and G gives both the block's inputs and its gradients.

This module needs torch alone and knows nothing of images or detectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .recompute import (
    Branch,
    ParameterGradients,
    branch_backward,
    branch_forward,
    keep_attention_policy,
    sample_chunks,
    token_chunks,
)

ACTIVATIONS = ("reversible", "cached", "checkpoint")
Masks = Sequence[tuple[Tensor | None, Tensor | None]]
_SAVED = object()  # stands for a tensor that torch saves


class ReversibleSequence(nn.Module):
    """A run of reversible blocks over two streams.

    Each block is a module with two submodules, ``F(x, *args)`` and ``G(x)``, that return a tensor of x's
    shape. They need no inner skip connection and may contain anything deterministic, dropout, and fused
    attention. What they read besides inputs, parameters and buffers gets no gradient; double backward raises.
    The rebuild repeats the random numbers, autocast state and ``training`` flags of the forward pass. It is a
    second evaluation all the same: forward hooks run again, and BatchNorm updates its running statistics
    again (momentum ``1 - (1 - m) ** 0.5`` makes two updates as large as one with m).

    To bound the working memory, a G that treats the positions along dimension 1 independently may have a
    method ``token_chunks(x) -> int``, and an F that treats samples independently ``sample_chunks(x) -> int``:
    they are applied in that many parts. (Random numbers, of dropout for instance, are then drawn by part.)

    Args:
        blocks: at least one block.
        activations: "reversible" rebuilds activations, "cached" is ordinary autograd, "checkpoint" recomputes
            block by block with ``torch.utils.checkpoint``. Same function, same gradients up to rounding.
        keep_attention: keep the results of fused attention inside F rather than compute them twice.

    Raises:
        ValueError: no blocks, a block without F and G, or an unknown ``activations``.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], activations: str = "reversible", keep_attention: bool = False
    ):
        super().__init__()
        check_activations(activations)
        self.blocks = nn.ModuleList(blocks)
        if not len(self.blocks):
            raise ValueError("ReversibleSequence needs at least one block, got none")
        for i, block in enumerate(self.blocks):
            if not all(isinstance(getattr(block, name, None), nn.Module) for name in "FG"):
                raise ValueError(
                    f"block {i} of ReversibleSequence, a {type(block).__name__}, must have submodules F and G"
                )
        self.activations = activations
        self.keep_attention = keep_attention

    def forward(self, x1: Tensor, x2: Tensor, *args, masks: Masks | None = None) -> tuple[Tensor, Tensor]:
        """Apply the blocks.

        Args:
            x1: the stream that receives F, of shape (B, ...).
            x2: the stream that receives G, of x1's shape.
            args: passed to every F; tensors among them may require gradients.
            masks: for each block ``(mF, mG)``, multipliers of shape (B,) of F's and G's result (drop path),
                or None for no multiplier.

        Returns:
            (y1, y2), of x1's shape.
        """
        return run_blocks(
            self.blocks,
            x1,
            x2,
            *args,
            masks=masks,
            activations=self.activations,
            keep_attention=self.keep_attention,
        )


def run_blocks(
    blocks: Sequence[nn.Module],
    x1: Tensor,
    x2: Tensor,
    *args,
    masks: Masks | None = None,
    activations: str = "reversible",
    keep_attention: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `ReversibleSequence` does, for blocks that are registered elsewhere."""
    check_activations(activations)
    if x1.shape != x2.shape:
        raise ValueError(f"the two streams must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
    masks = [(None, None)] * len(blocks) if masks is None else list(masks)
    if len(masks) != len(blocks):
        raise ValueError(f"masks must hold one (mF, mG) for each of {len(blocks)} blocks, got {len(masks)}")
    masks = [tuple(_broadcastable(m, x1) for m in pair) for pair in masks]
    if torch.is_autocast_enabled(x1.device.type):
        # The inversion is exact only as far as the sums of the streams are.
        same, x1 = x1 is x2, _at_least_float32(x1)
        x2 = x1 if same else _at_least_float32(x2)
    if activations == "cached" or not torch.is_grad_enabled():
        for block, mask in zip(blocks, masks, strict=True):
            x1, x2 = _block(block, mask, x1, x2, *args)
        return x1, x2
    if activations == "checkpoint":
        contexts = {}
        if keep_attention:
            policy = partial(create_selective_checkpoint_contexts, keep_attention_policy)
            contexts = {"context_fn": policy}
        for block, mask in zip(blocks, masks, strict=True):
            x1, x2 = checkpoint(_block, block, mask, x1, x2, *args, use_reentrant=False, **contexts)
        return x1, x2
    return _run_reversible(blocks, masks, keep_attention, x1, x2, args)


@torch.no_grad()
def invert_blocks(
    blocks: Sequence[nn.Module], y1: Tensor, y2: Tensor, *args, masks: Masks | None = None
) -> tuple[Tensor, Tensor]:
    """The inputs of `run_blocks`, without gradients, from its outputs; the blocks must not draw at random.

    Args:
        blocks, args, masks: as `run_blocks` was given them.
        y1, y2: what it returned, in the same precision.
    """
    masks = [(None, None)] * len(blocks) if masks is None else list(masks)
    for block, (mask_f, mask_g) in zip(reversed(blocks), reversed(masks), strict=True):
        x2 = y2 - _masked(block.G(y1), mask_g)
        x1 = y1 - _masked(block.F(x2, *args), mask_f)
        y1, y2 = x1, x2
    return y1, y2


def check_activations(activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}; got {activations!r}")


def _block(block: nn.Module, mask: tuple, x1: Tensor, x2: Tensor, *args) -> tuple[Tensor, Tensor]:
    y1 = _sum(x1, block.F(x2, *args), mask[0])
    y2 = _sum(x2, block.G(y1), mask[1])
    return y1, y2


def _sum(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    if x.shape != y.shape:
        raise ValueError(
            f"F and G must keep the shape of their input: {tuple(x.shape)} became {tuple(y.shape)}"
        )
    return x + y if mask is None else torch.addcmul(x, y, mask)


# The function below opens nested autograd graphs, which torch.compile cannot trace: it breaks its graph here.
@torch.compiler.disable
def _run_reversible(blocks, masks, keep_attention, x1, x2, args) -> tuple[Tensor, Tensor]:
    parameters = list(dict.fromkeys(p for b in blocks for m in (b.F, b.G) for p in m.parameters()))
    run = _Run(list(blocks), keep_attention, len(args), [p for p in parameters if p.requires_grad])
    return _Reversible.apply(run, masks, x1, None if x2 is x1 else x2, *args, *run.parameters)


class _Run:
    """What one forward pass of `_Reversible` hands to its backward pass, besides the tensors torch saves."""

    def __init__(self, blocks: list[nn.Module], keep_attention: bool, num_args: int, parameters: list):
        self.blocks, self.keep_attention, self.num_args = blocks, keep_attention, num_args
        self.parameters = parameters
        self.branches: list[tuple[Branch, Branch]] = []  # F's and G's application, for each block
        # The outputs, without their history, and their version counters.
        self.outputs: list[tuple[Tensor, int]] = []

    def take(self) -> tuple[list[Tensor], list[tuple[Branch, Branch]]]:
        """The outputs and branches; they are let go, so that memory falls while the backward pass advances,
        unless the graph is to be kept for another one."""
        for y, version in self.outputs:
            if y._version != version:
                raise RuntimeError(
                    "an output of a reversible run has been modified by an inplace operation, so its inputs "
                    "cannot be rebuilt; modify a clone instead"
                )
        outputs, branches = [y for y, _ in self.outputs], list(self.branches)
        if not _graph_is_kept():
            self.outputs, self.branches = [], []
        return outputs, branches


class _Reversible(torch.autograd.Function):
    """All blocks of a run as one function: parameters are inputs, their gradients are outputs.

    A run that starts with X1 = X2 (every stage does) keeps that one tensor. Its first block then needs no
    inversion: neither its F nor its G has to finish, and a run of one block does not keep Y2.
    """

    @staticmethod
    def forward(ctx, run: _Run, masks, x1: Tensor, x2: Tensor | None, *args_and_parameters):
        args = args_and_parameters[: run.num_args]
        start = x1 if x2 is None else None
        # Copies: the caller's tensors stay as they are, and the streams in between are ours to overwrite.
        y1, y2 = x1.clone(), (x1 if x2 is None else x2).clone()
        samples_alone = not any(isinstance(a, Tensor) for a in args)  # they may not be split like x
        for block, (mask_f, mask_g) in zip(run.blocks, masks, strict=True):
            chunks = sample_chunks(block.F, y2) if samples_alone else 1
            branch_f = branch_forward(
                block.F, [y2, *args], y1, mask_f, run.keep_attention, dim=0, chunks=chunks
            )
            chunks = token_chunks(block.G, y1)
            branch_g = branch_forward(block.G, [y1], y2, mask_g, dim=1, chunks=chunks)
            run.branches.append((branch_f, branch_g))
        needs_y2 = start is None or len(run.blocks) > 1
        run.outputs = [(y.detach(), y._version) for y in ((y1, y2) if needs_y2 else (y1,))]
        ctx.run = run
        ctx.args = [_SAVED if isinstance(a, Tensor) else a for a in args]
        # Saved parameters are not read, but torch then notices if they were changed in between.
        tensor_args = [a for a in args if isinstance(a, Tensor)]
        ctx.save_for_backward(start, *(m for pair in masks for m in pair), *tensor_args, *run.parameters)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx, dy1: Tensor, dy2: Tensor):
        run, blocks = ctx.run, ctx.run.blocks
        start, *saved = ctx.saved_tensors
        saved = iter(saved)
        masks = [(next(saved), next(saved)) for _ in blocks]
        args = [next(saved) if a is _SAVED else a for a in ctx.args]
        (y1, *y2), branches = run.take()
        y2 = y2[0] if y2 else None

        parameter_grads = ParameterGradients(run.parameters)
        needs_x = any(ctx.needs_input_grad[2:4])
        wants_arg = ctx.needs_input_grad[4 : 4 + run.num_args]
        arg_grads = [torch.zeros_like(a) if w else None for a, w in zip(args, wants_arg, strict=True)]
        # Below the first block that trains anything nothing has to be rebuilt.
        last = 0
        if not needs_x and not any(wants_arg):
            trains = (i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters()))
            last = next(trains, len(blocks))

        # dy1 and dy2 become the gradients of the streams rebuilt so far.
        dy1, dy2 = dy1.clone(), dy2.clone()
        for i in reversed(range(last, len(blocks))):
            (branch_f, branch_g), (mask_f, mask_g) = branches.pop(), masks[i]
            known = i == 0 and start is not None
            if known:
                x1 = x2 = start
            elif i == len(blocks) - 1:
                x1, x2 = y1.clone(), y2.clone()
            else:
                x1, x2 = y1, y2  # rebuilt by us, overwritten in place
            y2 = None
            branch_backward(
                branch_g, [y1], dy2, parameter_grads, [dy1], mask_g, subtract_from=None if known else x2
            )
            y1 = None
            branch_backward(
                branch_f,
                [x2, *args],
                dy1,
                parameter_grads,
                [dy2, *arg_grads],
                mask_f,
                subtract_from=None if known else x1,
            )
            y1, y2 = x1, x2
        if start is not None:
            dy1, dy2 = dy1.add_(dy2), None
        if not needs_x:
            dy1 = dy2 = None
        return None, None, dy1, dy2, *arg_grads, *parameter_grads.sums


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running was asked to retain its graph."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if is_kept is None else is_kept()


def _masked(y: Tensor, mask: Tensor | None) -> Tensor:
    return y if mask is None else y * _broadcastable(mask, y)


def _broadcastable(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != x.shape[:1]:
        raise ValueError(f"a drop-path mask must have shape ({x.shape[0]},), got {tuple(mask.shape)}")
    return mask.view(-1, *[1] * (x.dim() - 1))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
