"""The logs of a run: everything in log.txt, and on the console what a person reads while it runs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import logging.handlers
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..files import write_text

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

_NAMES = ("detectron2", "fvcore", "rev_det")
# Beginnings of messages that are screens long. The last but one says that it loads from no file; of the last
# the error is told at the end.
_FOR_THE_FILE = (
    "Environment info:",
    "Contents of args.config_file=",
    "Running with full config:",
    "Model:\n",
    "[DetectionCheckpointer] Loading from  ...",
    "Exception during training:",
)


@contextlib.contextmanager
def run_logged(cfg: CfgNode, args: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Detectron2's ``default_setup`` in two parts, around all that can fail before a run.

    At first random numbers are seeded and the console gets the log. Only what this yields, to be called when
    the run is built and loaded, touches ``OUTPUT_DIR``: a run that fails before has changed nothing there.

    Of training, log and config are in ``OUTPUT_DIR``; of evaluation in ``OUTPUT_DIR/inference``, because
    ``OUTPUT_DIR`` may be that of a training run, which keeps its own.

    Args:
        cfg: as ``load_config`` returns it.
        args: of ``argument_parser``.

    Yields:
        what starts ``log.txt``, with all that was logged before, and writes ``config.yaml``.
    """
    rank = comm.get_rank()
    # The command already shows rev_det's log on the terminal, but a launched process starts without.
    shown = bool(logging.getLogger("rev_det").handlers)
    held = logging.handlers.MemoryHandler(sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
    for name in _NAMES:
        log = setup_logger(None, rank, name=name, configure_stdout=not (shown and name == "rev_det"))
        _adapt(log)
        log.addHandler(held)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    # What keeps tensorboard's thread from writing is raised in this one as well.
    thread_hook = threading.excepthook
    threading.excepthook = lambda failed: failed.exc_type is OSError or thread_hook(failed)
    try:
        yield lambda: _start_files(cfg, args, held)
    finally:
        threading.excepthook = thread_hook
        for name in _NAMES:
            logging.getLogger(name).removeHandler(held)


def _start_files(cfg: CfgNode, args: argparse.Namespace, held: logging.handlers.MemoryHandler) -> None:
    rank = comm.get_rank()
    folder = os.path.join(cfg.OUTPUT_DIR, "inference") if args.eval_only else cfg.OUTPUT_DIR
    os.makedirs(folder, exist_ok=True)
    if comm.is_main_process():
        write_text(os.path.join(folder, "config.yaml"), cfg.dump())
    for name in _NAMES:
        logging.getLogger(name).removeHandler(held)
        log = setup_logger(folder, rank, name=name, configure_stdout=False)
        _adapt(log)
    held.setTarget(log.handlers[-1])
    held.flush()
    path = os.path.join(folder, "log.txt")
    told = logging.getLogger("detectron2")
    told.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    told.info("Environment info:\n%s", collect_env_info())
    told.info("Command line arguments: %s", args)
    told.info(
        "Contents of args.config_file=%s:\n%s", args.config_file, Path(args.config_file).read_text("utf-8")
    )
    told.info("Running with full config:\n%s", cfg.dump())
    logger.info("Environment, config and model are described in %s", path)


def _adapt(log: logging.Logger) -> None:
    for handler in log.handlers:
        stream = getattr(handler, "stream", None)
        if stream is sys.stdout:
            handler.addFilter(lambda record: not record.getMessage().startswith(_FOR_THE_FILE))
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may have bytes that are no text.
            stream.reconfigure(errors="backslashreplace")
        handler.handleError = functools.partial(_give_up, handler)


def _give_up(handler: logging.StreamHandler, record: logging.LogRecord) -> None:
    """Tell once that a log cannot be written: to a full disk, or to `head`, which has read enough."""
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.Handler.handleError(handler, record)
        return
    name = "the console" if handler.stream is sys.stdout else handler.stream.name
    sys.stderr.write(f"warning: the log goes on without {name}, which cannot be written: {error.strerror}\n")
    # All that use this stream, and what closes it at the end.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), handler.stream.fileno())
