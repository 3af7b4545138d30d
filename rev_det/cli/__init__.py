"""The ``rev-det`` command: one module for each subcommand."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__, modeling
from ..devices import is_out_of_memory
from ..warning_filters import hide_advice

# Each module has SUMMARY (one line of help), add_arguments(parser) and run(args) -> exit code. What they need
# they import in `run`: `rev-det --help` is quick, and `rev-det doctor` works where something is missing.
COMMANDS: tuple[str, ...] = (
    "train",
    "predict",
    "report",
    "export",
    "data",
    "doctor",
    "weights",
    "classify",
    "bench",
    "analyze",
)
_USER_ERROR_CODE = 2
# As shells have it: 128 and the number of the signal.
_INTERRUPTED_CODE, _BROKEN_PIPE_CODE = 130, 141
# Read when torch is imported: threads that wait for work shall sleep, as train_net.py explains.
_WAIT_POLICY = "OMP_WAIT_POLICY"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; None for the program's own.

    Returns:
        the exit code: 2 after one line ``error: …`` on the standard error stream for what the user can mend,
        130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        if argv is None and _WAIT_POLICY not in os.environ:
            _restart()
        words.insert(1, "--")
    parser = argparse.ArgumentParser(
        prog="rev-det", description="Reversible vision transformers for Detectron2."
    )
    parser.add_argument("--version", action="version", version=f"rev_det {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f".{name}", __name__) for name in COMMANDS}
    for name, module in modules.items():
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(subparser)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
        parser.error(f"there is no command {words[0]!r}; {hint}")
    args = parser.parse_args(words)
    hide_advice()
    try:
        code = modules[args.command].run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return _INTERRUPTED_CODE
    except BrokenPipeError:
        # Who reads has read enough, as `head` does; what is left would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE_CODE
    except (ValueError, OSError) as error:
        message = str(error)
    except Exception as error:
        message = _obstacle(args.command)
        if not message and is_out_of_memory(error):
            message = f"the memory of this machine does not suffice: {str(error) or 'out of memory'}"
        if not message:
            raise
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return _USER_ERROR_CODE


def _obstacle(command: str) -> str:
    """Why Detectron2 cannot be used, and what to do; nothing if it can."""
    try:
        modeling.RevViT  # noqa: B018  (raises what importing Detectron2 has raised, in words)
    except ImportError as error:
        return str(error).replace("rev_det.modeling.RevViT", command)
    return ""


def _restart() -> None:
    """The same program again, with sleeping threads: importing this package has imported torch already."""
    os.environ[_WAIT_POLICY] = "PASSIVE"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
