"""One HTML page of a training run: figures, curves, AP of each class, predictions, config and environment.

The page needs neither network nor JavaScript. A run that is under way or was killed has one too.
"""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    from ..report import write_report

    print(f"report: {write_report(args.folder, args.output)}")
    return 0
