"""Examine the installation: versions, CUDA, Detectron2, operators, gradients; for each problem its fix.

The exit code is 1 if there are problems.
"""

from __future__ import annotations

import argparse
import logging


def run(args: argparse.Namespace) -> int:
    from ..doctor import PROBLEM, describe_environment, examine

    # It misses a compiler for CUDA, which nobody needs here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    print(f"{describe_environment().strip()}\n")
    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.status:7}  {finding.what:{width}}  {finding.detail}")
        if finding.fix:
            print(f"{'':{width + 9}}  fix: {finding.fix}")
    problems = sum(finding.status == PROBLEM for finding in findings)
    print(f"\n{problems} {'problem' if problems == 1 else 'problems'}" if problems else "\nno problems")
    return 1 if problems else 0
