"""Look at data in COCO's format before training on them: check all of it, and see some of it."""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..data.findings import Finding


_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def run(args: argparse.Namespace) -> int:
    return _check(args) if args.action == "check" else _view(args)


def _check(args: argparse.Namespace) -> int:
    from functools import partial

    from tqdm import tqdm

    from ..data import parse_dataset_argument
    from ..data.check import check_data, check_overlap
    from ..data.findings import ERROR, WARNING

    sets = [parse_dataset_argument(text, "data set") for text in args.sets]
    names = [name for name, *_ in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"data sets must have different names, got {', '.join(names)}")
    reports = []
    for name, json_file, image_root in sets:
        # In a file each step of the bar is a line.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        bar = partial(tqdm, unit="image", desc=name, leave=False, delay=1, mininterval=interval)
        reports.append(check_data(name, json_file, image_root, bar))
    findings = []
    for report in reports:
        counts = f"{report.num_images} images, {report.num_instances} instances"
        title = f"{report.name}: {counts}, {len(report.classes)} classes"
        findings += _show(title, report.findings)
    for one, other in combinations(reports, 2):
        findings += _show(f"{one.name} and {other.name}", check_overlap(one, other))
    errors, warnings = (sum(f.severity == severity for f in findings) for severity in (ERROR, WARNING))
    print(f"\n{_counted(errors, 'error')}, {_counted(warnings, 'warning')}")
    return 1 if errors else 0


def _view(args: argparse.Namespace) -> int:
    from ..data import parse_dataset_argument, register_coco_json
    from ..data.contact_sheet import draw_annotations
    from ..files import check_output, printable, whole_file
    from .predict import report_failures

    name, json_file, image_root = parse_dataset_argument(args.set, "data set")
    path = args.output or f"{name}.png"
    check_output(path, _PICTURES)
    register_coco_json(name, json_file, image_root)
    with whole_file(path) as part:
        count, failures = draw_annotations(name, part, args.num, args.seed, args.classes)
    print(printable(f"{_counted(count, 'image')} of '{name}' drawn in {path}"))
    return report_failures(failures, f"{count + len(failures)} images", "drawn")


def _show(title: str, findings: Sequence[Finding]) -> Sequence[Finding]:
    from ..files import printable

    print(printable(title))
    for finding in findings:
        print(f"  {finding.severity:7}  {finding.text}")
    if not findings:
        print("  ok")
    return findings


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
