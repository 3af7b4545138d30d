"""Calling a module a second time in the backward pass, exactly as it was called the first time.

A `CallRecord` makes the first call, without gradients, and notes what it depends on besides its inputs:
parameters and buffers, autocast, training flags, random generators, and the results of fused attention if
these are to be kept. A `Replay` repeats the call and differentiates it. `recompute` is activation
checkpointing for one module, built on the two.

This module needs torch alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from .kept_attention import AttentionTape, KeptResult

Parts = tuple[int, int]  # the dimension along which an input is split, and the number of parts
WHOLE = (0, 1)


class Generators:
    """The random generators that calls on a device draw from, and their states after the last call.

    While a CUDA graph is captured the device's generator can be neither read nor set: no call may draw then.
    """

    def __init__(self, device: torch.device):
        self.device = device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.on_cpu = device.type in ("cpu", "meta") or capturing
        self.last = self.states()

    def states(self) -> list[Tensor]:
        cpu = torch.get_rng_state()
        return (
            [cpu] if self.on_cpu else [cpu, torch.get_device_module(self.device).get_rng_state(self.device)]
        )

    def set(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self.device).set_rng_state(state, self.device)

    def states_if_drawn(self) -> list[Tensor] | None:
        """The states after the last call, if there was a draw since then."""
        before, self.last = self.last, self.states()
        # Read from memory: a comparison of tensors would be seen by modes that watch or replace operators.
        drawn = any(_bytes(a) != _bytes(b) for a, b in zip(before, self.last, strict=True))
        return before if drawn else None


class CallRecord:
    """How a module was called, once or for several parts of an input in turn.

    Args:
        call: the module, or a function of tensors and other values.
        modules: all modules whose parameters and buffers the call uses.
        generators: of the device where it computes.
        keep_attention: keep what `kept_attention.attention` computes inside the module (batch * tokens *
            (channels + heads) numbers for each) instead of computing it twice.

    Attributes:
        parameters: the tensors that the repeated call will have gradients for, as the module has them now.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        modules: Sequence[nn.Module],
        generators: Generators,
        keep_attention: bool = False,
    ):
        self.call, self.generators, self.keep_attention = call, generators, keep_attention
        self.autocast: tuple[str, bool, torch.dtype] | None = None
        kind = generators.device.type
        if torch.amp.is_autocast_available(kind):
            self.autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.training: dict[nn.Module, bool] = {}
        # Where each parameter and buffer is, so that the repeated call finds the same ones:
        # torch.func.functional_call, for instance, puts others there for one call.
        self.slots: list[tuple[dict, str, Tensor]] = []
        # Those of modules that read their parameters in autocast's type alone.
        self.castable: list[tuple[dict, str, Tensor]] = []
        found = list(modules)
        for m in found:  # grows while it is gone through
            if m is None or m in self.training:
                continue
            self.training[m] = m.training
            casts = self.autocast and self.autocast[1] and getattr(type(m), "casts_parameters", False)
            for tensors in (m._parameters, m._buffers):
                slots = [(tensors, name, x) for name, x in tensors.items() if x is not None]
                self.slots += slots
                self.castable += [slot for slot in slots if casts and slot[2].dtype is torch.float32]
            found += m._modules.values()
        self.parameters = list(dict.fromkeys(tensor for *_, tensor in self.slots if tensor.requires_grad))
        self.states: list[list[Tensor] | None] = []  # of the generators before each call, if it drew
        self.kept: list[list[tuple[str, int] | None]] = []  # kernel and number of tensors of each attention
        self._kept_tensors: list[Tensor | None] = []

    def first(self, *inputs) -> Tensor:
        """Call the module without gradients, inside `first_calls`."""
        copies = self.casts()
        for (tensors, name, _), copy in zip(self.castable, copies, strict=True):
            tensors[name] = copy
        try:
            if self.keep_attention:
                result, kept = AttentionTape().record(self.call, *inputs)
            else:
                result, kept = self.call(*inputs), ()
        finally:
            for tensors, name, tensor in self.castable:
                tensors[name] = tensor
        self.kept.append([x and (x.kernel, len(x.tensors)) for x in kept])
        self._kept_tensors += [tensor for x in kept if x for tensor in x.tensors]
        self.states.append(self.generators.states_if_drawn())
        return result

    def saved(self) -> list[Tensor | None]:
        """What ``ctx.save_for_backward`` is to keep, besides inputs, for a `Replay` of the calls made so far.

        Parameters are among it, although they are not read: torch then notices if they were changed.
        """
        tensors, self._kept_tensors = self._kept_tensors, []
        return [*self.parameters, *tensors]

    def casts(self) -> list[Tensor]:
        """What is in the castable slots, in autocast's type, by one operation instead of one for each."""
        return _cast([x for *_, x in self.castable], self.autocast[2]) if self.castable else []

    def again(self, number: int, tensors: Sequence[Tensor], inputs: Sequence) -> Tensor:
        """Repeat a call as it was made, with gradients, and with these tensors in the slots."""
        changed = [m for m, training in self.training.items() if m.training != training]
        present = [slot.get(name) for slot, name, _ in self.slots]
        states = self.states[number]
        now = None if states is None else self.generators.states()
        try:
            for m in changed:
                m.training = not m.training
            for (slot, name, _), x in zip(self.slots, tensors, strict=True):
                slot[name] = x
            if states is not None:
                self.generators.set(states)
            with torch.enable_grad():
                if self.autocast is None:
                    return self.call(*inputs)
                kind, enabled, dtype = self.autocast
                # Without the weight cache: it would keep low-precision copies of all weights alive.
                with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                    return self.call(*inputs)
        finally:
            for m in changed:
                m.training = not m.training
            for (slot, name, _), x in zip(self.slots, present, strict=True):
                slot[name] = x
            if now is not None:
                self.generators.set(now)


