"""The logs of a run: everything in log.txt, and on the console what a person reads while it runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Beginnings of Detectron2's messages that are screens long. The last says that it loads from no file.
_FOR_THE_FILE = (
    "Environment info:",
    "Contents of args.config_file=",
    "Running with full config:",
    "Model:\n",
    "[DetectionCheckpointer] Loading from  ...",
)


def set_up_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``: logs, seed and ``config.yaml``; what fills screens is in log.txt alone.

    Of training, log and config are in ``OUTPUT_DIR``; of evaluation in ``OUTPUT_DIR/inference``, because
    ``OUTPUT_DIR`` may be that of a training run, which keeps its own.

    Args:
        cfg: as ``load_config`` returns it.
        args: of ``argument_parser``.
    """
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference")
    folder, rank = cfg.OUTPUT_DIR, comm.get_rank()
    # With the arguments of default_setup, which then gets this logger as it is made here: it is cached.
    for handler in setup_logger(folder, distributed_rank=rank).handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(_is_for_the_console)
    default_setup(cfg, args)
    # The command already shows rev_det's log on the terminal, but a launched process starts without.
    shown = bool(logging.getLogger("rev_det").handlers)
    setup_logger(folder, rank, name="rev_det", configure_stdout=not shown)
    logger.info("Environment, config and model are described in %s", os.path.join(folder, "log.txt"))


def _is_for_the_console(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_FOR_THE_FILE)
