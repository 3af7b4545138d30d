"""What a command line and its files can get wrong in a run, found before anything is written."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.data import MetadataCatalog
from detectron2.solver import build_lr_scheduler
from torch import nn

from ..data import RevDatasetMapper
from ..data.coco import registered_summary
from ..data.images import unusable_images
from ..data.loader import sizes_of_tests
from .build import build_detector, explained
from .evaluation import check_test_augmentation
from .optimizer import build_gradient_clipper, build_optimizer
from .schedule import warn_of_long_warmup

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def check_run(cfg: CfgNode, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Find what would stop a run, before anything is written.

    Builds the model once without values, and reads a few of the images that ``load_config`` has registered.
    Weights are loaded by the run itself, which writes nothing before.

    Args:
        cfg: as ``load_config`` returns it.
        args: of ``argument_parser``.

    Returns:
        path and reason of test images that an evaluation will leave out.

    Raises:
        FileNotFoundError: a dataset does not exist.
        ValueError: a part cannot be built, an image cannot be decoded, or arguments and config do not go
            together.
    """
    _check_processes(cfg, args)
    _check_output(cfg)
    _check_files("DATASETS.TEST", cfg.DATASETS.TEST)
    if not args.eval_only:
        _check_training_data(cfg)
    elif not cfg.DATASETS.TEST:
        raise ValueError("--eval-only: DATASETS.TEST is empty, there is nothing to evaluate on")
    elif cfg.TEST.AUG.ENABLED:
        check_test_augmentation(cfg)
    with _silence():
        _check_images(cfg, args.eval_only)
        model = _build_without_values(cfg)
        if not args.eval_only:
            with explained():
                build_lr_scheduler(cfg, build_optimizer(cfg, model))
                build_gradient_clipper(cfg)
    if not args.eval_only:
        warn_of_long_warmup(cfg)
    return _check_extents(cfg, args.eval_only)


def _check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check how many processes there are, where, and that they can share a batch."""
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: both must be at least 1 "
            "(MODEL.DEVICE cpu trains without a GPU)"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(f"--machine-rank {args.machine_rank} must be from 0 to {args.num_machines - 1}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            "--num-machines above 1 needs --dist-url, the same on all: tcp://ADDRESS_OF_MACHINE_0:PORT"
        )
    processes, accumulate = args.num_gpus * args.num_machines, cfg.SOLVER.ACCUMULATE
    if processes > 1 and cfg.MODEL.DEVICE.startswith("cuda:"):
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, a single device, but there are {processes} processes, "
            "each with a GPU of its own; set it to 'cuda', and CUDA_VISIBLE_DEVICES to the GPUs to take"
        )
    # Each process adds its number; NumPy's seeds have 32 bits.
    if cfg.SEED > 2**32 - processes:
        raise ValueError(f"SEED is {cfg.SEED}; it must be at most {2**32 - processes} (negative: at random)")
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % (processes * accumulate):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes with "
            f"SOLVER.ACCUMULATE {accumulate} cannot share equally; set it to a multiple of "
            f"{processes * accumulate}"
        )


def _check_output(cfg: CfgNode) -> None:
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is empty; name a folder, which will be made")
    try:
        cfg.OUTPUT_DIR.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}: tensorboard writes only to folders whose names are UTF-8"
        ) from None
    # The folders that are missing will be made in it.
    there = os.path.abspath(cfg.OUTPUT_DIR)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR}, but {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR}: there is no permission to write to {there}")


def _check_training_data(cfg: CfgNode) -> None:
    names = cfg.DATASETS.TRAIN
    if not names:
        raise ValueError("DATASETS.TRAIN is empty, there is nothing to train on")
    _check_files("DATASETS.TRAIN", names)
    summaries = [registered_summary(name) for name in names]
    if all(summary and summary.num_instances == summary.num_crowds for summary in summaries):
        raise ValueError(
            f"DATASETS.TRAIN is {tuple(names)}, where all {sum(s.num_instances for s in summaries)} "
            "annotations are crowd regions ('iscrowd' is 1), which are not trained on; annotate objects"
        )


def _check_files(key: str, names: Sequence[str]) -> None:
    """Check that files exist: all that is looked at of Detectron2's own datasets before they are used."""
    for name in names:
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path and "://" not in path and not os.path.exists(path):
                raise FileNotFoundError(
                    f"{key}: {path} of dataset '{name}' does not exist; "
                    "DETECTRON2_DATASETS names the folder that holds Detectron2's datasets"
                )


def _check_images(cfg: CfgNode, eval_only: bool) -> None:
    """Check that images can be read as ``INPUT`` says, by a few of each dataset."""
    with explained():
        mapper = RevDatasetMapper(cfg, is_train=not eval_only)
    for name in dict.fromkeys([*([] if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]):
        summary = registered_summary(name)
        for record in summary.sample if summary else ():
            if record not in summary.extreme:  # for which there is `_check_extents`
                mapper.check_readable(record)


def _check_extents(cfg: CfgNode, eval_only: bool) -> list[tuple[str, str]]:
    """Find images that are too large to be worked on, or too narrow to be resized.

    Returns:
        path and reason of those of ``DATASETS.TEST``, which evaluations leave out.
    """
    shortest = cfg.INPUT.MIN_SIZE_TRAIN
    shortest = min(shortest) if isinstance(shortest, Sequence) else shortest
    for name in () if eval_only else cfg.DATASETS.TRAIN:
        summary = registered_summary(name)
        found = unusable_images(summary.extreme, shortest, cfg.INPUT.MAX_SIZE_TRAIN) if summary else ()
        if found:
            path, reason = found[0]
            raise ValueError(
                f"dataset '{name}': {path} cannot be trained on: {reason}, or remove it from the annotations "
                f"({len(found)} such image{'s' * (len(found) > 1)})"
            )
    summaries = filter(None, map(registered_summary, cfg.DATASETS.TEST))
    extreme = [record for summary in summaries for record in summary.extreme]
    return unusable_images(extreme, *sizes_of_tests(cfg))


def _build_without_values(cfg: CfgNode) -> nn.Module:
    """The model on the meta device; on the CPU if its parts need values to be built, or cannot be."""
    cfg = cfg.clone()
    cfg.defrost()
    for name in ("meta", "cpu"):
        cfg.MODEL.DEVICE = name
        with (
            contextlib.suppress(ValueError) if name == "meta" else contextlib.nullcontext(),
            torch.device(name),
        ):
            return build_detector(cfg)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No log from what the run itself will do, and log, again."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
