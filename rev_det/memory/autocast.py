"""CUDA's rules of automatic mixed precision, for tensors on the CPU.

CUDA's autocast runs layer norms, softmax, losses, sums and more in float32, which the CPU's leaves in 16
bits. That makes a difference to memory and traffic. Which operators have a rule is asked of torch itself; the
rules are those of https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float16.

(Fake tensors on a CUDA device follow the rules by themselves, but their backward pass needs a driver.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# Those that compute in the 16-bit type: products. The CPU has its own kernels for most of them.
_SIXTEEN_BIT = set(
    "_convolution addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc "
    "conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum linalg_multi_dot linalg_vecdot "
    "linear matmul mm mv prelu scaled_dot_product_attention _scaled_dot_product_flash_attention".split()
)
# Those that compute in float32 if one of their arguments is of it, else in the 16-bit type.
_WIDEST = set(
    "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot".split()
)
# Left as they are: what is an error under CUDA's autocast, and what exists on CUDA alone.
_NO_RULE = set(
    "binary_cross_entropy cudnn_convolution cudnn_convolution_transpose gru_cell lstm_cell rnn_relu_cell "
    "rnn_tanh_cell _cudnn_rnn _thnn_fused_gru_cell _thnn_fused_lstm_cell".split()
)


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Inside it ``torch.autocast("cpu")`` follows CUDA's rules, in the whole process."""
    cuda, cpu = (set(_operators_with_a_rule(key)) for key in ("AutocastCUDA", "AutocastCPU"))
    with torch.library._scoped_library("aten", "IMPL", "AutocastCPU") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that are overridden
            for name in cpu - cuda:
                library.impl(name, torch.library.fallthrough_kernel)
            for name in cuda:
                rule = _rule(name)
                if rule is not None and not (rule is _in_sixteen_bits and name in cpu):
                    library.impl(name, partial(_without_autocast, rule, _operator(name)))
        yield


def _operators_with_a_rule(key: str) -> Iterator[str]:
    """Names in torch's own library; torchvision has the same rules for all devices."""
    for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
        library, _, operator = name.partition("::")
        if library == "aten":
            yield operator


def _rule(name: str) -> Callable | None:
    """What the operator computes in; float32 unless it is named above."""
    base = name.partition(".")[0]
    if base in _NO_RULE:
        return None
    if base in _SIXTEEN_BIT:
        return _in_sixteen_bits
    if base in _WIDEST:
        return _in_the_widest
    if base == "norm":
        return _norm_in_float32
    takes_dtype = any(argument.name == "dtype" for argument in _operator(name)._schema.arguments)
    return _into_float32 if takes_dtype else _in_float32


def _operator(name: str) -> torch._ops.OpOverload:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _without_autocast(rule: Callable, operator: torch._ops.OpOverload, *args, **kwargs) -> Any:
    """The kernel of an operator: autocast is off for what the operator itself calls."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return rule(operator, args, kwargs)


def _in_float32(operator, args, kwargs):
    return _cast(operator, args, kwargs, torch.float32)


def _in_sixteen_bits(operator, args, kwargs):
    return _cast(operator, args, kwargs, torch.get_autocast_dtype("cpu"))


def _in_the_widest(operator, args, kwargs):
    wide = any(_is_eligible(x) and x.dtype == torch.float32 for x in tree_leaves((args, kwargs)))
    return _cast(operator, args, kwargs, torch.float32 if wide else torch.get_autocast_dtype("cpu"))


def _into_float32(operator, args, kwargs):
    """With a result, and sums on the way to it, in float32, unless the caller chose a type."""
    if kwargs.get("dtype") is None and _is_eligible(args[0]):
        position = [argument.name for argument in operator._schema.arguments].index("dtype")
        if len(args) <= position:
            return operator(*args, **kwargs | {"dtype": torch.float32})
        if args[position] is None:
            args = (*args[:position], torch.float32, *args[position + 1 :])
    return operator(*args, **kwargs)


def _norm_in_float32(operator, args, kwargs):
    if not _is_eligible(args[0]):
        return operator(*args, **kwargs)
    norm, defaults = torch.ops.aten.norm, (2, None, False)[len(args) - 1 :]
    x, p, dim, keepdim = (*args, *defaults)
    if dim is None:
        return norm.ScalarOpt_dtype(x, p, dtype=torch.float32)
    return norm.ScalarOpt_dim_dtype(x, p, dim, keepdim, dtype=torch.float32)


def _cast(operator, args, kwargs, dtype: torch.dtype):
    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if _is_eligible(x) else x

    args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
    return operator(*args, **kwargs)


def _is_eligible(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
