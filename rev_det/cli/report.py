"""One HTML page of a training run: figures, curves, AP of each class, predictions, config and environment.

The page needs neither network nor JavaScript. A run that is under way or was killed has one too.
"""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    from ..report import write_report

    path = str(write_report(args.folder, args.output))
    # Not every name of a file can be printed.
    print("report:", path.encode("utf-8", "backslashreplace").decode("utf-8"))
    return 0
