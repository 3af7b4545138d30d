"""From a command line to a complete, checked config: everything that can be wrong is found here."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import operator
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.engine import default_argument_parser
from detectron2.solver import build_lr_scheduler

# Importing rev_det.modeling registers the backbones.
from .. import modeling  # noqa: F401
from ..checkpoint import RevCheckpointer
from ..config_files import config_keys, default_config, read_config_file, unknown_key
from ..data import parse_dataset_argument, register_datasets, resolve_mask_format, resolve_num_classes
from ..devices import check_device
from .amp import check_precision
from .build import build_detector, explained
from .checks import (
    check_dataset_files,
    check_datasets_named,
    check_extents,
    check_images,
    check_output,
    check_pixels,
    check_processes,
    check_proposals,
    check_solver,
    check_training_data,
)
from .evaluation import check_test_augmentation
from .optimizer import build_gradient_clipper, build_optimizer
from .schedule import rescale_schedule, warn_of_long_warmup

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
    cfg = _read(config_file, opts)
    if not eval_only:
        check_solver(cfg)
    check_pixels(cfg)
    check_proposals(cfg)
    rescale_schedule(cfg, fixed=opts[::2])
    entries = [parse_dataset_argument(text) for text in datasets]
    check_datasets_named(cfg, [name for name, *_ in entries], eval_only)
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


def check_run(cfg: CfgNode, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Find what would stop a run, before anything is written.

    Builds the model once, on the CPU, loads its weights, and drops it. Of the images that `load_config` has
    registered it reads a few.

    Args:
        cfg: as `load_config` returns it.
        args: of `argument_parser`.

    Returns:
        path and reason of test images that an evaluation will leave out.

    Raises:
        FileNotFoundError: weights or a dataset do not exist.
        ValueError: a value is not allowed, a part cannot be built, weights do not fit, an image cannot be
            decoded, or arguments and config do not go together.
    """
    check_processes(cfg, args)
    check_output(cfg)
    check_dataset_files("DATASETS.TEST", cfg.DATASETS.TEST)
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ValueError("--eval-only: DATASETS.TEST is empty, there is nothing to evaluate on")
    if not args.eval_only:
        check_training_data(cfg)
    if args.eval_only and cfg.TEST.AUG.ENABLED:
        check_test_augmentation(cfg)
    with _silence():
        check_images(cfg, args.eval_only)
        _build_once(cfg, args)
    if not args.eval_only:
        warn_of_long_warmup(cfg)
    return check_extents(cfg, args.eval_only)


def _build_once(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Build the parts of a run that a config can get wrong, load its weights, and drop it all."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_detector(cfg)
    if not args.eval_only:
        with explained():
            build_lr_scheduler(cfg, build_optimizer(cfg, model))
            build_gradient_clipper(cfg)
    checkpointer = RevCheckpointer.of_run(cfg, model, evaluation=args.eval_only)
    if not (args.resume and checkpointer.has_checkpoint()):
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No log from what the run itself will do, and log, again."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _read(config_file: str, opts: Sequence[str]) -> CfgNode:
    if not config_file:
        raise ValueError(
            "--config-file is missing; the configs are below configs/, or name a model of the zoo"
        )
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"--config-file {config_file} does not exist")
    misplaced = [word for word in opts if word.startswith("--")]
    if misplaced:
        raise ValueError(
            f"{misplaced[0]} comes after the first KEY VALUE pair; options come before all of them"
        )
    defaults = default_config()
    known = set(config_keys(defaults))
    if len(opts) % 2:
        raise ValueError(_not_in_pairs(opts, known))
    for key in opts[::2]:
        if key not in known:
            raise ValueError(unknown_key(key, known))
    cfg = read_config_file(config_file)
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, text])
        except ValueError as error:
            raise ValueError(_wrong_type(cfg, key, text)) from error
    for key in known:
        # yacs lets None pass for any value; for a number, WEIGHT_DECAY_BIAS, it has a meaning.
        if _get(cfg, key) is None and not isinstance(_get(defaults, key), float | None):
            raise ValueError(_wrong_type(defaults, key, "None"))
    return cfg


def _wrong_type(cfg: CfgNode, key: str, text: str) -> str:
    value = _get(cfg, key)
    if isinstance(value, type(cfg)):
        return f"{key} holds other keys, such as {key}.{next(iter(value))}; set one of those"
    problem = f"{key} must be of type {type(value).__name__}, such as {value!r}; got {text!r}"
    if isinstance(value, tuple | list):
        return f'{problem}. On a command line, in quotes: {key} "{_as_sequence(value, text)!r}"'
    return problem


def _as_sequence(value: Sequence, text: str) -> Sequence:
    """What ``text``, which is no sequence, was probably meant to be; if nobody can tell, ``value``."""
    words = re.findall(r"[^\s,'\"()\[\]]+", text)
    with contextlib.suppress(ValueError):
        # Of values as a config has them: numbers where there are numbers.
        kind = type(value[0]) if value else str
        if words and text != "None" and kind in (int, float, str):
            return type(value)(map(kind, words))
    return value


def _not_in_pairs(opts: Sequence[str], known: set[str]) -> str:
    pairs = itertools.zip_longest(opts[::2], opts[1::2])
    key = next((key for key, value in pairs if key in known and (value is None or value in known)), None)
    if key:
        return f"{key} has no value: config keys and values must alternate"
    return f"config keys and values must alternate, but {len(opts)} words are given: {' '.join(opts)}"


def _get(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), cfg)


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
