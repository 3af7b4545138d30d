"""What a model computes on a fixed input, in figures that two machines can compare."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checkpoint.named import NamedWeights
from .classify import IMAGE_SIDE, Classifier

_SEED = 20220619
# float64 leaves machines some 1e-13 apart, so that a value next to a rounding boundary is most unlikely.
_CRC_STEP = 1e-3
_VALUES = 4
_DECIMALS = 5


@dataclass(frozen=True)
class Fingerprint:
    """Figures of one output.

    Attributes:
        name: of the scale, or "logits".
        shape: of the whole tensor.
        mean, std: over all values (std of the population).
        values: some of them, evenly spread in C order, the first one included.
        crc: CRC-32 of all values, rounded to thousandths, as little-endian 64-bit integers in C order.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    values: tuple[float, ...]
    crc: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Fingerprint:
        """The figures of a float64 tensor."""
        flat = tensor.detach().reshape(-1)
        rounded = torch.round(flat / _CRC_STEP).to(torch.int64).cpu().numpy()
        return cls(
            name=name,
            shape=tuple(tensor.shape),
            mean=float(flat.mean()),
            std=float(flat.std(unbiased=False)),
            values=tuple(flat[:: max(1, len(flat) // _VALUES)][:_VALUES].tolist()),
            crc=zlib.crc32(rounded.astype("<i8").tobytes()),
        )

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        values = " ".join(map(_decimal, self.values))
        return (
            f"{self.name} ({shape}): mean {_decimal(self.mean)}, std {_decimal(self.std)}, "
            f"values {values}, crc {self.crc:08x}"
        )


def fixed_image() -> Tensor:
    """The input of all fingerprints: (1, 3, 224, 224), float64, uniform noise in [-2, 2).

    Made of a bit generator's integers, which every version of NumPy gives alike, by exact arithmetic.
    """
    integers = np.random.PCG64(_SEED).random_raw(3 * IMAGE_SIDE**2) >> np.uint64(
        11
    )  # 53 bits, as doubles have
    unit = integers.astype(np.float64) * 2.0**-53
    return torch.from_numpy(4.0 * unit - 2.0).reshape(1, 3, IMAGE_SIDE, IMAGE_SIDE)


def take_fingerprints(weights: NamedWeights) -> list[Fingerprint]:
    """Fingerprints of every scale and, if the classifier's head is there, of the logits.

    Args:
        weights: a loaded model; its weights are converted to float64 in place.
    """
    backbone = weights.backbone.double().eval()
    with torch.inference_mode():
        features: Mapping[str, Tensor] = backbone(fixed_image())
        found = [Fingerprint.of(name, feature) for name, feature in features.items()]
        if weights.head is not None:
            logits = Classifier(backbone, weights.head.double()).classify(features)
            found.append(Fingerprint.of("logits", logits))
    return found


def _decimal(value: float) -> str:
    return f"{round(value, _DECIMALS) + 0.0:.{_DECIMALS}f}"  # the sum turns -0.0 into 0.0
