"""What a model computes on a fixed input, in figures that two machines can compare."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from .classify import IMAGE_SIDE, Classifier

_SEED = 20220619
# float64 leaves machines some 1e-13 apart, so that a value next to a rounding boundary is most unlikely.
_CRC_STEP = 1e-3
_VALUES = 4
_DECIMALS = 5


def fixed_image() -> Tensor:
    """The input of all fingerprints: (1, 3, 224, 224), float64, uniform noise in [-2, 2).

    Made of a bit generator's integers, which every version of NumPy gives alike, by exact arithmetic.
    """
    bits = np.random.PCG64(_SEED).random_raw(3 * IMAGE_SIDE**2) >> np.uint64(11)  # 53, as doubles have
    unit = bits.astype(np.float64) * 2.0**-53
    return torch.from_numpy(4.0 * unit - 2.0).reshape(1, 3, IMAGE_SIDE, IMAGE_SIDE)


def take_fingerprints(classifier: Classifier) -> list[str]:
    """Fingerprints of every scale and, if the classifier's head is there, of the logits.

    Args:
        classifier: its weights are converted to float64 in place.

    Returns:
        as `fingerprint`, a line for each.
    """
    classifier.double().eval()
    with torch.inference_mode():
        outputs = dict(classifier.backbone(fixed_image()))
        if classifier.head is not None:
            outputs["logits"] = classifier.classify(outputs)
        return [fingerprint(name, output) for name, output in outputs.items()]


def fingerprint(name: str, tensor: Tensor) -> str:
    """The figures of a float64 tensor, in a line.

    Its shape, mean and standard deviation (of the population); some values, evenly spread in C order, the
    first one included; the CRC-32 of all values, rounded to thousandths, as little-endian 64-bit integers in
    C order.
    """
    flat = tensor.detach().reshape(-1)
    rounded = torch.round(flat / _CRC_STEP).to(torch.int64).cpu().numpy()
    crc = zlib.crc32(rounded.astype("<i8").tobytes())
    values = flat[:: max(1, len(flat) // _VALUES)][:_VALUES].tolist()
    return (
        f"{name} ({' x '.join(map(str, tensor.shape))}): mean {_decimal(flat.mean())}, "
        f"std {_decimal(flat.std(unbiased=False))}, values {' '.join(map(_decimal, values))}, crc {crc:08x}"
    )


def _decimal(value: float | Tensor) -> str:
    return f"{round(float(value), _DECIMALS) + 0.0:.{_DECIMALS}f}"  # the sum turns -0.0 into 0.0
