"""Train or evaluate a detector: the arguments of train_net.py, which only a checkout has."""

from __future__ import annotations

import argparse
import sys


def run(args: argparse.Namespace) -> int:
    from .. import engine

    sys.argv[0] = "rev-det train"  # what usage and errors call the program
    return engine.main(args.arguments)
