#!/usr/bin/env python
"""Count what each memory lever gains, by switching it off.

    python benchmarks/levers.py --json benchmarks/results/levers_counted.json

Backbones alone: Rev-MViT-B at detection size in bfloat16, Rev-ViT-B at 224 x 224 in float32 without kept
attention; and ordinary training of the former, which shares one of the levers. See docs/memory.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from rich.console import Console
from torch import Tensor

from rev_det.analysis.cases import Case, Counting
from rev_det.analysis.peers import CACHED, MODELS, REVERSIBLE, REVERSIBLE_KEPT
from rev_det.analysis.report import COUNTED, Figure, Report, Row, describe_machine
from rev_det.files import check_output
from rev_det.modeling import attention, fusion, layers, rev_mvit
from rev_det.modeling.backbone import ReversibleBackbone
from rev_det.modeling.layers import AttentionBranch
from rev_det.modeling.repetition import WHOLE

MVIT = Case("Rev-MViT-B", MODELS["rev_mvit_b"], REVERSIBLE_KEPT, 2, (800, 1344), "bf16", 16)
VIT = Case("Rev-ViT-B", MODELS["rev_vit_b"], REVERSIBLE, 256, (224, 224), "fp32", 12)
ORDINARY = replace(MVIT, scheme=CACHED)
CASES = (MVIT, replace(MVIT, depth=24), VIT, ORDINARY)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    check_output(args.json)
    report = Report(
        "Each lever switched off alone",
        shlex.join(["python", "benchmarks/levers.py", *sys.argv[1:]]),
        count_levers(CASES),
        describe_machine(None),
        ["Changes are against all levers on: more is what the lever saves."],
    )
    report.print(Console(width=None if Console().is_terminal else 160))
    if args.json:
        report.save_json(args.json)


def count_levers(cases: Sequence[Case]) -> list[Row]:
    """For each case a row for all levers on, then one for each switched off."""
    rows = []
    for case in cases:
        on = None
        for name in levers_of(case):
            with LEVERS[name]() as changes:
                changed = replace(case.scheme, arguments=case.scheme.arguments | changes)
                count = Counting().count(replace(case, scheme=changed))
            on = on or count
            row = Row({"switched off": name} | case.labels)
            row.figures = {
                "peak memory": Figure(count.peak / 2**30, "GiB", COUNTED),
                "more memory": Figure(100 * (count.peak / on.peak - 1), "%", COUNTED),
                "more FLOPs": Figure(100 * (count.flops / on.flops - 1), "%", COUNTED),
            }
            rows.append(row)
    return rows


def levers_of(case: Case) -> Sequence[str]:
    """The names of the levers that there are in a case."""
    if case.scheme == CACHED:
        return OF_ORDINARY_TRAINING
    return OF_REV_VIT if case.model == VIT.model else list(LEVERS)


@contextmanager
def changed(*replacements: tuple[Any, str, Any], **arguments: Any) -> Iterator[dict[str, Any]]:
    """Replace attributes of modules and classes for a while; gives changes of the model's arguments."""
    with ExitStack() as stack:
        for target, name, value in replacements:
            stack.enter_context(mock.patch.object(target, name, value))
        yield arguments


def unchanged(x: Tensor) -> Tensor:
    return x


def norm_at_once(self, norm, x1: Tensor, x2: Tensor) -> Tensor:
    return norm(x1, x2)


LEVERS: dict[str, Callable[[], Any]] = {
    "none": changed,
    "MLPs, scale norms and attention in parts": lambda: changed((layers, "PART_VALUES", 2**62)),
    "of these, attention in parts of the batch": lambda: changed(
        (AttentionBranch, "parts", lambda self, x: WHOLE)
    ),
    "a norm's output cast once for all that read it": lambda: changed(
        *((module, "to_autocast_dtype", unchanged) for module in (attention, fusion, layers, rev_mvit))
    ),
    "scale norms recomputed": lambda: changed((ReversibleBackbone, "normalise", norm_at_once)),
    "transitions recomputed": lambda: changed(transitions="cached"),
    "attention kept": lambda: changed(keep_attention=False),
}
# The others are of transitions, bfloat16 and kept attention.
OF_REV_VIT = (
    "none",
    "MLPs, scale norms and attention in parts",
    "of these, attention in parts of the batch",
)
# The others are of recomputing.
OF_ORDINARY_TRAINING = ("none", "a norm's output cast once for all that read it")


if __name__ == "__main__":
    main()
