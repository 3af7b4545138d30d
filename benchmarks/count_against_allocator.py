#!/usr/bin/env python
"""Peak memory as it is counted, beside what PyTorch's allocator hands out on a CUDA device.

    python benchmarks/count_against_allocator.py --json benchmarks/results/count_against_allocator.json

Backbones alone, and whole Mask R-CNN steps; 2 images, bfloat16. The device need not compute: where kernels
are stubs the allocator is the same. So that its step takes the turns of the counted one, what depends on
values (how many boxes survive, which regions are foreground) is recorded when it is counted, and repeated.
"""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torchvision
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rev_det.comparison.cases import Case, Counting, training_step
from rev_det.comparison.models import CACHED, CHECKPOINT, CHECKPOINT_KEPT, MODELS, REVERSIBLE, REVERSIBLE_KEPT
from rev_det.engine.model_config import read_config
from rev_det.files import check_output
from rev_det.memory import cost, counting
from rev_det.memory.counting import GIB
from rev_det.memory.table import (
    COUNTED,
    MEASURED,
    Figure,
    Row,
    describe_machine,
    print_rows,
    save_json,
)

TRAININGS = (CACHED, CHECKPOINT, CHECKPOINT_KEPT, REVERSIBLE, REVERSIBLE_KEPT)
BACKBONES = (("rev_mvit_b", (800, 1344)), ("rev_vit_b", (1024, 1024)))
DETECTORS = (
    ("mask_rcnn_rev_mvit_b_fpn_3x", (800, 1344)),
    ("mask_rcnn_rev_vit_b_fpn_3x", (1024, 1024)),
)
DEVICE = torch.device("cuda", 0)
WARM_UP = 2  # steps
aten = torch.ops.aten
# Where input, weight, bias (or its size), stride, padding, dilation and transposed stand in their arguments.
_CONVOLUTIONS = {aten.convolution: slice(0, 7), aten.convolution_backward: slice(1, 8)}
PRODUCT_WORKSPACE = 32 * 2**20  # of cuBLAS on Hopper
_DECIDING = (aten.nonzero.default, aten.repeat_interleave.Tensor, torch.ops.torchvision.nms.default)


class Decisions(TorchDispatchMode):
    """Records what depends on the values of tensors or, given a record, repeats it.

    Args:
        record: of another one, made on the same model and batch.
    """

    def __init__(self, record: list[tuple] | None = None):
        super().__init__()
        self.record: list[tuple] = []
        self.left = None if record is None else deque(record)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            # A mask selects as many values as it has ones: give their places instead.
            places = [self._places(index) for index in args[1]]
            return func(args[0], [x for some in places for x in some], *args[2:], **kwargs)
        is_number = func is aten._local_scalar_dense.default and not args[0].is_floating_point()
        if func in _DECIDING or is_number:
            return self._decide(args[0], lambda: func(*args, **kwargs))
        out = func(*args, **kwargs)
        if func is aten._to_copy.default and args[0].is_cuda and out.is_cpu:
            out.zero_()  # which polygon and which box it is does not matter, but there must be one
        return out

    def _places(self, index: Tensor | None) -> Iterator[Tensor | None]:
        if index is None or index.dtype != torch.bool:
            return iter((index,))
        return iter(self._decide(index, index.nonzero).unbind(1))

    def _decide(self, x: Tensor, compute):
        if self.left is None:
            self.record.append((tuple(x.shape), compute()))
            return self.record[-1][1]
        shape, result = self.left.popleft()
        if shape != tuple(x.shape):
            raise RuntimeError(
                f"the counted step decided on a tensor of {shape}, this one on {tuple(x.shape)}"
            )
        return result.to(x.device) if isinstance(result, Tensor) else result


