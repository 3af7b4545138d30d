"""The ``rev-det`` command: one module for each subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__

# Each module has SUMMARY (one line of help), add_arguments(parser) and run(args) -> exit code. What they need
# they import in `run`: `rev-det --help` is quick, and `rev-det doctor` works where something is missing.
COMMANDS: tuple[str, ...] = ("weights", "classify", "bench", "analyze")
_USER_ERROR_CODE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; None for the program's own.

    Returns:
        the exit code: 2 after one line ``error: …`` on the standard error stream for what the user can mend.
    """
    parser = argparse.ArgumentParser(
        prog="rev-det", description="Reversible vision transformers for Detectron2."
    )
    parser.add_argument("--version", action="version", version=f"rev_det {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f".{name}", __name__) for name in COMMANDS}
    for name, module in modules.items():
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return _USER_ERROR_CODE
