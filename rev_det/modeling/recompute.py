"""Evaluating a module a second time in the backward pass, exactly as it was evaluated the first time.

`CallRecord` notes what a call depends on besides its inputs (autocast, random generators, training flags) and
what is too dear to compute twice (fused attention). `branch_forward` adds a module's result to a stream;
`branch_backward` repeats that, adds up the gradients and, if asked, takes the result off the stream again.
`recompute` is activation checkpointing for one module, built on the same.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

# The fused attention kernels that return all their backward pass needs (output and log-sum-exp).
FUSED_ATTENTION = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, name)
)

_gradient_only: ContextVar[bool] = ContextVar("gradient_only", default=False)


def keep_attention_policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """A policy for torch's selective checkpointing that keeps the results of fused attention only."""
    return CheckpointPolicy.MUST_SAVE if op in FUSED_ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class OutputLinear(nn.Linear):
    """The last linear layer of an F or G: its product is skipped where only gradients are wanted.

    Only sums with other tensors, constant multiples and dropout may follow it in its module: the gradients of
    these, and of a linear layer, need no output. Where a rebuild knows the value already
    (the first block of a run, a recomputed module) the layer returns a placeholder of the right shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        # torch.compile and torch.export of older torch cannot trace a context variable.
        if torch.compiler.is_compiling() or not _gradient_only.get():
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _UnreadLinear.apply(x, weight, bias)


class _UnreadLinear(torch.autograd.Function):
    """The gradients of ``x @ weight.T + bias`` without its value."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if needs_x else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None


class _AttentionTape(TorchFunctionMode):
    """Records the results of fused attention in a first call, and returns them in the calls that repeat it.

    Only ``scaled_dot_product_attention`` is watched at the level of torch functions, so everything else in
    the module runs without the cost of a dispatch mode.
    """

    def __init__(self, calls: list[list[tuple]], replay: bool):
        super().__init__()
        self.calls, self.replay, self.position = calls, replay, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if not self.replay:
            self.calls.append([])
        # One list for each call, so that a call that kept nothing leaves the others in step.
        results = self.calls[self.position]
        self.position += 1
        if kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0.0:
            return func(*args, **kwargs)  # it has to draw its random numbers in every call
        if self.replay:
            with _AttentionOps(results, replay=True):
                return func(*args, **kwargs)
        # The choice of kernel, and whether it returns the log-sum-exp, depends on whether gradients are
        # wanted: the first call must choose as the repeated one will.
        args = [_leaf(a) if i < 3 else a for i, a in enumerate(args)]
        kwargs = {key: _leaf(a) if key in ("query", "key", "value") else a for key, a in kwargs.items()}
        with torch.enable_grad(), _AttentionOps(results, replay=False):
            return func(*args, **kwargs).detach()


class _AttentionOps(TorchDispatchMode):
    def __init__(self, results: list[tuple], replay: bool):
        super().__init__()
        self.results, self.replay = results, replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in FUSED_ATTENTION and self.replay:
            # Another kernel can be chosen, where nothing wants a gradient any more for instance.
            for recorded, *result in self.results:
                if recorded is func:
                    return _detached(result)
        result = func(*args, **(kwargs or {}))
        if func in FUSED_ATTENTION and not self.replay:
            self.results.append((func, *_detached(result)))
        return result


class CallRecord:
    """How one module call was made, so that `again` repeats it with the same result.

    Kept: the autocast state, ``training`` of every submodule, the generator states if the call drew random
    numbers (the call is repeated with them, and the global generators are left as they were), and the
    fused-attention results if asked for. While a CUDA graph is captured the device's generator can be neither
    read nor set: the call must not draw from it then.

    Args:
        device: where the call computes.
        keep_attention: keep outputs and log-sum-exps of fused attention (batch * tokens * (channels + heads)
            numbers for each attention) instead of computing them twice.
    """

    def __init__(self, device: torch.device, keep_attention: bool = False):
        self.device = device
        self.keep_attention = keep_attention
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
            if torch.amp.is_autocast_available(kind)
        ]
        self.generators: list[Tensor] | None = None
        self.training: list[bool] = []  # of each submodule
        self.attention: list[list[tuple]] = []  # for each call, the results of its kernel

    def first(self, module: nn.Module, *inputs) -> Tensor:
        """Call the module without gradients and note what a repetition needs."""
        self.training = [m.training for m in module.modules()]
        watch_generators = not any(isinstance(x, FakeTensor) for x in inputs)
        before = self._generator_states() if watch_generators else []
        with ExitStack() as stack:
            self._enter_autocast(stack)
            if self.keep_attention:
                stack.enter_context(_AttentionTape(self.attention, replay=False))
            result = module(*inputs)
        after = self._generator_states() if watch_generators else []
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            self.generators = before
        return result

    def again(self, module: nn.Module, *inputs, gradient_only: bool = False) -> Tensor:
        """Repeat the call with gradients; with ``gradient_only`` the returned values must not be read."""
        with ExitStack() as stack:
            self._enter_autocast(stack)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_training_flags(module, self.training))
            if self.generators is not None:
                stack.callback(self._set_generators, self._generator_states())
                self._set_generators(self.generators)
            if self.keep_attention:
                stack.enter_context(_AttentionTape(self.attention, replay=True))
            if gradient_only:
                stack.enter_context(_set(_gradient_only, True))
            return module(*inputs)

    def _enter_autocast(self, stack: ExitStack) -> None:
        # Without the weight cache: it would keep low-precision copies of all weights alive, and copies made
        # without gradients must not be found by a call that wants them.
        for kind, enabled, dtype in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))

    def _generator_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.device.type not in ("cpu", "meta") and not capturing:
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set_generators(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self.device).set_rng_state(state, self.device)


