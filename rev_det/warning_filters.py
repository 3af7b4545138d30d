"""Keeps warnings out of a command's output that are for the authors of Detectron2, and not for its users."""

from __future__ import annotations

import logging
import warnings

from PIL import Image


def hide_advice() -> None:
    """Leave out of a command's output that Detectron2 uses what newer versions of torch advise against.

    For programs: it changes how the whole process warns.
    """
    for message in ("`torch.jit.script", "torch.meshgrid", "The given NumPy array is not writable"):
        warnings.filterwarnings("ignore", message)
    # Such images are an error here.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    tracing.addFilter(lambda record: not str(record.msg).startswith("is_fx_tracing"))
