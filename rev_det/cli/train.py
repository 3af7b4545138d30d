"""Train or evaluate a detector: the arguments of train_net.py, which only a checkout has."""

from __future__ import annotations

import argparse
import sys

SUMMARY = "train or evaluate a detector"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Detectron2's arguments, which only its own parser can read; `main` puts "--" before them.
    parser.add_argument("arguments", nargs="*")


def run(args: argparse.Namespace) -> int:
    from .. import engine

    sys.argv[0] = "rev-det train"  # what usage and errors call the program
    return engine.main(args.arguments)
