"""What a config or a command line can get wrong in a run, found before anything is written."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.data import MetadataCatalog

from ..checks import check_choice, check_count, is_finite, is_whole
from ..data import RevDatasetMapper
from ..data.coco import registered_summary
from ..data.images import unusable_images
from ..data.loader import sizes_of_tests
from .build import explained
from .trainer import COMPRESSION

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check how many processes there are, where, and that they can share a batch.

    Raises:
        ValueError: arguments are out of range, or do not go together.
    """
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


def check_solver(cfg: CfgNode) -> None:
    """Check the numbers that a training loop, or a schedule, would stumble over or misread.

    Raises:
        ValueError: a number is out of range.
    """
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "ACCUMULATE", "CHECKPOINT_PERIOD"):
        check_count(f"SOLVER.{key}", solver[key])
    for key in ("WARMUP_ITERS", "CHECKPOINT_KEEP"):
        check_count(f"SOLVER.{key}", solver[key], minimum=0)
    check_count("SOLVER.AMP.MAX_SKIPPED_STEPS", solver.AMP.MAX_SKIPPED_STEPS, minimum=0)
    check_choice("SOLVER.DDP.COMPRESSION", solver.DDP.COMPRESSION, COMPRESSION)
    _check_number("SOLVER.BASE_LR", solver.BASE_LR, above=0)
    if not is_finite(solver.BASE_LR_END) or not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END!r}; it must be 0 to SOLVER.BASE_LR, {solver.BASE_LR}"
        )
    for key in ("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"):
        if solver[key] is not None:  # as WEIGHT_DECAY
            _check_number(f"SOLVER.{key}", solver[key], least=0)
    _check_number("SOLVER.GAMMA", solver.GAMMA, above=0)
    _check_number("SOLVER.WARMUP_FACTOR", solver.WARMUP_FACTOR, least=0)
    if solver.CLIP_GRADIENTS.ENABLED:
        _check_number("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", solver.CLIP_GRADIENTS.CLIP_VALUE, above=0)
    steps = solver.STEPS
    increase = all(map(is_whole, steps)) and all(a < b for a, b in itertools.pairwise((0, *steps)))
    if not increase:
        raise ValueError(f"SOLVER.STEPS is {steps!r}; it must be iterations, increasing, the first above 0")
    _check_number("MODEL.REV.INVERSION_THRESHOLD", cfg.MODEL.REV.INVERSION_THRESHOLD, least=0)
    check_count("MODEL.REV.INVERSION_PERIOD", cfg.MODEL.REV.INVERSION_PERIOD, minimum=0)
    momentum = solver.MOMENTUM
    if solver.OPTIMIZER == "SGD" and not (is_finite(momentum) and 0 <= momentum < 1):
        raise ValueError(f"SOLVER.MOMENTUM must be a number of at least 0 and below 1, got {momentum!r}")
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV and momentum == 0:
        raise ValueError("SOLVER.NESTEROV is True, which needs a SOLVER.MOMENTUM above 0, got 0")
    betas = solver.BETAS
    if len(betas) != 2 or not all(is_finite(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"SOLVER.BETAS is {betas!r}; it must be two numbers of at least 0 and below 1")


def check_training_data(cfg: CfgNode) -> None:
    """Check that ``DATASETS.TRAIN`` has something to train on, and can be read as ``DATALOADER`` says.

    Raises:
        FileNotFoundError: a dataset's files do not exist.
        ValueError: there is no dataset, all its annotations are crowd regions, or a key is out of range.
    """
    names = cfg.DATASETS.TRAIN
    if not names:
        raise ValueError("DATASETS.TRAIN is empty, there is nothing to train on")
    check_dataset_files("DATASETS.TRAIN", names)
    summaries = [registered_summary(name) for name in names]
    if all(summary and summary.num_instances == summary.num_crowds for summary in summaries):
        raise ValueError(
            f"DATASETS.TRAIN is {tuple(names)}, where all {sum(s.num_instances for s in summaries)} "
            "annotations are crowd regions ('iscrowd' is 1), which are not trained on; annotate objects"
        )
    if cfg.MODEL.LOAD_PROPOSALS and len(cfg.DATASETS.PROPOSAL_FILES_TRAIN) != len(names):
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True: DATASETS.PROPOSAL_FILES_TRAIN needs a file per dataset"
        )
    loader = cfg.DATALOADER
    check_count("DATALOADER.NUM_WORKERS", loader.NUM_WORKERS, minimum=0)
    _check_number("DATALOADER.REPEAT_THRESHOLD", loader.REPEAT_THRESHOLD, least=0)
    # Those that build_train_loader can resume.
    check_choice(
        "DATALOADER.SAMPLER_TRAIN", loader.SAMPLER_TRAIN, ("TrainingSampler", "RepeatFactorTrainingSampler")
    )


