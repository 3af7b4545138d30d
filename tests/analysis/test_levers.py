"""The script that counts what each memory lever gains still switches them off."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "levers.py"


@pytest.mark.slow
def test_every_lever_that_is_switched_off_is_missed():
    spec = importlib.util.spec_from_file_location("levers", SCRIPT)
    levers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(levers)
    cases = [replace(levers.MVIT, depth=7), levers.VIT, replace(levers.ORDINARY, depth=7)]
    rows = levers.count_levers(cases)
    missed = {}
    for row in rows:
        changes = (row.figures["more memory"].value, row.figures["more FLOPs"].value)
        missed.setdefault(row.labels["switched off"], []).append(changes)
    assert missed.pop("none") == [(0, 0)] * 3
    assert len(missed) == len(levers.LEVERS) - 1
    for name, changes in missed.items():
        assert max(max(pair) for pair in changes) > 0.1, name
