"""The training command: arguments in, processes out, one line for what the user can mend."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..advice import hide_advice
from ..checkpoint import RevCheckpointer
from ..config_files import find_config_file
from ..data import register_datasets
from .amp import Precision
from .console import run_logged
from .interruption import (
    STOP_EXIT_CODES,
    Interrupted,
    interrupts_held_back,
    leave_interrupts_to_parent,
    passing_on_to_children,
)
from .lock import locked
from .setup import argument_parser, check_run, load_config
from .torchrun import adopt_processes, join_processes, under_torchrun
from .trainer import Trainer

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# What a user can mend: told in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
_USER_ERROR_CODE = 2


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
    # What load_config settles is worth seeing. set_up_run sees to Detectron2's own loggers.
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
            failure = launch_processes(cfg, args)
    except USER_ERRORS as error:
        failure = error_line(error)
    except KeyboardInterrupt:
        # Ctrl-C while there is nothing to save, or for the second time.
        raise Interrupted(signal.SIGINT) from None
    if failure:
        sys.stderr.write(f"error: {failure}\n")
        return _USER_ERROR_CODE
    if args.eval_only and left_out:
        sys.stderr.write(f"{len(left_out)} test images were left out, and count as without detections:\n")
        sys.stderr.writelines(f"  {path}: {reason}\n" for path, reason in left_out)
        return 1
    return 0


def launch_processes(cfg: CfgNode, args: argparse.Namespace) -> str:
    """Run on ``--num-gpus`` processes, or in this one if that is 1 or torchrun started it, and wait for them.

    Args:
        cfg: as ``load_config`` returns it.
        args: of ``argument_parser``, checked by ``check_run``.

    Returns:
        in one line what the user can mend, if that ended one of several processes; else nothing.

    Raises:
        SystemExit: a signal has asked the run to stop.
        Exception: a single process's own, user errors included; for any other failure of several,
            that of ``torch.multiprocessing`` with the traceback.
    """
    if args.num_gpus * args.num_machines == 1:
        run(cfg, args)
        return ""
    if under_torchrun():
        join_processes(cfg, args, int(os.environ["LOCAL_RANK"]))
        run(cfg, args)
        dist.destroy_process_group()
        return ""
    if args.dist_url == "auto":
        args.dist_url = f"tcp://127.0.0.1:{_free_port()}"
    errors = mp.get_context("spawn").SimpleQueue()
    with passing_on_to_children() as stop:
        try:
            # Detectron2's launch does not return before they have ended.
            with interrupts_held_back():
                processes = mp.start_processes(
                    _run_process, (cfg, args, errors), nprocs=args.num_gpus, join=False
                )
            while not processes.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if stop.number is not None:
                raise Interrupted(stop.number) from None
            # A scheduler may signal all processes but this one.
            if (code := getattr(error, "exit_code", None)) in STOP_EXIT_CODES:
                raise SystemExit(code) from None
            # When one process stops, the others lose their connection to it: theirs may be reported first.
            if errors.empty():
                raise
            return errors.get()
    return ""


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
        return _evaluate(cfg, args, start_files) if args.eval_only else _train(cfg, args, start_files)


def _train(cfg: CfgNode, args: argparse.Namespace, start_files: Callable[[], None]) -> dict[str, Any]:
    trainer = Trainer(cfg)
    if args.resume and not trainer.checkpointer.has_checkpoint():
        logger.warning("--resume: no checkpoint in %s, so training starts at iteration 0", cfg.OUTPUT_DIR)
    trainer.resume_or_load(resume=args.resume)
    start_files()
    trainer.train()
    return {}


def _evaluate(cfg: CfgNode, args: argparse.Namespace, start_files: Callable[[], None]) -> dict[str, Any]:
    model = Trainer.build_model(cfg)
    checkpointer = RevCheckpointer.of_run(cfg, model, evaluation=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    start_files()
    results = Trainer.test_with_augmentation(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def error_line(error: BaseException) -> str:
    """An error's message in one line.

    Args:
        error: may come from a data loader's worker process, whose traceback is then left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        # torch appends the text of the original error, which ends in "ValueError: message".
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines) or repr(error)


def _run_process(local_rank: int, cfg: CfgNode, args: argparse.Namespace, errors: Any) -> None:
    """`run`, as one of several processes; ``errors`` (a queue) takes what the user can mend."""
    hide_advice()
    leave_interrupts_to_parent()
    join_processes(cfg, args, local_rank)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        # Processes that each use every core would slow each other down.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.num_gpus))
    try:
        run(cfg, args)
    except USER_ERRORS as error:
        errors.put(error_line(error))
        sys.exit(_USER_ERROR_CODE)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