def check_proposals(cfg: CfgNode) -> None:
    """Check where proposals come from: Detectron2 reads them as pickles, which can run code.

    Raises:
        ValueError: they are not Detectron2's own.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        for path in cfg.DATASETS[key]:
            if not path.startswith("detectron2://"):
                raise ValueError(
                    f"DATASETS.{key} has {path}, a pickle, which could run code when it is read: with "
                    "MODEL.LOAD_PROPOSALS proposals are read from detectron2:// addresses only"
                )


def check_pixels(cfg: CfgNode) -> None:
    """Check what pixels are normalised by: an image divided by 0 has no objects for any model.

    Raises:
        ValueError: ``MODEL.PIXEL_MEAN`` or ``PIXEL_STD`` is not a number per channel, or one of these is not
            above 0.
    """
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    valid = len(mean) == len(std) and all(map(is_finite, mean)) and all(is_finite(s) and s > 0 for s in std)
    # One channel is spread over as many as there are means.
    if not mean or not valid or (len(mean) != 3 and cfg.INPUT.FORMAT != "L"):
        raise ValueError(
            f"MODEL.PIXEL_MEAN is {mean!r} and MODEL.PIXEL_STD {std!r}; each must be a number per channel of "
            f"INPUT.FORMAT {cfg.INPUT.FORMAT}, those of PIXEL_STD above 0"
        )


def check_datasets_named(cfg: CfgNode, names: Sequence[str], eval_only: bool) -> None:
    """Check that datasets of the command line are used: without them a run would be one on other data.

    Args:
        cfg: a config with all keys of the command line.
        names: what ``--dataset`` registers. A training set, as ``DATASETS.TRAIN`` names it, may be among them
            for an evaluation too.
        eval_only: which key the way out names.

    Raises:
        ValueError: neither ``DATASETS.TRAIN`` nor ``DATASETS.TEST`` has one of the names.
    """
    for name in names:
        if name not in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            key = "TEST" if eval_only else "TRAIN"
            raise ValueError(
                f"--dataset '{name}' is in neither DATASETS.TRAIN nor DATASETS.TEST; "
                f"add DATASETS.{key} \"('{name}',)\""
            )


def check_dataset_files(key: str, names: Sequence[str]) -> None:
    """Check that files exist. Datasets of Detectron2's own are not looked at any closer until they are used.

    Raises:
        FileNotFoundError: naming the file and the dataset, one of ``names`` that ``key`` has.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path and "://" not in path and not os.path.exists(path):
                raise FileNotFoundError(
                    f"{key}: {path} of dataset '{name}' does not exist; "
                    "DETECTRON2_DATASETS names the folder that holds Detectron2's datasets"
                )


def check_images(cfg: CfgNode, eval_only: bool) -> None:
    """Check the keys of ``INPUT``, and read a few images of each dataset that ``load_config`` registered.

    Raises:
        ValueError: a key has a value that is not allowed, or an image cannot be decoded.
    """
    with explained():
        mapper = RevDatasetMapper(cfg, is_train=not eval_only)
    for name in dict.fromkeys([*([] if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]):
        summary = registered_summary(name)
        for record in summary.sample if summary else ():
            if record not in summary.extreme:  # for which there is `check_extents`
                mapper.check_readable(record)


def check_extents(cfg: CfgNode, eval_only: bool) -> list[tuple[str, str]]:
    """Find images that are too large to be worked on, or too narrow to be resized.

    Returns:
        path and reason of those of ``DATASETS.TEST``, which evaluations leave out.

    Raises:
        ValueError: ``DATASETS.TRAIN`` has some; naming the first.
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


def check_output(cfg: CfgNode) -> None:
    """Check that ``OUTPUT_DIR`` can be written, and that what ``TEST.EXPECTED_RESULTS`` expects is readable.

    Raises:
        ValueError: naming the key.
    """
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is empty; name a folder, which will be made")
    # The folders that are missing will be made in it.
    there = os.path.abspath(cfg.OUTPUT_DIR)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR}, but {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR}: there is no permission to write to {there}")
    for entry in cfg.TEST.EXPECTED_RESULTS:
        if not isinstance(entry, Sequence) or len(entry) != 4 or not all(map(is_finite, entry[2:])):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has the entry {entry!r}; expected [TASK, METRIC, VALUE, TOLERANCE], "
                "for example ['bbox', 'AP', 48.0, 0.5]"
            )


def _check_number(key: str, value: Any, above: float | None = None, least: float | None = None) -> None:
    if (
        not is_finite(value)
        or (above is not None and value <= above)
        or (least is not None and value < least)
    ):
        bound = f"above {above}" if above is not None else f"of at least {least}"
        raise ValueError(f"{key} must be a number {bound}, got {value!r}")
