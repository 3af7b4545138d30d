"""Running a whole detector without its arithmetic: real tensors, real decisions, no large computation.

Fake tensors cannot run a detector: how many proposals survive depends on values. Here all tensors are real,
so every line of the detector runs, but the expensive operations return zeros instead of being computed.
Memory of such zeros is set aside by the operating system but not touched: the step takes neither the memory
nor the time of a real one, and a `Counter` sees the very storages that a real one makes.
"""

from __future__ import annotations

import mmap
from types import TracebackType

import torch
import torchvision  # noqa: F401  (registers its operations)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten, torchvision_ops = torch.ops.aten, torch.ops.torchvision

# Arithmetic that is never computed. Objectness, box deltas and class scores come out as zeros, which every
# decision of a detector can be made on: the anchors are then the proposals.
_PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten.convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.native_group_norm,
    aten.native_group_norm_backward,
    aten.gelu,
    aten.gelu_backward,
    torchvision_ops.roi_align,
    torchvision_ops._roi_align_backward,
}
# Not computed on large tensors either, but only inside the backbone and in the backward pass, where nothing
# is decided.
_ELEMENTWISE = {
    aten.add,
    aten.sub,
    aten.mul,
    aten.div,
    aten.addcmul,
    aten.neg,
    aten.relu,
    aten.threshold_backward,
    aten._softmax,
    aten._softmax_backward_data,
    aten._to_copy,
    aten.clone,
    aten.cat,
    aten.sum,
    aten.new_zeros,
    aten.zeros_like,
    aten.constant_pad_nd,
    aten.upsample_nearest2d,
    aten.upsample_nearest2d_backward,
}
_UPDATES = {aten._fused_adamw_, aten._fused_sgd_}
_IN_PLACE = {aten.add_, aten.mul_, aten.div_, aten.addcmul_, aten.copy_, aten.zero_, aten.fill_}
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
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
