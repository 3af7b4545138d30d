"""Automatic mixed precision: which type the device computes in, and what training in it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..devices import computes_in_bfloat16
from ..rules import check_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def check_precision(cfg: CfgNode) -> None:
    """Check ``SOLVER.AMP.DTYPE`` as far as that can be done without asking a GPU.

    What asks one initialises CUDA, which takes memory there, and does not belong into the process that only
    starts others.

    Raises:
        ValueError: the type is unknown, or the CPU does not have it.
    """
    check_config(cfg, "SOLVER.AMP.")
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "fp16" and on_cpu:
        raise ValueError(
            "SOLVER.AMP.DTYPE is 'fp16', which the CPU does not train in; "
            "set it to 'bf16', or SOLVER.AMP.ENABLED to False"
        )


@dataclass(frozen=True)
class Precision:
    """The arithmetic of training and inference.

    Attributes:
        device_type: "cuda" or "cpu".
        dtype: what autocast computes in; None for float32 without autocast.
    """

    device_type: str
    dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Precision:
        """Choose from ``SOLVER.AMP`` and ``MODEL.DEVICE``.

        Args:
            cfg: a config with rev_det's keys. ``SOLVER.AMP.DTYPE`` "auto" is bfloat16 where the device
                computes in it, else float16; on the CPU it is bfloat16.

        Raises:
            ValueError: the type is unknown, or the device does not have it.
        """
        check_precision(cfg)
        device, name = torch.device(cfg.MODEL.DEVICE), cfg.SOLVER.AMP.DTYPE
        if not cfg.SOLVER.AMP.ENABLED:
            return cls(device.type)
        has_bf16 = device.type == "cpu" or computes_in_bfloat16(device)
        if name == "bf16" and not has_bf16:
            raise ValueError(
                "SOLVER.AMP.DTYPE is 'bf16', which this GPU does not have; set it to 'fp16' or 'auto'"
            )
        return cls(device.type, torch.bfloat16 if has_bf16 and name != "fp16" else torch.float16)

    def autocast(self) -> torch.autocast:
        """A context in which the model runs in this precision; it does nothing in float32."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The loss scaler float16 gradients need; for other types a disabled one, which changes nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)

    def __str__(self) -> str:
        return f"{self.dtype or torch.float32} on {self.device_type}".replace("torch.", "")