class Replay:
    """The calls of a record, repeated in a backward pass.

    Args:
        record: of the calls.
        saved: over saved tensors, of which the record's are taken.

    Attributes:
        parameter_gradients: of the record's ``parameters``, summed over the calls repeated so far.
    """

    def __init__(self, record: CallRecord, saved: Iterator[Tensor | None]):
        self.record = record
        for _ in record.parameters:
            next(saved)
        self.results = [
            [kept and KeptResult(kept[0], tuple(next(saved) for _ in range(kept[1]))) for kept in call]
            for call in record.kept
        ]
        # Not the parameters themselves: hooks on these are for the gradients that leave the backward pass.
        copies = dict(zip((x for *_, x in record.castable), record.casts(), strict=True))
        aliases = {p: copies.get(p, p).detach().requires_grad_() for p in record.parameters}
        self.aliases = list(aliases.values())
        copies |= aliases
        self.tensors = [copies.get(x, x) for *_, x in record.slots]
        self.parameter_gradients: list[Tensor | None] = [None] * len(self.aliases)

    def gradients(
        self, call: int, inputs: Sequence, wanted: Sequence[bool], dy: Callable[[Tensor], Tensor]
    ) -> list[Tensor | None]:
        """Repeat a call and differentiate it.

        Args:
            call: its number.
            inputs: as it had them.
            wanted: which of the inputs to differentiate by.
            dy: is given the call's result and returns the gradient of it, in its type.

        Returns:
            the gradients of the inputs, None for those without.
        """
        inputs = [
            x.detach().requires_grad_(want) if isinstance(x, Tensor) else x
            for x, want in zip(inputs, wanted, strict=True)
        ]
        again, kept = self.record.again, self.results[call]
        if kept:
            y = AttentionTape(kept).replay(again, call, self.tensors, inputs)
        else:
            y = again(call, self.tensors, inputs)
        grad = dy(y.detach())
        variables = [x for x, want in zip(inputs, wanted, strict=True) if want]
        if not (y.requires_grad and (variables or self.aliases)):
            return [None] * len(inputs)
        y = get_gradient_edge(y)  # its value has been read
        found = iter(torch.autograd.grad(y, variables + self.aliases, grad, allow_unused=True))
        result = [next(found) if want else None for want in wanted]
        # torch may hand out the gradient of the result itself, which is not ours to give away.
        grads = [g.clone() if g is not None and torch._C._is_alias_of(g, grad) else g for g in found]
        low = [i for i, g in enumerate(grads) if g is not None and g.dtype != self.record.parameters[i].dtype]
        if low:  # of the castable ones
            for i, g in zip(low, _cast([grads[i] for i in low], torch.float32), strict=True):
                grads[i] = g
        self.parameter_gradients = [
            total if g is None else g if total is None else total + g
            for total, g in zip(self.parameter_gradients, grads, strict=True)
        ]
        return result

    def add_parameter_gradients(self, sums: dict[Tensor, Tensor | None]) -> None:
        """Add the gradients of the record's parameters to these sums."""
        for p, grad in zip(self.record.parameters, self.parameter_gradients, strict=True):
            if grad is not None:
                sums[p] = grad if sums[p] is None else sums[p] + grad


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another type, by one operation."""
    copies = [torch.empty_like(x, dtype=dtype, requires_grad=False) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def split(inputs: Sequence, parts: Parts) -> list[slice]:
    """The bounds of at most that many equal parts of the first tensor; the last may be smaller."""
    dim, number = parts
    if number == 1:
        return [slice(None)]
    size = next(x for x in inputs if isinstance(x, Tensor)).shape[dim]
    length = max(1, -(-size // number))
    return [slice(start, min(start + length, size)) for start in range(0, max(1, size), length)]


def part(x, dim: int, bounds: slice):
    """A part of a tensor; all of anything else, and of a tensor that is broadcast along the dimension."""
    if bounds.start is None or not isinstance(x, Tensor) or x.shape[dim] == 1:
        return x
    return x.narrow(dim, bounds.start, bounds.stop - bounds.start)


def recompute(
    call: Callable[..., Tensor], *inputs, parts: Parts = WHOLE, modules: Sequence[nn.Module] | None = None
) -> Tensor:
    """Apply a module and keep its inputs only; the backward pass computes the rest again.

    Unlike ``torch.utils.checkpoint`` it can do so in parts, of which only one is in memory at a time.

    Args:
        call: the module, or a function that uses ``modules``.
        inputs: tensors, and other values.
        parts: (dimension, number): apply the module to that many parts of its inputs, which have one shape
            but for the last dimension and are treated independently along that dimension.
        modules: all modules whose parameters and buffers a function uses.
    """
    if not torch.is_grad_enabled():
        return call(*inputs)
    return _recompute([(call, (call,) if modules is None else modules)], parts, inputs)


Used = tuple[Callable[..., Tensor], Sequence[nn.Module]]  # a function and all modules that it uses


def recompute_each(trunk: Used, branches: Sequence[Used], *inputs) -> tuple[Tensor, ...]:
    """Apply several functions to one result and keep the inputs only.

    The backward pass computes that result again once, and then one function after the other: what only one of
    them needs is never in memory beside what another does.

    Args:
        trunk: of the inputs, which are tensors and other values.
        branches: of its result.

    Returns:
        what each branch returns.
    """
    if not torch.is_grad_enabled():
        x = trunk[0](*inputs)
        return tuple(branch(x) for branch, _ in branches)
    return _recompute([trunk, *branches], WHOLE, inputs)


# torch.compile cannot trace the nested graph of the backward pass: in training it breaks its graph here.
@torch.compiler.disable
def _recompute(functions: Sequence[Used], parts: Parts, inputs: Sequence):
    with first_calls(next(x for x in inputs if isinstance(x, Tensor)).device) as generators:
        records = [CallRecord(call, modules, generators) for call, modules in functions]
        parameters = dict.fromkeys(p for record in records for p in record.parameters)
        return _Recompute.apply(records, parts, list(parameters), len(inputs), *inputs, *parameters)


class _Recompute(torch.autograd.Function):
    """A trunk, in parts; or a trunk and the branches that are applied to its result."""

    @staticmethod
    def forward(ctx, records, parts: Parts, parameters, count: int, *inputs_and_parameters):
        inputs, (trunk, *branches) = inputs_and_parameters[:count], records
        ctx.records, ctx.parts, ctx.parameters = records, parts, parameters
        ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
        y = None
        for bounds in split(inputs, parts):
            result = trunk.first(*(part(x, parts[0], bounds) for x in inputs))
            if bounds.start is None:
                y = tuple(branch.first(result) for branch in branches) or result
                break
            if y is None:
                shape = list(result.shape)
                shape[parts[0]] = inputs[0].shape[parts[0]]
                y = result.new_empty(shape)
            part(y, parts[0], bounds).copy_(result)
        saved = (x for record in records for x in record.saved())
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if x is None else x for x in ctx.inputs]
        wanted = ctx.needs_input_grad[4 : 4 + len(inputs)]
        trunk, *branches = replays = [Replay(record, saved) for record in ctx.records]
        dim = ctx.parts[0]

        def gradient_of(y: Tensor, bounds: slice) -> Tensor:
            if not branches:
                return part(dys[0], dim, bounds).to(y.dtype)
            total = None
            for branch, dy in zip(branches, dys, strict=True):
                (dx,) = branch.gradients(0, [y], [True], lambda z, dy=dy: dy.to(z.dtype))
                if total is None or dx is None:
                    total = dx if total is None else total
                else:
                    total = total.add_(dx)
                del dx
            return torch.zeros_like(y) if total is None else total

        grads: list[Tensor | None] = [None] * len(inputs)
        for call, bounds in enumerate(split(inputs, ctx.parts)):
            found = trunk.gradients(
                call, [part(x, dim, bounds) for x in inputs], wanted, partial(gradient_of, bounds=bounds)
            )
            for i, dx in enumerate(found):
                if dx is None or bounds.start is None:
                    grads[i] = dx
                    continue
                if grads[i] is None:
                    grads[i] = torch.empty_like(inputs[i])
                part(grads[i], dim, bounds).copy_(dx)
        sums: dict[Tensor, Tensor | None] = dict.fromkeys(ctx.parameters)
        for replay in replays:
            replay.add_parameter_gradients(sums)
        return *[None] * 4, *grads, *sums.values()


@contextmanager
def first_calls(device: torch.device) -> Iterator[Generators]:
    """A context for first calls on a device.

    Autocast is without its cache of weights: copies made without gradients must not be found by others.

    Raises:
        RuntimeError: inside a transform of torch.func.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "torch.func transforms (grad, vjp, vmap, ...) cannot differentiate what is computed again in the "
            "backward pass; use activations='cached' (and transitions='cached') there"
        )
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield Generators(device)
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _bytes(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.nbytes)
