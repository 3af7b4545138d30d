"""Peak memory, FLOPs, traffic and launches of a training step on a GPU, counted on any machine.

A `Counter` watches every operation: it adds the bytes of each new storage, takes them off when the storage
dies, and adds up what the operations cost. On fake tensors (shapes without values) this costs neither the
memory nor the time of the step, so `count_step` counts any size on any computer. (torch's own
``FlopCounterMode`` and ``MemTracker`` follow modules through the backward pass with hooks that fail inside
nested autograd graphs.)

The tensors are the CPU's, but autocast follows CUDA's rules, and the larger workspaces of CUDA's kernels are
added (`rev_det.memory.cost.workspace`). What the count does not see are those of cuBLAS and cuDNN, and what
the allocator loses by rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .autocast import cuda_rules
from .cost import Cost, Rates, operator_cost, workspace

GIB = 2**30
MIB = 2**20
DEVICE_RULES = ("cuda", "cpu")
# What an allocation is; weights, inputs and optimizer state exist before the step and are not in its peak.
WEIGHTS, OPTIMIZER, INPUTS = "weights", "optimizer state", "inputs"
GRADIENTS, OUTPUTS, KEPT, WORKING = "gradients", "outputs", "kept for backward", "working memory"
# Whose memory the last two are.
BACKBONE, REST = "backbone", "heads"
_BEFORE = (WEIGHTS, OPTIMIZER, INPUTS)
# Where the module of an operation is noted on its node of the autograd graph.
_MODULE = "rev_det.module"


@dataclass(slots=True)
class Allocation:
    """One storage.

    Attributes:
        nbytes: its size.
        operation, shape, dtype: of the tensor it was made for.
        module: name of the module whose forward or backward pass made it; "" for the model itself.
        phase: "forward", "backward" or "update".
        kind: what it is for, one of the names above.
        born, died: number of the operation that made it, and of the last one before it died (None: alive).
    """

    nbytes: int
    operation: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    phase: str
    kind: str
    born: int
    died: int | None = None

    def alive(self, time: int) -> bool:
        return self.born <= time and (self.died is None or self.died >= time)


@dataclass(frozen=True)
class StepCount:
    """What one training step needs.

    Attributes:
        peak: most bytes alive at once, without weights, inputs and optimizer state, with gradients.
        cost: FLOPs, bytes moved, launches and estimated seconds of the whole step.
        forward: the same of the forward pass alone.
        weights, optimizer_state, inputs: bytes that exist besides the peak.
        at_peak: the allocations alive at the peak, largest first.
        kept: bytes alive between forward and backward pass, outputs included.
        step: the allocation that made the peak.
    """

    peak: int
    cost: Cost
    forward: Cost
    weights: int
    optimizer_state: int
    inputs: int
    kept: int
    at_peak: tuple[Allocation, ...]
    step: Allocation

    @property
    def flops(self) -> int:
        """FLOPs of the whole step."""
        return self.cost.flops

    @property
    def total(self) -> int:
        """Bytes at the peak with everything that exists besides."""
        return self.peak + self.weights + self.optimizer_state + self.inputs

    def split(self, backbone: str | None = None) -> dict[str, int]:
        """Bytes of `total` but for the inputs, by what they are for and whose they are.

        Args:
            backbone: name of the submodule that is told apart from the rest; None if all is the backbone.
        """
        kinds = (KEPT, WORKING)
        sums = dict.fromkeys((GRADIENTS, OUTPUTS, *(f"{BACKBONE}: {kind}" for kind in kinds)), 0)
        if backbone is not None:
            sums |= dict.fromkeys((f"{REST}: {kind}" for kind in kinds), 0)
        for allocation in self.at_peak:
            name = allocation.kind
            if name in kinds:
                inside = backbone is None or f"{allocation.module}.".startswith(f"{backbone}.")
                name = f"{BACKBONE if inside else REST}: {name}"
            sums[name] += allocation.nbytes
        return {WEIGHTS: self.weights, OPTIMIZER: self.optimizer_state} | sums


class Counter(TorchDispatchMode):
    """Counts memory and cost of everything that runs inside it, on one thread.

    Works on real CPU tensors and on fake ones, with nested autograd graphs and recomputed modules.

    Args:
        model: the module whose parameters, buffers and submodules are told apart.
        optimizer: whose state exists before the step.
        inputs: tensors that exist before the step, besides.
        device_rules: "cuda" for autocast's rules and kernels' workspaces of CUDA, "cpu" for the CPU's.
        rates: for the estimate of time.

    Raises:
        ValueError: unknown ``device_rules``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        inputs: Iterable[Tensor] = (),
        device_rules: str = "cuda",
        rates: Rates | None = None,
    ):
        super().__init__()
        if device_rules not in DEVICE_RULES:
            raise ValueError(f"device_rules must be one of {', '.join(DEVICE_RULES)}; got {device_rules!r}")
        self.on_cuda, self.rates = device_rules == "cuda", rates or Rates()
        self._rules = cuda_rules() if self.on_cuda else nullcontext()
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.time = self.current = self.peak = self.peak_time = self.kept = self._forward_end = 0
        self.cost = self.forward = Cost()
        self.allocations: list[Allocation] = []
        self.live: dict[int, Allocation] = {}
        self._finalizers: dict[int, weakref.finalize] = {}
        self._stack: list[str] = []
        self._backward_seen = False
        for p in model.parameters():
            self._existing(p, WEIGHTS)
            if p.grad is not None:
                self._existing(p.grad, GRADIENTS)
        for buffer in model.buffers():
            self._existing(buffer, WEIGHTS)
        for tensor in _optimizer_tensors(optimizer):
            self._existing(tensor, OPTIMIZER)
        for tensor in inputs:
            self._existing(tensor, INPUTS)

    def __enter__(self) -> Counter:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            # Also called when the module raises: torch's checkpointing stops a recomputation that way.
            register_module_forward_hook(self._leave_module, with_kwargs=True, always_call=True),
        ]
        self._rules.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._rules.__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        # Python keeps finalizers, and through them this counter and the model, as long as the storages live.
        for finalizer in self._finalizers.values():
            finalizer.detach()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._backward_seen:
            self._backward_seen, self.kept, self._forward_end = True, self.current, self.time
        self.time += 1
        out = func(*_as_kernels_take(func, args), **kwargs)
        self.cost += operator_cost(func, args, kwargs, out, self.rates)
        if not self._backward_seen:
            self.forward = self.cost
        phase = "backward" if in_backward else "update" if self._backward_seen else "forward"
        kind = KEPT if phase == "forward" else WORKING
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.live:
                self._add(x, kind, str(func), phase)
        if self.on_cuda:
            self._add_workspace(workspace(func, args), str(func), phase)
        return out

    def outputs(self, tensors: Iterable[Tensor]) -> None:
        """Mark the results of the forward pass."""
        for x in tensors:
            self._mark(x, OUTPUTS)

    def result(self) -> StepCount:
        """What was counted; call it at the end of the step, before gradients are set to None."""
        for p in self.model.parameters():
            if p.grad is not None:
                self._mark(p.grad, GRADIENTS)
        for a in self.allocations:
            # What the forward pass itself let go of was not kept for the backward pass.
            if a.kind == KEPT and not a.alive(self._forward_end):
                a.kind = WORKING
        at_peak = [a for a in self.allocations if a.kind not in _BEFORE and a.alive(self.peak_time)]
        before = {
            kind: sum(a.nbytes for a in self.allocations if a.kind == kind and a.born == 0)
            for kind in _BEFORE
        }
        return StepCount(
            peak=self.peak,
            cost=self.cost,
            forward=self.forward,
            weights=before[WEIGHTS],
            optimizer_state=before[OPTIMIZER],
            inputs=before[INPUTS],
            kept=self.kept,
            at_peak=tuple(sorted(at_peak, key=lambda a: -a.nbytes)),
            step=max(at_peak, key=lambda a: a.born),
        )

    def _existing(self, x: Tensor, kind: str) -> None:
        if x.untyped_storage()._cdata not in self.live:
            self._add(x, kind, "", "forward")

    def _add(self, x: Tensor, kind: str, operation: str, phase: str) -> None:
        storage = x.untyped_storage()
        key, dtype = storage._cdata, str(x.dtype).removeprefix("torch.")
        self.live[key] = self._allocate(storage.nbytes(), operation, tuple(x.shape), dtype, phase, kind)
        self._finalizers[key] = weakref.finalize(storage, self._freed, key)
        self._finalizers[key].atexit = False

    def _add_workspace(self, nbytes: int, operation: str, phase: str) -> None:
        if nbytes:
            allocation = self._allocate(nbytes, f"{operation}, workspace", (nbytes,), "uint8", phase, WORKING)
            self._free(allocation)

    def _allocate(self, nbytes: int, *what) -> Allocation:
        operation, shape, dtype, phase, kind = what
        allocation = Allocation(nbytes, operation, shape, dtype, self._module(), phase, kind, self.time)
        self.allocations.append(allocation)
        if kind not in _BEFORE:
            self.current += nbytes
            if self.current > self.peak:
                self.peak, self.peak_time = self.current, self.time
        return allocation

    def _freed(self, key: int) -> None:
        del self._finalizers[key]
        self._free(self.live.pop(key))

    def _free(self, allocation: Allocation) -> None:
        allocation.died = self.time
        if allocation.kind not in _BEFORE:
            self.current -= allocation.nbytes

    def _mark(self, x: Tensor, kind: str) -> None:
        self.live[x.untyped_storage()._cdata].kind = kind

    def _module(self) -> str:
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        return "" if node is None else node.metadata.get(_MODULE, "")

    def _enter_module(self, module: nn.Module, args) -> None:
        self._stack.append(self.names.get(id(module), self._stack[-1] if self._stack else ""))

    def _leave_module(self, module: nn.Module, *args_and_result) -> None:
        """Note the module's name on the autograd nodes it made; its submodules have named theirs."""
        *args, result = args_and_result
        name = self._stack.pop()
        before = {x.grad_fn for x in _tensors(args)}
        nodes = [x.grad_fn for x in _tensors(result)]
        while nodes:
            node = nodes.pop()
            if node is None or node in before or _MODULE in node.metadata:
                continue
            node.metadata[_MODULE] = name
            nodes.extend(following for following, _ in node.next_functions)


