"""Say what a weight file is, convert it for Detectron2, and check what a model computes with it."""

from __future__ import annotations

import argparse
import dataclasses
import json

SUMMARY = "inspect, convert and check weight files"

_FILE_HELP = (
    "path or URL of a weight file (PySlowFast, mmpretrain or rev_det; .pth, .pyth, .safetensors), with an "
    "optional #sha256=<64 hexadecimal digits> that is verified"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    inspect = actions.add_parser(
        "inspect",
        help="say what a file is",
        description="Print a weight file's layout, sizes and problems, and the model it fits. "
        "The exit code is 0 for a sound file, 1 for one with problems, 2 for one that cannot be read.",
    )
    inspect.add_argument("file", metavar="FILE", help=_FILE_HELP)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(perform=_inspect)

    convert = actions.add_parser(
        "convert",
        help="write a file for Detectron2",
        description="Write a file's weights under the names that a Detectron2 detector has for them. "
        "A classifier's head and an optimizer's state are left out.",
    )
    convert.add_argument("file", metavar="FILE", help=_FILE_HELP)
    convert.add_argument("out", metavar="OUT", help="the new file, .pth or .safetensors")
    convert.add_argument("--force", action="store_true", help="overwrite OUT if it is there")
    convert.set_defaults(perform=_convert)

    check = actions.add_parser(
        "check",
        help="load a file and print what the model computes",
        description="Load a file into a named model, strictly, and print a fingerprint of its outputs on a "
        "fixed input, computed in float64 on the CPU: the same on every machine.",
    )
    check.add_argument("file", metavar="FILE", help=_FILE_HELP)
    check.add_argument(
        "--model",
        metavar="NAME",
        help="rev_vit_s, rev_vit_b, rev_vit_l, rev_vit_h or rev_mvit_b (default: the one that the file fits)",
    )
    check.set_defaults(perform=_check)


def run(args: argparse.Namespace) -> int:
    return args.perform(args)


def _inspect(args: argparse.Namespace) -> int:
    from ..checkpoint import inspect_weights

    summary = inspect_weights(args.file)
    if args.json:
        print(json.dumps(dataclasses.asdict(summary), indent=2))
    else:
        print(summary)
        count = len(summary.problems)
        sound = f"not sound: {count} problem{'s' * (count != 1)}" if count else "sound"
        print(f"  {sound}; the size of {summary.model or 'none of the named models'}")
    return 1 if summary.problems else 0


def _convert(args: argparse.Namespace) -> int:
    from ..checkpoint.rewriting import rewrite_weights

    print(rewrite_weights(args.file, args.out, overwrite=args.force))
    return 0


def _check(args: argparse.Namespace) -> int:
    from ..classify import load_classifier
    from ..fingerprint import take_fingerprints

    classifier, model, result = load_classifier(args.file, args.model)
    print(result)
    print(f"{model} on the fixed input, in float64:")
    for line in take_fingerprints(classifier):
        print(f"  {line}")
    return 0
