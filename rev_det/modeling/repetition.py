"""Calling a module a second time in the backward pass, exactly as it was called the first time.

A `CallRecord` makes the first call, without gradients, and notes what it depends on besides its inputs:
parameters and buffers, autocast, training flags, random generators, and the results of fused attention if
these are to be kept. A `Replay` repeats the call and differentiates it.

This module needs torch alone.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from .kept_attention import AttentionTape, KeptResult
from .unread import without_value

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
        """The states from before the last call, if it drew from them."""
        before, self.last = self.last, self.states()
        # Read from memory: a comparison of tensors would be seen by modes that watch or replace operators.
        drawn = any(_bytes(a) != _bytes(b) for a, b in zip(before, self.last, strict=True))
        return before if drawn else None


_swapping = threading.RLock()
Slot = tuple[dict, str, Tensor]  # a module's parameters or buffers, the name of one, and that one
# A function, all modules that it uses, and perhaps the last layer of it: one that nothing but sums and
# multipliers follow, whose value the repeated call does without.
Used = tuple[Callable[..., Tensor], Sequence[nn.Module]] | tuple[Callable, Sequence[nn.Module], nn.Module]


class CallRecord:
    """How some functions were called, each once or for several parts of an input in turn.

    Args:
        functions: modules, or functions of tensors and other values; called in this order.
        generators: of the device where they compute.
        keep_attention: keep what `kept_attention.attention` computes inside them (batch * tokens *
            (channels + heads) numbers for each) instead of computing it twice.

    Attributes:
        parameters: the tensors that the repeated calls will have gradients for, as the modules have them now.
    """

    def __init__(self, functions: Sequence[Used], generators: Generators, keep_attention: bool = False):
        self.functions = [call for call, *_ in functions]
        self.last_layers = [used[2] if len(used) > 2 else None for used in functions]
        self.generators, self.keep_attention = generators, keep_attention
        self.autocast: tuple[str, bool, torch.dtype] | None = None
        kind = generators.device.type
        if torch.amp.is_autocast_available(kind):
            self.autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.training: list[tuple[nn.Module, bool]] = []
        # Where each parameter and buffer is, so that the repeated calls find the same ones:
        # torch.func.functional_call, for instance, puts others there for one call.
        self.slots: list[Slot] = []
        self.read: list[Tensor] = []  # parameters, also frozen ones: changes to these are to be noticed
        self.parameters_of: list[list[Tensor]] = []  # of each function
        castable: list[Slot] = []
        # Tensors are told apart by their id: hashing one is a call of Python.
        parameters: dict[int, Tensor] = {}
        uncast: set[int] = set()
        seen: set[nn.Module] = set()
        with _swapping:  # or another thread's stand-ins would be taken for parameters
            for _, modules, *_ in functions:
                own: dict[int, Tensor] = {}
                for m in _submodules(modules):
                    slots = [(m._parameters, name, x) for name, x in m._parameters.items() if x is not None]
                    own |= {id(x): x for *_, x in slots if x.requires_grad}
                    if m in seen:
                        continue
                    seen.add(m)
                    self.training.append((m, m.training))
                    self.read += (x for *_, x in slots)
                    slots += [(m._buffers, name, x) for name, x in m._buffers.items() if x is not None]
                    self.slots += slots
                    if self._is_cast(m):
                        castable += (slot for slot in slots if slot[2].dtype is torch.float32)
                    else:
                        uncast |= {id(x) for *_, x in slots}
                self.parameters_of.append(list(own.values()))
                parameters |= own
        # Not what a module that reads float32 shares with them.
        self.castable = [slot for slot in castable if id(slot[2]) not in uncast]
        self.parameters = list(parameters.values())
        # What each call needs: the kernel and number of tensors of each attention that was kept, and the
        # generators' states before it, if it drew.
        self.calls: list[list[tuple[list, list[Tensor] | None]]] = [[] for _ in functions]
        self._kept: list[Tensor | None] = []
        self._copies: list[Tensor] | None = None  # of castable parameters, for the first calls

    def _is_cast(self, m: nn.Module) -> bool:
        """Whether autocast reads a module's parameters in its own type alone: its class itself says so."""
        lowered = self.autocast is not None and self.autocast[1]
        return lowered and "casts_parameters" in vars(type(m)) and not m._forward_pre_hooks

    def low_precision(self) -> dict[int, Tensor]:
        """Copies of the castable parameters in autocast's type, by one operation, under these' id."""
        originals = {id(x): x for *_, x in self.castable}
        if not originals:
            return originals
        return dict(zip(originals, _cast(list(originals.values()), self.autocast[2]), strict=True))

    def first(self, function: int, *inputs) -> Tensor:
        """Call the function of that number, without gradients."""
        call, kept = self.functions[function], ()
        if self._copies is None:
            copies = self.low_precision()
            self._copies = [copies[id(x)] for *_, x in self.castable]
        with _replaced(self.castable, self._copies):
            if self.keep_attention:
                result, kept = AttentionTape().record(call, *inputs)
            else:
                result = call(*inputs)
        self._kept += [x for result in kept if result for x in result.tensors]
        kept = [result and (result.kernel, len(result.tensors)) for result in kept]
        self.calls[function].append((kept, self.generators.states_if_drawn()))
        return result

    def saved(self) -> list[Tensor | None]:
        """What ``ctx.save_for_backward`` is to keep, besides inputs, for a `Replay` of the calls made.

        Parameters are among it, although they are not read: torch then notices if they were changed.
        """
        tensors, self._kept, self._copies = self._kept, [], None
        return [*self.read, *tensors]


