"""The rule for the reference models' weights and images (tests/data/README.md), and their vectors."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def weight(key, shape):
    """One entry of an official state dict: normal numbers seeded by the key, scaled by its kind."""
    normal = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if "pos_embed" in key:
        values = 0.02 * normal
    elif len(shape) > 1:
        values = normal / math.sqrt(math.prod(shape[1:]))
    elif key.endswith(".weight"):
        values = 1.0 + 0.1 * normal
    else:
        values = 0.02 * normal
    return torch.from_numpy(values.astype(np.float32))


def image(shape, seed):
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(normal.astype(np.float32)).double()


class Vectors:
    """Sampled float64 tensors of one reference run: ``name|sample`` holds every ``name|stride``-th value."""

    def __init__(self, file, prefix=""):
        self.arrays = np.load(DATA / file)
        self.prefix = prefix

    def state(self):
        """The official state dict these vectors were computed with, in float64."""
        shapes = json.loads(str(self.arrays[f"{self.prefix}shapes"]))
        return {key: weight(key, shape).double() for key, shape in shapes.items()}

    def names(self, start=""):
        end = "|sample"
        keys = (k.removeprefix(self.prefix).removesuffix(end) for k in self.arrays if k.endswith(end))
        return [k for k in keys if f"{self.prefix}{k}{end}" in self.arrays and k.startswith(start)]

    def error(self, name, tensor):
        """Largest difference from the sampled values, over the largest sampled value."""
        expected = torch.from_numpy(self.arrays[f"{self.prefix}{name}|sample"]).double()
        actual = tensor.detach().double().reshape(-1)[:: int(self.arrays[f"{self.prefix}{name}|stride"])]
        assert actual.shape == expected.shape, f"{name}: {tuple(tensor.shape)}"
        return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))

    def largest(self, name):
        return float(np.abs(self.arrays[f"{self.prefix}{name}|sample"]).max())
