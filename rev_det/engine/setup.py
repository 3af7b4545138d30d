"""From a command line to a complete config with checked values."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.engine import default_argument_parser

# Importing rev_det.modeling registers the backbones.
from .. import modeling  # noqa: F401
from ..config_files import read_config_file
from ..data import parse_dataset_argument, register_datasets, resolve_mask_format, resolve_num_classes
from ..devices import check_device
from ..rules import check_config
from .amp import check_precision
from .schedule import rescale_schedule

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

_EPILOG = """
examples:
  train on 8 GPUs:
    train_net.py --num-gpus 8 --config-file configs/COCO-Detection/mask_rcnn_rev_mvit_b_fpn_3x.yaml
  train on your own data in COCO's format, with keys of the config at the end:
    train_net.py --config-file CONFIG --dataset cats=train.json:images --dataset cats_val=val.json:images
        DATASETS.TRAIN "('cats',)" DATASETS.TEST "('cats_val',)" SOLVER.IMS_PER_BATCH 4
  evaluate:
    train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and ``--dataset``."""
    parser = default_argument_parser(epilog=_EPILOG)
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=JSON:IMAGES",
        help="register a dataset in COCO's format, for use in DATASETS.TRAIN and DATASETS.TEST (repeatable)",
    )
    # On one machine any free port will do: runs side by side must not meet.
    parser.set_defaults(dist_url="auto")
    return parser


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    datasets: Sequence[str] = (),
    num_gpus: int = 1,
    eval_only: bool = False,
) -> CfgNode:
    """Read a config, register its datasets and settle the keys that follow from them and from the machine.

    Args:
        config_file: a YAML file.
        opts: keys and values that override the file's, alternating.
        datasets: values of ``--dataset``, added to ``DATASETS.COCO_JSON``.
        num_gpus: processes on this machine, each with a GPU of its own unless ``MODEL.DEVICE`` is the CPU.
        eval_only: leave ``DATASETS.TRAIN`` alone: to evaluate, the training data need not be there.

    Returns:
        a frozen config with every dataset registered in this process.

    Raises:
        FileNotFoundError: the config, annotations or images do not exist.
        ValueError: a key does not exist, a value or a dataset is not valid, or there are too few GPUs.
    """
    if not config_file:
        raise ValueError(
            "--config-file is missing; the configs are below configs/, or name a model of the zoo"
        )
    cfg = read_config_file(config_file, opts)
    check_config(cfg, "INPUT.", "MODEL.", "TEST.", "DATASETS.PROPOSAL_FILES_TEST", "SOLVER.LR_SCALING")
    if not eval_only:
        check_config(cfg, "SOLVER.", "DATALOADER.", "DATASETS.")
    rescale_schedule(cfg, fixed=opts[::2])
    entries = [parse_dataset_argument(text) for text in datasets]
    for name, *_ in entries:
        # Without it a run would be one on other data.
        if name not in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            raise ValueError(
                f"--dataset '{name}' is in neither DATASETS.TRAIN nor DATASETS.TEST; "
                f"add DATASETS.{'TEST' if eval_only else 'TRAIN'} \"('{name}',)\""
            )
    cfg.DATASETS.COCO_JSON = [*cfg.DATASETS.COCO_JSON, *entries]
    train = cfg.DATASETS.TRAIN
    if eval_only:
        cfg.DATASETS.TRAIN = ()
    _settle_device(cfg, num_gpus)
    check_precision(cfg)
    register_datasets(cfg)
    resolve_num_classes(cfg)
    resolve_mask_format(cfg)
    cfg.DATASETS.TRAIN = train
    cfg.freeze()
    return cfg


def _settle_device(cfg: CfgNode, num_gpus: int) -> None:
    """Fall back on the CPU where there is no CUDA, unless several GPUs were asked for."""
    name, available = cfg.MODEL.DEVICE, torch.cuda.device_count()
    is_cuda = re.fullmatch(r"cuda(:\d+)?", name)
    if is_cuda and num_gpus > max(1, available):
        raise ValueError(
            f"--num-gpus is {num_gpus}, but this machine has {available} CUDA devices; "
            "with MODEL.DEVICE cpu it is the number of processes on the CPU"
        )
    if is_cuda and not available:
        logger.warning("MODEL.DEVICE is %r, but there is no CUDA device: using the CPU", name)
        cfg.MODEL.DEVICE = "cpu"
        return
    check_device("MODEL.DEVICE", name)
