"""The training command: arguments in, processes out, one line for what the user can mend."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import RevCheckpointer
from ..data import register_datasets
from ..model_zoo import find_config_file
from ..stopping import Interrupted
from .amp import Precision
from .checks import check_run
from .console import run_logged
from .lock import locked
from .processes import (
    USER_ERROR_CODE,
    USER_ERRORS,
    adopt_processes,
    error_line,
    launch_processes,
    under_torchrun,
)
from .setup import argument_parser, load_config
from .trainer import Trainer

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train or evaluate as a command line says: ``train_net.py``.

    Args:
        argv: the arguments; None for the program's own.

    Returns:
        the exit code: 0; 1 after an evaluation that had to leave out images; 2 after a line ``error: …`` on
        the standard error stream.

    Raises:
        SystemExit: a signal has asked the run to stop (128 + its number); ``--resume`` continues it.
    """
    args = argument_parser().parse_args(argv)
    # What load_config settles is worth seeing. run_logged sees to Detectron2's own loggers.
    rank = os.environ.get("RANK", "0")
    setup_logger(name="rev_det", distributed_rank=int(rank) if rank.isdecimal() else 0)
    try:
        if not rank.isdecimal():
            raise ValueError(f"the environment variable RANK is {rank!r}; torchrun sets it to a number")
        if under_torchrun():
            adopt_processes(args)
        if args.config_file:
            args.config_file = find_config_file(args.config_file)
        cfg = load_config(args.config_file, args.opts, args.dataset, args.num_gpus, args.eval_only)
        left_out = check_run(cfg, args)
        # Of several processes and machines, one for all.
        first = args.machine_rank == 0 and not (under_torchrun() and int(os.environ["LOCAL_RANK"]))
        with locked(cfg.OUTPUT_DIR) if first else contextlib.nullcontext():
            failure = launch_processes(run, cfg, args)
    except USER_ERRORS as error:
        failure = error_line(error)
    except KeyboardInterrupt:
        # Ctrl-C while there is nothing to save, or for the second time.
        raise Interrupted(signal.SIGINT) from None
    if failure:
        sys.stderr.write(f"error: {failure}\n")
        return USER_ERROR_CODE
    if args.eval_only and left_out:
        sys.stderr.write(f"{len(left_out)} test images were left out, and count as without detections:\n")
        sys.stderr.writelines(f"  {path}: {reason}\n" for path, reason in left_out)
        return 1
    return 0


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate in this process, as one of those that were launched or the only one.

    Args:
        cfg: as ``load_config`` returns it.
        args: of ``argument_parser``.

    Returns:
        with ``--eval-only`` the metrics, as `Trainer.test` returns them; else nothing.
    """
    register_datasets(cfg)
    # The first question to the GPU, before anything is written.
    Precision.from_config(cfg)
    with run_logged(cfg, args) as start_files:
        if not args.eval_only:
            trainer = Trainer(cfg)
            if args.resume and not trainer.checkpointer.has_checkpoint():
                logger.warning(
                    "--resume: no checkpoint in %s, so training starts at iteration 0", cfg.OUTPUT_DIR
                )
            trainer.resume_or_load(resume=args.resume)
            start_files()
            trainer.train()
            return {}
        model = Trainer.build_model(cfg)
        checkpointer = RevCheckpointer.of_run(cfg, model, evaluation=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        start_files()
        results = Trainer.test_with_augmentation(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