def sum_of_means(outputs: Any) -> Tensor:
    """A loss for any model: the sum of the means of the tensors it returns."""
    return sum(y.mean() for y in _tensors(outputs))


def count_step(
    model: nn.Module,
    make_inputs: Callable[[], Any],
    loss: Callable[[Any], Tensor] = sum_of_means,
    dtype: torch.dtype | None = torch.bfloat16,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
    device_rules: str = "cuda",
    rates: Rates | None = None,
) -> StepCount:
    """Count the forward and backward pass of any model on fake tensors: no memory, no arithmetic.

    For instance ``count_step(resnet50(), lambda: torch.empty(8, 3, 224, 224)).peak``. A model that decides
    by values, as detectors do, needs real tensors: see `Counter` and `rev_det.memory.skipping`.

    Args:
        model: in the mode it is to be counted in. Its weights are replaced with fake tensors, so it is of no
            further use; it may have been built on the "meta" device.
        make_inputs: makes the inputs, on the CPU; a tuple is passed as several arguments.
        loss: makes a scalar of what the model returns.
        dtype: what autocast computes in; None for float32 without autocast.
        optimizer: made of the trainable parameters. Its state is counted; its step is not.
        device_rules, rates: see `Counter`.

    Returns:
        the count; the tensors that the model returned are its outputs.
    """
    with FakeTensorMode():
        _replace_with_fakes(model)
        inputs = make_inputs()
        with Counter(model, None, _tensors(inputs), device_rules, rates) as counter:
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
                counter.outputs(_tensors(outputs))
                value = loss(outputs)
            del outputs
            value.backward()
        count = counter.result()
        updater = optimizer([p for p in model.parameters() if p.requires_grad])
        updater.step()
        return replace(count, optimizer_state=sum(x.nbytes for x in _optimizer_tensors(updater)))


def _as_kernels_take(func, args):
    """The arguments, laid out so that the result of a fake operation has the strides of a kernel's."""
    if func is torch.ops.aten.native_layer_norm_backward.default and isinstance(args[0], FakeTensor):
        return (torch.empty_like(args[0], memory_format=torch.contiguous_format), *args[1:])
    return args


def _replace_with_fakes(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    return [] if optimizer is None else _tensors(list(optimizer.state.values()))


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
