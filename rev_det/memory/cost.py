"""What one operator costs a GPU: FLOPs, bytes moved, launches, and an estimate of its time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


@dataclass(frozen=True)
class Rates:
    """What is assumed of a device, by default of an H100.

    Attributes:
        bandwidth: bytes/s of main memory.
        depthwise_bandwidth: bytes/s of depthwise convolutions, which are taken to be bound by it.
        products: FLOP/s of matrix products and convolutions.
        attention: FLOP/s of fused attention.
        launch: seconds from one kernel to the next.
    """

    bandwidth: float = 2.5e12
    depthwise_bandwidth: float = 1.2e12
    products: float = 500e12
    attention: float = 350e12
    launch: float = 1.5e-6

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e12:g} TB/s, {self.depthwise_bandwidth / 1e12:g} in depthwise convolutions, "
            f"{self.products / 1e12:g} TFLOP/s in products, {self.attention / 1e12:g} in attention, and "
            f"{self.launch * 1e6:g} us for each launch"
        )


@dataclass(frozen=True)
class Cost:
    """What operators cost; costs of several add up.

    Attributes:
        flops: 2 for a multiplication and addition, of matrix products, convolutions and attention, as
            ``torch.utils.flop_counter`` counts.
        bytes_moved: every operand read and every result written once, in full, in main memory.
        launches: kernels; views and empty tensors need none.
        seconds: an estimate. An operator takes the longer of its arithmetic and its traffic, and the time of
            its launches; caches, and a host that does not keep up, are left out.
    """

    flops: int = 0
    bytes_moved: int = 0
    launches: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.launches + other.launches,
            self.seconds + other.seconds,
        )


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *args, out_val=None, **kwargs):
    return sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape)


# Older versions of torch know the CUDA kernels only.
_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    **flop_registry,
}
# Operators without a kernel, besides views and questions about a tensor (of the namespace "prim").
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_FREE |= {aten._unsafe_view}
# They write their first argument without reading it.
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
_ATTENTION_BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
}
# Kernels of the operators that have several, copies into other layouts aside.
_KERNELS = dict.fromkeys(_ATTENTION_BACKWARD, 3) | {
    aten.native_layer_norm_backward: 2,  # for the input and for the parameters
    aten.convolution_backward: 2,  # for the input and for the weight
}
_PROCESSORS, _THREADS = 132, 2048  # an H100's multiprocessors, and threads that each holds


def operator_cost(func: torch._ops.OpOverload, args, kwargs, out: Any, rates: Rates) -> Cost:
    """The cost of one call of an operator; nothing if it runs no kernel.

    Args:
        func, args, kwargs: the call.
        out: its result.
    """
    packet = func._overloadpacket
    if func.is_view or packet in _FREE or func.namespace == "prim":
        return Cost()
    # What is only written to is among the results.
    read = args[1:] if packet in _OVERWRITES else args
    named = {name: x for name, x in kwargs.items() if name not in _outputs(func)} if kwargs else kwargs
    tensors = [x for x in tree_leaves((read, named, out)) if isinstance(x, Tensor)]
    if not tensors:
        return Cost()
    formula = _FLOPS.get(packet)
    flops = formula(*args, **kwargs, out_val=out) if formula else 0
    traffic = sum(map(stored_bytes, tensors))
    name = packet.__name__
    if "convolution" in name and any(x.dim() == 4 and x.shape[1] == 1 for x in tensors):
        seconds = traffic / rates.depthwise_bandwidth
    else:
        rate = rates.attention if "attention" in name else rates.products
        seconds = max(flops / rate, traffic / rates.bandwidth)
    launches = _KERNELS.get(packet, 1) + len(_made_contiguous(packet, args))
    return Cost(flops, traffic, launches, seconds + launches * rates.launch)


@cache
def _outputs(func: torch._ops.OpOverload) -> set[str]:
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def stored_bytes(x: Tensor) -> int:
    """Bytes behind a tensor: expanded dimensions count once."""
    sizes = (n if stride else min(n, 1) for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.element_size() * math.prod(sizes)


def workspace(func: torch._ops.OpOverload, args) -> int:
    """Bytes that CUDA's kernels take for themselves while they run, where they are many and known exactly."""
    packet = func._overloadpacket
    if packet in _ATTENTION_BACKWARD:
        return _attention_workspace(args[1])
    if func is aten.sum.dim_IntList and args[0].is_contiguous():
        # Over the leading dimensions, as for the gradient of a bias.
        x, leading = args[0], len(args[1] or ())
        if 0 < leading < x.dim() and list(args[1]) == list(range(leading)):
            return _row_sum_workspace(math.prod(x.shape[:leading]), math.prod(x.shape[leading:]))
    return sum(x.nbytes for x in _made_contiguous(packet, args))


def _attention_workspace(q: Tensor) -> int:
    """Float32 sums of the backward pass.

    The flash kernel (PyTorch's ``mha_bwd``) has the queries' gradient and, for each query, the product of the
    result and its gradient, with length and width rounded up. The efficient kernel, which is for float32,
    makes that product value by value before it is summed.
    """
    batch, heads, length, width = q.shape
    if q.dtype in (torch.float16, torch.bfloat16):
        length, width = _multiple(length, 128), _multiple(width, 32 if width <= 128 else 64)
    return 4 * batch * heads * length * (width + 1)


def _row_sum_workspace(rows: int, columns: int) -> int:
    """Partial sums of all blocks that share a column, as PyTorch's ``Reduce.cuh`` lays them out."""
    if not rows * columns:
        return 0
    vector = math.gcd(columns, 4)
    threads = 512 // vector
    widest, highest = (_power_of_two(min(n, threads)) for n in (columns // vector, rows))
    height = min(highest, threads // min(widest, 32))
    width = min(widest, threads // height)
    values = -(-rows // height)  # for each thread
    if values < 256:
        return 0
    grid = -(-columns // (vector * width))
    resident = _PROCESSORS * (_THREADS // (width * height))  # blocks that the device runs at once
    blocks = max(min(-(-resident // grid), -(-values // 16)), -(-values // 256))
    return 4 * columns * blocks * width * vector if blocks > 1 and grid <= resident else 0


def _power_of_two(n: int) -> int:
    """The largest that is at most n."""
    return 1 << max(n.bit_length() - 1, 0)


def _made_contiguous(packet: torch._ops.OpOverloadPacket, args) -> list[Tensor]:
    """Arguments that a layer norm copies."""
    count = {aten.native_layer_norm: 1, aten.native_layer_norm_backward: 2}.get(packet, 0)
    return [x for x in args[:count] if not x.is_contiguous()]


def _multiple(n: int, of: int) -> int:
    """n, rounded up to a multiple."""
    return -(-n // of) * of
