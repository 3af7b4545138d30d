"""The processes of a run: this one, those that ``--num-gpus`` starts, or those that torchrun has started."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..stopping import (
    STOP_EXIT_CODES,
    Interrupted,
    held_back,
    leave_interrupts_to_parent,
    passing_on_to_children,
)
from ..warning_filters import hide_advice

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# What a user can mend: told in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
USER_ERROR_CODE = 2
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def under_torchrun() -> bool:
    """Whether the environment is that of a process which torchrun has started."""
    return all(name in os.environ for name in _VARIABLES)


def adopt_processes(args: argparse.Namespace) -> None:
    """Set ``--num-gpus``, ``--num-machines`` and ``--machine-rank`` to what torchrun was told.

    Args:
        args: of ``argument_parser``, changed in place.

    Raises:
        ValueError: ``--num-gpus`` or ``--num-machines`` says otherwise.
    """
    world, local, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"))
    for name, value in (("num_gpus", local), ("num_machines", world // local)):
        if getattr(args, name) not in (1, value):
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but torchrun has started {local} "
                f"processes on each of {world // local} machines; leave it out, torchrun's "
                "--nproc-per-node and --nnodes count"
            )
        setattr(args, name, value)
    args.machine_rank = rank // local
    args.dist_url = "env://"


def launch_processes(
    run: Callable[[CfgNode, argparse.Namespace], Any], cfg: CfgNode, args: argparse.Namespace
) -> str:
    """Run on ``--num-gpus`` processes, or in this one if that is 1 or torchrun started it, and wait for them.

    Args:
        run: what to do in each of them.
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
        _join_processes(cfg, args, int(os.environ["LOCAL_RANK"]))
        run(cfg, args)
        dist.destroy_process_group()
        return ""
    if args.dist_url == "auto":
        args.dist_url = f"tcp://127.0.0.1:{_free_port()}"
    errors = mp.get_context("spawn").SimpleQueue()
    with passing_on_to_children() as stop:
        try:
            # Detectron2's launch does not return before they have ended.
            with held_back(signal.SIGINT):
                processes = mp.start_processes(
                    _run_process, (run, cfg, args, errors), nprocs=args.num_gpus, join=False
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


def _run_process(local_rank: int, run: Callable, cfg: CfgNode, args: argparse.Namespace, errors: Any) -> None:
    """``run``, as one of several processes; ``errors`` (a queue) takes what the user can mend."""
    hide_advice()
    leave_interrupts_to_parent()
    _join_processes(cfg, args, local_rank)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        # Processes that each use every core would slow each other down.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.num_gpus))
    try:
        run(cfg, args)
    except USER_ERRORS as error:
        errors.put(error_line(error))
        sys.exit(USER_ERROR_CODE)
    dist.destroy_process_group()


def _join_processes(cfg: CfgNode, args: argparse.Namespace, local_rank: int) -> None:
    """Connect this process with the others, as Detectron2's ``launch`` does for those it starts.

    That would connect those that work on the CPU through NCCL where there are GPUs.
    """
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if not on_cpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        init_method=args.dist_url,
        world_size=args.num_machines * args.num_gpus,
        rank=args.machine_rank * args.num_gpus + local_rank,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(args.num_gpus)
    comm.synchronize()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
