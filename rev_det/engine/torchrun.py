"""Processes that torchrun has started, in the place of those that ``--num-gpus`` starts."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

if TYPE_CHECKING:
    from detectron2.config import CfgNode

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
    found = {"num_gpus": local, "num_machines": world // local}
    for name, value in found.items():
        if getattr(args, name) not in (1, value):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is {getattr(args, name)}, but torchrun has started {local} processes on each of "
                f"{world // local} machines; leave it out, --nproc-per-node and --nnodes of torchrun count"
            )
        setattr(args, name, value)
    args.machine_rank = rank // local
    args.dist_url = "env://"


def join_processes(cfg: CfgNode, args: argparse.Namespace, local_rank: int) -> None:
    """Connect this process with the others, as Detectron2's ``launch`` does for those it starts.

    That would connect those that work on the CPU through NCCL where there are GPUs.

    Args:
        cfg: a settled config; on the CPU gloo connects, else NCCL.
        args: of ``argument_parser``, which under torchrun `adopt_processes` has changed.
        local_rank: of this process among those of its machine.
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