@contextmanager
def convolutions_without_cudnn() -> Iterator[None]:
    """Count them as PyTorch's own kernels compute them.

    They copy what is not contiguous and, unless they are depthwise, unfold one image at a time for a product,
    which has a workspace of its own.
    """

    def workspace(func, args) -> int:
        if func._overloadpacket not in _CONVOLUTIONS:
            return cost.workspace(func, args)
        copied = sum(x.nbytes for x in args if isinstance(x, Tensor) and not x.is_contiguous())
        x, weight, *_, stride, _, _, transposed = args[_CONVOLUTIONS[func._overloadpacket]]
        if weight.shape[1] == 1:
            return copied
        positions = math.prod(x.shape[2:] if transposed else map(math.ceil, _over(x.shape[2:], stride)))
        unfolded = weight[0].numel() * positions * x.element_size()
        return copied + (0 if weight[0, 0].numel() == 1 else unfolded) + PRODUCT_WORKSPACE

    def arguments(func, args):
        if func._overloadpacket not in _CONVOLUTIONS:
            return laid_out(func, args)
        return [x.contiguous() if isinstance(x, Tensor) else x for x in args]

    laid_out = counting._as_kernels_take
    with mock.patch.multiple(counting, workspace=workspace, _as_kernels_take=arguments):
        yield


def _over(sizes, stride) -> Iterator[float]:
    return (n / s for n, s in zip(sizes, stride, strict=True))


def compare(case: Case) -> Row:
    """One case, counted and allocated."""
    is_whole, with_cudnn = case.model is None, torch.backends.cudnn.enabled
    decisions = Decisions()
    # On CUDA classes are kept apart by shifting their boxes; so they are here.
    shifted = mock.patch.object(
        torchvision.ops.boxes, "_batched_nms_vanilla", torchvision.ops.boxes._batched_nms_coordinate_trick
    )
    torch.manual_seed(0)
    convolutions = nullcontext() if with_cudnn else convolutions_without_cudnn()
    with shifted, convolutions, decisions if is_whole else nullcontext():
        counted = Counting().count(case)
    allocated = allocated_bytes(case, decisions.record)
    nbytes = counted.total if is_whole else counted.peak
    row = Row(case.labels)
    row.figures = {
        "counted": Figure(nbytes / GIB, "GiB", COUNTED),
        "allocated": Figure(allocated / GIB, "GiB", MEASURED),
        "counted / allocated": Figure(nbytes / allocated, "ratio", COUNTED),
    }
    if not with_cudnn:
        plain = Counting().count(case)
        nbytes = plain.total if is_whole else plain.peak
        row.figures["counted with cuDNN"] = Figure(nbytes / GIB, "GiB", COUNTED)
    return row


def allocated_bytes(case: Case, record: list[tuple]) -> int:
    """At the peak of a step on the device; of backbones, above what exists before it."""
    torch.manual_seed(0)
    gc.collect()  # the case before: its tensors die with it
    with Decisions(record) if case.model is None else nullcontext():
        step = training_step(case, str(DEVICE))
        step.settle()
        if case.model is not None:
            for _ in range(WARM_UP):
                step.run()
            step.release()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
    return torch.cuda.max_memory_allocated() - (0 if case.model is None else before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    check_output(args.json)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    models = [(MODELS[name].title, MODELS[name], size, None) for name, size in BACKBONES]
    models += [(name, None, size, read_config(name, [])) for name, size in DETECTORS]
    rows = [
        compare(Case(title, model, training, 2, size, "bf16", cfg=cfg))
        for title, model, size, cfg in models
        for training in TRAININGS
    ]
    content = {
        "title": "Counted and allocated",
        "command": shlex.join(["python", "benchmarks/count_against_allocator.py", *sys.argv[1:]]),
        "rows": rows,
        "machine": describe_machine(DEVICE) | {"cudnn": torch.backends.cudnn.enabled},
        "definitions": [
            "Backbones: peak above what exists before the step. Detectors: everything, weights and optimizer "
            "state included. Where cuDNN is off (see machine), convolutions are counted as PyTorch's own "
            "kernels compute them, with their copies and unfolded images."
        ],
    }
    print_rows(Console(width=None if Console().is_terminal else 160), content["title"], rows)
    if args.json:
        save_json(args.json, content)
    time.sleep(0.5)  # autograd's threads may still let go of the last step


if __name__ == "__main__":
    main()
