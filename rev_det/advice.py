"""What torch advises the authors of Detectron2, and no user of a command can act on."""

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
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("is_fx_tracing")
