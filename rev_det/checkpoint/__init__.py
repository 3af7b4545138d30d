"""Weights: the published files, our own checkpoints, and what is wrong with a file that is neither."""

from .checkpointer import RevCheckpointer
from .files import read_checkpoint
from .inspection import WeightsSummary, inspect_weights
from .layouts import convert_state_dict
from .loading import LoadResult, load_pretrained

__all__ = [
    "LoadResult",
    "RevCheckpointer",
    "WeightsSummary",
    "convert_state_dict",
    "inspect_weights",
    "load_pretrained",
    "read_checkpoint",
]