class ParameterGradients:
    """Sums of parameter gradients, in the order of the given parameters (which may be shared by modules)."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.index = {p: i for i, p in enumerate(parameters)}
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, parameter: nn.Parameter, grad: Tensor | None) -> None:
        i = self.index[parameter]
        if grad is not None:
            self.sums[i] = grad if self.sums[i] is None else self.sums[i].add_(grad)


@dataclass
class Branch:
    """One application of an F or G, in one part or several, as its backward pass needs it."""

    module: nn.Module
    dim: int  # along which the parts lie
    parts: list[tuple[int, int]]  # start and length of each
    records: list[CallRecord] = field(default_factory=list)  # of each
    # The module's trainable ones when it was called.
    parameters: list[nn.Parameter] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module, dim: int, size: int, chunks: int) -> Branch:
        """For at most ``chunks`` equal parts of ``size`` positions; the last may be shorter."""
        length = max(1, -(-size // chunks))
        parts = [(start, min(length, size - start)) for start in range(0, max(1, size), length)]
        return cls(module, dim, parts, parameters=[p for p in module.parameters() if p.requires_grad])

    def part(self, x: Tensor | None, i: int) -> Tensor | None:
        """Part i of a tensor that has the branch's dimension (or size 1 there)."""
        whole = x is None or len(self.parts) == 1 or x.shape[self.dim] == 1
        return x if whole else x.narrow(self.dim, *self.parts[i])


def branch_forward(
    module: nn.Module,
    inputs: Sequence,
    add_to: Tensor,
    mask: Tensor | None = None,
    keep_attention: bool = False,
    dim: int = 0,
    chunks: int = 1,
) -> Branch:
    """``add_to += mask * module(*inputs)`` without gradients, in parts, and the record of it.

    Args:
        inputs: with ``chunks`` > 1, tensors among them are split like the result.
        add_to: of the result's shape, modified in place.
        mask: multiplier of the result, broadcast against it.
        keep_attention: see `CallRecord`.
        dim: dimension along which the module treats positions independently.
        chunks: number of parts along it; the working memory is that of one.
    """
    branch = Branch.of(module, dim, add_to.shape[dim], chunks)
    for i in range(len(branch.parts)):
        record = CallRecord(add_to.device, keep_attention)
        y = record.first(module, *(branch.part(x, i) if isinstance(x, Tensor) else x for x in inputs))
        target = branch.part(add_to, i)
        if y.shape != target.shape:
            raise ValueError(
                f"a branch must keep the shape of its input, but {type(module).__name__} made "
                f"{tuple(y.shape)} of {tuple(target.shape)}"
            )
        add_(target, y, branch.part(mask, i))
        branch.records.append(record)
    return branch


