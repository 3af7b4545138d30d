"""Where a run computes, and what torch is told of it while the run lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def check_device(option: str, name: str | None = None) -> str:
    """Require a device of this machine. CUDA is not initialised.

    Args:
        option: who named it, for the message.
        name: "cpu", "cuda" or "cuda:N"; None for a GPU if there is one, else the CPU.

    Returns:
        the name.

    Raises:
        ValueError: there is no such device.
    """
    gpus = torch.cuda.device_count()
    devices = ["cuda", *(f"cuda:{i}" for i in range(gpus))] if gpus else []
    devices.append("cpu")
    if name is None:
        return devices[0]
    if name not in devices:
        raise ValueError(f"{option} is {name!r}; allowed on this machine are {', '.join(devices)}")
    return name


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device does. Older GPUs emulate it, at a fraction of the speed of float16."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def device_settings(cfg: CfgNode) -> Iterator[None]:
    """What a run sets in torch for all of the process: the current CUDA device, and the kernels of attention.

    A loop of one's own goes inside, forward and backward passes both: activations must be rebuilt with the
    kernels that made them. Afterwards all is as it was.

    Args:
        cfg: a config with rev_det's keys, of which ``MODEL.DEVICE`` and ``MODEL.REV.CUDNN_ATTENTION`` count.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        with cudnn_attention(cfg.MODEL.REV.CUDNN_ATTENTION):
            yield


@contextlib.contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Let torch take cuDNN's attention, or not.

    It is torch's first choice on an H100, and makes a plan for every new shape, in tens of milliseconds.
    Training on images of many sizes has hundreds of shapes. Flash attention, the next choice, plans nothing.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: an error of Python, of torch, or of a library it calls."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