class Replay:
    """The calls of a record, repeated in a backward pass.

    Args:
        record: of the calls.
        saved: over saved tensors, of which the record's are taken.
    """

    def __init__(self, record: CallRecord, saved: Iterator[Tensor | None]):
        self.record = record
        for _ in record.read:
            next(saved)
        self.results = [
            [
                [k and KeptResult(k[0], tuple(next(saved) for _ in range(k[1]))) for k in kept]
                for kept, _ in calls
            ]
            for calls in record.calls
        ]
        # Not the parameters themselves: hooks on these are for the gradients that leave the backward pass.
        copies = record.low_precision()
        copies |= {id(p): copies.get(id(p), p).detach().requires_grad_() for p in record.parameters}
        self.variables = [[copies[id(p)] for p in own] for own in record.parameters_of]
        self.values = [copies.get(id(x), x) for *_, x in record.slots]
        self.found: list[tuple[Tensor, Tensor]] = []  # parameters and gradients, of each call

    def gradients(
        self,
        function: int,
        number: int,
        inputs: Sequence,
        wanted: Sequence[bool],
        dy: Callable[[Tensor], Tensor],
    ) -> list[Tensor | None]:
        """Repeat a call and differentiate it.

        Args:
            function: its number in the record.
            number: of the call of that function.
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
        y = self._again(function, number, inputs)
        grad = dy(y.detach())
        parameters = self.record.parameters_of[function]
        variables = [x for x, want in zip(inputs, wanted, strict=True) if want]
        variables += self.variables[function]
        if not (y.requires_grad and variables):
            return [None] * len(inputs)
        y = get_gradient_edge(y)  # its value has been read
        found = torch.autograd.grad(y, variables, grad, allow_unused=True)
        # torch may hand out the gradient of the result itself, which is not ours to give away.
        found = iter([g.clone() if g is not None and torch._C._is_alias_of(g, grad) else g for g in found])
        result = [next(found) if want else None for want in wanted]
        self.found += [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
        return result

    def _again(self, function: int, number: int, inputs: Sequence) -> Tensor:
        """Repeat a call as it was made, with gradients."""
        record, kept = self.record, self.results[function][number]
        states = record.calls[function][number][1]
        now = None if states is None else record.generators.states()
        call = record.functions[function]
        if kept:
            call = partial(AttentionTape(kept).replay, call)
        with _replaced(record.slots, self.values), without_value(record.last_layers[function]):
            changed = [m for m, training in record.training if m.training != training]
            try:
                for m in changed:
                    m.training = not m.training
                if states is not None:
                    record.generators.set(states)
                with torch.enable_grad():
                    if record.autocast is None:
                        return call(*inputs)
                    kind, enabled, dtype = record.autocast
                    # Without the weight cache: it would keep low-precision copies of all weights alive.
                    with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                        return call(*inputs)
            finally:
                for m in changed:
                    m.training = not m.training
                if now is not None:
                    record.generators.set(now)

    def parameter_gradients(self) -> list[Tensor | None]:
        """The gradients of the record's ``parameters``, summed over all calls that were repeated."""
        low = [i for i, (p, g) in enumerate(self.found) if g.dtype != p.dtype]
        for i, g in zip(low, _cast([self.found[i][1] for i in low], torch.float32), strict=True):
            self.found[i] = self.found[i][0], g
        sums: dict[int, Tensor] = {}
        for p, g in self.found:
            sums[id(p)] = sums[id(p)] + g if id(p) in sums else g
        return [sums.get(id(p)) for p in self.record.parameters]


def _submodules(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """What ``modules()`` of all of them gives, each once."""
    found, waiting = set(), [*reversed(modules)]
    while waiting:
        m = waiting.pop()
        if m is not None and m not in found:
            found.add(m)
            yield m
            waiting += reversed(m._modules.values())


@contextmanager
def _replaced(slots: Sequence[Slot], values: Sequence[Tensor]) -> Iterator[None]:
    """A context in which modules have these values in their slots.

    One thread at a time: the modules are the caller's, who may use them in several. Parametrizations are
    computed in every call: a cached one has the graph of another call, or none.
    """
    with _swapping:
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        present = [tensors.get(name) for tensors, name, _ in slots]
        for (tensors, name, _), x in zip(slots, values, strict=True):
            tensors[name] = x
        try:
            yield
        finally:
            parametrize._cache_enabled = cached
            for (tensors, name, _), x in zip(slots, present, strict=True):
                tensors[name] = x


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another type, by one operation."""
    copies = [torch.empty_like(x, dtype=dtype, requires_grad=False) for x in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies


_TENSOR = object()


def without_tensors(values: Sequence) -> list:
    """What a function's context may keep of its arguments; the tensors among them are saved apart.

    Raises:
        ValueError: a tensor that requires a gradient is inside a list, tuple or dictionary.
    """
    for value in values:
        if isinstance(value, (list, tuple, dict)):
            if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(value)):
                raise ValueError(
                    f"a tensor inside a {type(value).__name__} would get no gradient from what is computed "
                    "again in the backward pass: pass it as an argument of its own"
                )
    return [_TENSOR if isinstance(x, Tensor) else x for x in values]


def with_tensors(values: Sequence, saved: Iterator[Tensor]) -> list:
    """The arguments again."""
    return [next(saved) if x is _TENSOR else x for x in values]


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
