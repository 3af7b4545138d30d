"""Reversible sequences: activations are rebuilt in the backward pass instead of stored.

A block maps two streams to two of the same shape (*Reversible Vision Transformers*, CVPR 2022, section 3)::

    Y1 = X1 + F(X2)            X2 = Y2 - G(Y1)            dX1 = dY1 + G'(Y1)^T dY2
    Y2 = X2 + G(Y1)            X1 = Y1 - F(X2)            dX2 = dY2 + F'(X2)^T dX1

The forward pass keeps the outputs of the last block only. The backward pass walks from there to the first
block; one evaluation of F and G gives both the block's inputs (in the middle) and its gradients (right).

This module needs torch alone and knows nothing of images or detectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .kept_attention import autocast_dtype, keep_attention_policy
from .repetition import WHOLE, CallRecord, Replay, first_calls, part, split, with_tensors, without_tensors

ACTIVATIONS = ("reversible", "cached", "checkpoint")
Masks = Sequence[tuple[Tensor | None, Tensor | None]]


class ReversibleSequence(nn.Module):
    """A run of reversible blocks over two streams.

    Each block is a module with two submodules, ``F(x, *args)`` and ``G(x)``, that return a tensor of x's
    shape. They need no inner skip connection and may contain anything deterministic, dropout, and fused
    attention. What they read besides inputs, parameters and buffers gets no gradient; double backward raises.
    The rebuild repeats the random numbers, autocast state and ``training`` flags of the forward pass. It is a
    second evaluation all the same: forward hooks run again, and BatchNorm updates its running statistics
    again (momentum ``1 - (1 - m) ** 0.5`` makes two updates as large as one with m). What computes with a
    buffer that it changes itself, as ``spectral_norm`` does in training, is not repeated exactly. Parameters
    that the loss does not depend on get zeros where "cached" leaves None.

    To bound the working memory, an F or G may have a method ``parts(x) -> (dim, number)``: it is then applied
    in that many parts of x along a dimension whose positions it treats independently, such as samples or
    tokens. (Random numbers, of dropout for instance, are then drawn by part.)

    Args:
        blocks: at least one block.
        activations: "reversible" rebuilds activations, "cached" is ordinary autograd, "checkpoint" recomputes
            block by block with ``torch.utils.checkpoint``. Same function, same gradients up to rounding.
        keep_attention: keep what `kept_attention.attention` computes in F and G rather than compute it twice.
            Attention called in another way is computed twice, but for "checkpoint", which keeps it too.

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
    if autocast_dtype(x1) is not None:
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
    if any(m is not None and m.requires_grad for pair in masks for m in pair):
        raise ValueError(
            "masks get no gradient from activations='reversible'; detach them, or use activations='cached'"
        )
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
    y1 = _sum(x1, _checked(x1, block.F(x2, *args)), mask[0])
    y2 = _sum(x2, _checked(x2, block.G(y1)), mask[1])
    return y1, y2


def _sum(x: Tensor, y: Tensor, mask: Tensor | None, sign: int = 1, out: Tensor | None = None) -> Tensor:
    """``x + sign * mask * y``"""
    if mask is None:
        return torch.add(x, y, alpha=sign, out=out)
    return torch.addcmul(x, y, mask, value=sign, out=out)


def _sum_(x: Tensor, y: Tensor, mask: Tensor | None, sign: int = 1) -> Tensor:
    """The same in place of x."""
    return x.add_(y, alpha=sign) if mask is None else x.addcmul_(y, mask, value=sign)


