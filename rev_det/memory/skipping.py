"""Running a whole detector without its arithmetic: real tensors, real decisions, no large computation.

Fake tensors cannot run a detector: how many proposals survive depends on values. Here all tensors are real,
so every line of the detector runs, but the expensive operations return zeros instead of being computed.
Memory of such zeros is set aside by the operating system but not touched: the step takes neither the memory
nor the time of a real one, and a `Counter` sees the very storages that a real one makes.
"""

from __future__ import annotations

import mmap

import torch
import torchvision  # noqa: F401  (registers its operations)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def _operators(names: str, library: str = "aten") -> set[torch._ops.OpOverloadPacket]:
    return {getattr(getattr(torch.ops, library), name) for name in names.split()}


# Arithmetic that is never computed. Objectness, box deltas and class scores come out as zeros, which every
# decision of a detector can be made on: the anchors are then the proposals.
_PRODUCTS = _operators(
    "mm addmm bmm baddbmm convolution convolution_backward _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward native_layer_norm native_layer_norm_backward "
    "native_group_norm native_group_norm_backward gelu gelu_backward"
) | _operators("roi_align _roi_align_backward", "torchvision")
# Not computed on large tensors either, but only inside the backbone and in the backward pass, where nothing
# is decided.
_ELEMENTWISE = _operators(
    "add sub mul div addcmul neg relu threshold_backward _softmax _softmax_backward_data _to_copy clone cat "
    "sum new_zeros zeros_like constant_pad_nd upsample_nearest2d upsample_nearest2d_backward"
)
_UPDATES = _operators("_fused_adamw_ _fused_sgd_")
_IN_PLACE = _operators("add_ mul_ div_ addcmul_ copy_ zero_ fill_")
_LARGE = 2**20  # values
_PAGES = 2**16  # bytes from which a tensor gets memory pages of its own


class SkipArithmetic(TorchDispatchMode):
    """Inside it the large arithmetic on CPU tensors is skipped; its results have the right form and are zero.

    What it does not know is computed as always, so any model runs.

    Args:
        backbone: the submodule in which nothing is decided by values.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self._depth = backbone, 0

    def __enter__(self) -> SkipArithmetic:
        self._hooks = [
            self.backbone.register_forward_pre_hook(lambda *_: self._shift(1)),
            self.backbone.register_forward_hook(lambda *_: self._shift(-1), always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in _PRODUCTS:
            return _zeros_of(func, args, kwargs)
        if packet in _UPDATES:
            return None
        if self._depth or torch._C._current_graph_task_id() != -1:
            if packet in _IN_PLACE and args[0].numel() >= _LARGE:
                return args[0]
            if packet in _ELEMENTWISE and _largest(args) >= _LARGE:
                return _zeros_of(func, args, kwargs)
        return func(*args, **kwargs)

    def _shift(self, step: int) -> None:
        self._depth += step


def _largest(args) -> int:
    return max((x.numel() for x in tree_leaves(args) if isinstance(x, Tensor)), default=0)


def _zeros_of(func, args, kwargs):
    """Zeros of the form that ``func(*args, **kwargs)`` has."""
    args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
    kwargs.pop("device", None)
    return tree_map_only(Tensor, _zeros_like, func(*args, **kwargs))


def _without_values(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _zeros_like(x: Tensor) -> Tensor:
    nbytes = x.untyped_storage().nbytes()
    if nbytes < _PAGES:
        return torch.zeros(nbytes, dtype=torch.uint8).view(x.dtype).as_strided(x.shape, x.stride())
    # A private mapping of its own is zero without being written, unlike memory that is used again.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=x.dtype).as_strided(x.shape, x.stride())
