"""A config read for its detector alone: where it is trained, and on what, does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..model_zoo import find_config_file
from .setup import load_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def read_config(config_file: str, opts: Sequence[str], device: str = "cpu") -> CfgNode:
    """A detector's config without its datasets, which need not be on this machine, and its schedule.

    Args:
        config_file: a YAML file, ours or any of Detectron2's, or the name of a model in rev_det's zoo.
        opts: keys and values that override the file's, alternating.
        device: for ``MODEL.DEVICE``.

    Raises:
        FileNotFoundError, ValueError: see `rev_det.engine.load_config`.
    """
    no_data = ("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "DATASETS.COCO_JSON", "[]")
    # The CPU does not train in float16, but what is counted there can be meant for a GPU.
    # Nobody trains by this schedule: nothing needs to be said about rescaling it.
    no_schedule = ("SOLVER.REFERENCE_IMS_PER_BATCH", "0")
    settled = (*no_data, *no_schedule, "MODEL.DEVICE", device, "SOLVER.AMP.DTYPE", "auto")
    return load_config(find_config_file(config_file), [*opts, *settled])
