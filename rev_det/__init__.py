"""Reversible vision transformers (Rev-ViT, Rev-MViT) as Detectron2 backbones.

Importing this package registers the backbones with Detectron2, if that is installed, and does nothing else.
"""

from . import modeling
from .config import add_rev_det_config
from .modeling import ReversibleSequence

__version__ = "0.1.0"
__all__ = ["ReversibleSequence", "__version__", "add_rev_det_config", "float32_boxes", "low_memory"]


def __getattr__(name: str):
    if name in ("float32_boxes", "low_memory"):  # need Detectron2
        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
