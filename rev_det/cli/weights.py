"""Say what a weight file is, convert it for Detectron2, and check what a model computes with it."""

from __future__ import annotations

import argparse
import dataclasses
import json


def run(args: argparse.Namespace) -> int:
    actions = {"inspect": _inspect, "convert": _convert, "check": _check}
    return actions[args.action](args)


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
