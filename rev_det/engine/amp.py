"""Automatic mixed precision: which type the device computes in, and what training in it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_DTYPES = ("auto", "bf16", "fp16")


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
        device_type = torch.device(cfg.MODEL.DEVICE).type
        name = cfg.SOLVER.AMP.DTYPE
        if name not in _DTYPES:
            raise ValueError(f"SOLVER.AMP.DTYPE is {name!r}; allowed are {', '.join(map(repr, _DTYPES))}")
        if not cfg.SOLVER.AMP.ENABLED:
            return cls(device_type)
        # Older GPUs emulate bfloat16, at a fraction of the speed of float16.
        has_bf16 = device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "fp16" and device_type == "cpu":
            raise ValueError(
                "SOLVER.AMP.DTYPE is 'fp16', which the CPU does not train in; "
                "set it to 'bf16', or SOLVER.AMP.ENABLED to False"
            )
        if name == "bf16" and not has_bf16:
            raise ValueError(
                "SOLVER.AMP.DTYPE is 'bf16', which this GPU does not have; set it to 'fp16' or 'auto'"
            )
        use_bf16 = name == "bf16" or (name == "auto" and has_bf16)
        return cls(device_type, torch.bfloat16 if use_bf16 else torch.float16)

    def autocast(self) -> torch.autocast:
        """A context in which the model runs in this precision; it does nothing in float32."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The loss scaler float16 gradients need; for other types a disabled one, which changes nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)

    def __str__(self) -> str:
        return f"{self.dtype or torch.float32} on {self.device_type}".replace("torch.", "")