def branch_backward(
    branch: Branch,
    inputs: Sequence,
    grad: Tensor,
    parameter_grads: ParameterGradients,
    input_grads: Sequence[Tensor | None],
    mask: Tensor | None = None,
    subtract_from: Tensor | None = None,
) -> None:
    """Repeat ``y = mask * module(*inputs)`` in the same parts and add its gradients to the given sums.

    Args:
        inputs: as in the first call; not modified.
        grad: gradient of y, of y's shape.
        parameter_grads: receives the gradients of the module's trainable parameters.
        input_grads: one tensor for each input, to which its gradient is added in place, or None.
        mask: as in the first call.
        subtract_from: if given, y is subtracted from it in place (this is the inversion); if not, the value
            of y is not needed and the product of a final `OutputLinear` is skipped (unless forward hooks,
            which may do anything with it, are there).
    """
    module = branch.module
    hooked = any(m._forward_hooks for m in module.modules())
    present = set(module.parameters())
    if not present.issuperset(branch.parameters):
        raise RuntimeError(
            f"parameters of {type(module).__name__} were replaced between forward and backward (by "
            "torch.func.functional_call, for instance); use activations='cached' there"
        )
    parameters = [p for p in branch.parameters if p.requires_grad]
    for i, record in enumerate(branch.records):
        leaves = [
            branch.part(x, i).detach().requires_grad_(sums is not None) if isinstance(x, Tensor) else x
            for x, sums in zip(inputs, input_grads, strict=True)
        ]
        y = record.again(module, *leaves, gradient_only=subtract_from is None and not hooked)
        if subtract_from is not None:
            add_(branch.part(subtract_from, i), y.detach(), branch.part(mask, i), sign=-1)
        dy = branch.part(grad, i)
        dy = (dy if mask is None else dy * branch.part(mask, i)).to(y.dtype)
        wanted = [(x, branch.part(s, i)) for x, s in zip(leaves, input_grads, strict=True) if s is not None]
        targets = [x for x, _ in wanted] + parameters
        if not (targets and y.requires_grad):
            continue
        grads = torch.autograd.grad(y, targets, dy, allow_unused=True)
        # torch may hand out dy itself, or one tensor for several: sums need memory of their own.
        taken = {dy.untyped_storage()._cdata}
        del y, dy
        for (_, sums), dx in zip(wanted, grads, strict=False):
            if dx is not None:
                sums.add_(dx)
        for p, dp in zip(parameters, grads[len(wanted) :], strict=True):
            if dp is not None and (dp.untyped_storage()._cdata in taken or 0 in dp.stride()):
                dp = dp.clone(memory_format=torch.contiguous_format)
            if dp is not None:
                taken.add(dp.untyped_storage()._cdata)
            parameter_grads.add(p, dp)


def add_(x: Tensor, y: Tensor, mask: Tensor | None, sign: int = 1) -> Tensor:
    """``x += sign * mask * y`` in the precision of x."""
    return x.add_(y, alpha=sign) if mask is None else x.addcmul_(y, mask, value=sign)


def token_chunks(module: nn.Module, x: Tensor) -> int:
    """The parts along dimension 1 that a module asks for on x; 1 if it has no say in it."""
    return module.token_chunks(x) if hasattr(module, "token_chunks") else 1


def sample_chunks(module: nn.Module, x: Tensor) -> int:
    """The parts along dimension 0 that a module asks for on x; 1 if it has no say in it."""
    return module.sample_chunks(x) if hasattr(module, "sample_chunks") else 1


def recompute(module: nn.Module, *inputs: Tensor, chunks: int = 1) -> Tensor:
    """Apply a module and keep its inputs only; the backward pass computes the rest again.

    Unlike ``torch.utils.checkpoint`` it can do so in parts, and it does not repeat the product of a final
    `OutputLinear`.

    Args:
        inputs: tensors; with ``chunks`` > 1 all of shape (B, N, ...), treated independently along N.
        chunks: number of parts, along dimension 1, in which to compute; the working memory is that of one.
    """
    return _recompute(module, inputs, chunks) if torch.is_grad_enabled() else module(*inputs)


# torch.compile cannot trace the nested graph of the backward pass: in training it breaks its graph here.
@torch.compiler.disable
def _recompute(module: nn.Module, inputs: Sequence[Tensor], chunks: int) -> Tensor:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return _Recompute.apply(module, chunks, len(inputs), *inputs, *parameters)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, chunks, num_inputs, *tensors):
        inputs = tensors[:num_inputs]
        ctx.num_inputs = num_inputs
        # Saved parameters are not read, but torch then notices if they were changed in between.
        ctx.save_for_backward(*tensors)
        ctx.branch = branch = Branch.of(module, 1, inputs[0].shape[1], chunks)
        y = None
        for i, (start, length) in enumerate(branch.parts):
            branch.records.append(CallRecord(inputs[0].device))
            part = branch.records[i].first(module, *(branch.part(x, i) for x in inputs))
            if len(branch.parts) == 1:
                return part
            if y is None:
                y = part.new_empty(part.shape[0], inputs[0].shape[1], *part.shape[2:])
            y.narrow(1, start, length).copy_(part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        inputs = ctx.saved_tensors[: ctx.num_inputs]
        wanted = ctx.needs_input_grad[3 : 3 + ctx.num_inputs]
        input_grads = [torch.zeros_like(x) if w else None for x, w in zip(inputs, wanted, strict=True)]
        # Not the saved ones: what hooks on saved tensors return are not the parameters themselves.
        sums = ParameterGradients(ctx.branch.parameters)
        branch_backward(ctx.branch, inputs, dy, sums, input_grads)
        return None, None, None, *input_grads, *sums.sums


def _leaf(x):
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _detached(result: Sequence) -> tuple:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in result)


@contextmanager
def _training_flags(module: nn.Module, flags: Sequence[bool]) -> Iterator[None]:
    """Give the submodules these values of ``training`` for a while."""
    changed = [m for m, flag in zip(module.modules(), flags, strict=True) if m.training != flag]
    for m in changed:
        m.training = not m.training
    try:
        yield
    finally:
        for m in changed:
            m.training = not m.training


@contextmanager
def _set(variable: ContextVar, value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
