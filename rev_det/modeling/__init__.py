"""The reversible core and, where Detectron2 works, the registered backbones."""

import warnings
from importlib.util import find_spec

from .reversible import ReversibleSequence

__all__ = ["ReversibleSequence", "RevMViT", "RevViT"]

_OBSTACLE, _CAUSE = "", None
if find_spec("detectron2") is None:
    _OBSTACLE = (
        "which is not installed. In a checkout of rev_det `make setup` installs it; elsewhere see "
        "https://detectron2.readthedocs.io/tutorials/install.html"
    )
else:
    # A Detectron2 that is there but broken may raise anything. `rev-det doctor`, which says what to do about
    # it, imports this package, too.
    try:
        with warnings.catch_warnings():
            # Importing Detectron2 uses what newer versions of torch advise against: not for users to mend.
            warnings.filterwarnings("ignore", "`torch.jit.script")
            from . import baselines, build
            from .float32 import float32_boxes
            from .low_memory_forms import low_memory
            from .rev_mvit import RevMViT
            from .rev_vit import RevViT

        __all__ += ["baselines", "build", "float32_boxes", "low_memory"]
    except Exception as error:
        _CAUSE = error
        _OBSTACLE = f"which cannot be imported ({type(error).__name__}: {error}); run `rev-det doctor`"


def __getattr__(name: str):
    if _OBSTACLE and name in ("RevMViT", "RevViT", "baselines", "build", "float32_boxes", "low_memory"):
        raise ImportError(f"rev_det.modeling.{name} needs Detectron2, {_OBSTACLE}") from _CAUSE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