def _checked(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        raise ValueError(
            f"F and G must keep the shape of their input: {tuple(x.shape)} became {tuple(y.shape)}"
        )
    return y


# The functions below open nested autograd graphs, which torch.compile cannot trace: it breaks its graph here.
@torch.compiler.disable
def _run_reversible(blocks, masks, keep_attention, x1, x2, args) -> tuple[Tensor, Tensor]:
    run = _Run(len(blocks))
    with first_calls(x1.device) as generators:
        for i, (block, (mask_f, mask_g)) in enumerate(zip(blocks, masks, strict=True)):
            record = CallRecord([(block.F, [block.F]), (block.G, [block.G])], generators, keep_attention)
            F, G = _Branch(record, 0, x2, args, mask_f), _Branch(record, 1, x1, (), mask_g)
            x1, x2 = _Block.apply(run, i, record, F, G, len(args), x1, x2, *args, *record.parameters)
    return x1, x2


class _Run:
    """Where the backward pass of a block leaves the streams it rebuilt, for that of the block before."""

    def __init__(self, length: int):
        self.last = length - 1
        self.streams: tuple[Tensor, Tensor] | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        streams, self.streams = self.streams, None
        return streams


class _Block(torch.autograd.Function):
    """One block, as a function of the streams, of F's arguments and of the parameters of F and G.

    Only the last block of a run keeps anything of the size of a stream: its outputs. Parameters are inputs
    and their gradients are outputs, which arrive block by block while the backward pass advances.
    """

    @staticmethod
    def forward(
        ctx, run: _Run, index: int, record: CallRecord, F: _Branch, G: _Branch, num_args: int, *tensors
    ):
        x1, x2, *args = tensors[: 2 + num_args]
        y1 = F.add_to(x1, x2, *args)  # Y1 = X1 + F(X2)
        y2 = G.add_to(x2, y1)  # Y2 = X2 + G(Y1)
        ctx.run, ctx.index, ctx.record, ctx.branches = run, index, record, (F, G)
        ctx.args = without_tensors(args)
        kept = (y1, y2) if index == run.last else ()
        args = [a for a in args if isinstance(a, Tensor)]
        ctx.save_for_backward(F.mask, G.mask, *args, *record.saved(), *kept)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx, dy1: Tensor, dy2: Tensor):
        F, G = ctx.branches
        F.mask, G.mask, *saved = ctx.saved_tensors
        saved = iter(saved)
        args = with_tensors(ctx.args, saved)
        needs_x = any(ctx.needs_input_grad[6:8])
        needs_args = ctx.needs_input_grad[8 : 8 + len(args)]
        before = needs_x and ctx.index > 0  # whether there is a block before this one to go on with
        # Streams and gradients that another block handed on are ours to overwrite.
        ours = ctx.index < ctx.run.last
        replay = Replay(ctx.record, saved)
        y1, y2 = ctx.run.take() if ours else saved
        # X2 = Y2 - G(Y1)
        x2, dx1, _ = G.undo(replay, y2, dy2, [y1], [True], dy1, ours)
        # X1 = Y1 - F(X2)
        x1, dx2, dargs = F.undo(replay, y1, dx1, [x2, *args], [needs_x, *needs_args], dy2, ours, before)
        if before:
            ctx.run.streams = x1, x2
        return *[None] * 6, dx1, dx2, *dargs, *replay.parameter_gradients()


class _Branch:
    """An F or G as it is applied to a stream: times its drop-path multiplier, and in parts if it asks."""

    def __init__(self, record: CallRecord, number: int, x: Tensor, args: Sequence, mask: Tensor | None):
        self.record, self.number, self.mask = record, number, mask
        module, self.parts = record.functions[number], WHOLE
        # Tensors among the arguments may not be split like x.
        if hasattr(type(module), "parts") and not any(isinstance(a, Tensor) for a in args):
            self.parts = module.parts(x)
            if self.parts[1] < 1:
                raise ValueError(
                    f"parts() of {type(module).__name__} must return (dimension, number of parts of at least "
                    f"1), got {self.parts}"
                )
        self.dim = self.parts[0]

    def add_to(self, x: Tensor, *inputs) -> Tensor:
        """``x + mask * module(*inputs)``"""
        # Into a tensor that is there: autocast would cast the summands of a new one, each by itself.
        y = torch.empty_like(x)
        for bounds in split(inputs, self.parts):
            cut = partial(part, dim=self.dim, bounds=bounds)
            result = _checked(cut(x), self.record.first(self.number, *map(cut, inputs)))
            _sum(cut(x), result, cut(self.mask), out=cut(y))
        return y

    def undo(
        self,
        replay: Replay,
        y: Tensor,
        dy: Tensor,
        inputs: Sequence,
        wanted: Sequence[bool],
        dx: Tensor,
        overwrite: bool,
        invert: bool = True,
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        """Undo `add_to`, and differentiate it, with one evaluation of the module.

        Args:
            replay: of the record.
            y: its result.
            dy: gradient of y.
            inputs: as it had them.
            wanted: which of them to differentiate by.
            dx: other gradients of the first input, to add to.
            overwrite: whether x and the sum of gradients may take the place of y and dx.
            invert: whether x is wanted.

        Returns:
            x, the gradient of the first input, the gradients of the other ones.
        """
        x = y
        if not overwrite and self.parts[1] > 1:
            x, dx, overwrite = y.clone(), dx.clone(), True
        for call, bounds in enumerate(split(inputs, self.parts)):
            cut = partial(part, dim=self.dim, bounds=bounds)
            mask = cut(self.mask)

            def invert_and_weigh(result: Tensor, cut=cut, mask=mask) -> Tensor:
                nonlocal x
                if invert and overwrite:
                    _sum_(cut(x), result, mask, sign=-1)
                elif invert:
                    x = _sum(x, result, mask, sign=-1)
                if mask is None:
                    return cut(dy).to(result.dtype)
                return torch.mul(cut(dy), mask, out=torch.empty_like(result))

            pieces = [*map(cut, inputs)]
            grad, *others = replay.gradients(self.number, call, pieces, wanted, invert_and_weigh)
            if not overwrite:
                dx = dx.clone() if grad is None else dx + grad
            elif grad is not None:
                cut(dx).add_(grad)
        return x, dx, others


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
