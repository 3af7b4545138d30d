"""The table of parity figures that docs/weights.md names."""

import subprocess
import sys

import print_parity
import pytest
from test_parity import run_tiny


def test_a_row_has_the_largest_error_and_the_number_of_every_kind_of_tensor():
    errors = print_parity.collect(*run_tiny("tiny_rev_mvit", activations="cached"))
    assert errors.keys() == print_parity.COLUMNS.keys()
    assert 0.0 < max(map(max, errors.values())) < 1e-9
    cells = print_parity.row("title", errors).split()
    assert cells[0] == "title"
    assert cells[1::2] == [f"{max(errors[key]):.1e}" for key in print_parity.COLUMNS]
    assert cells[2::2] == [f"({len(errors[key])})" for key in print_parity.COLUMNS]


@pytest.mark.slow
def test_the_command_prints_every_model():
    done = subprocess.run([sys.executable, print_parity.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[2:]
    assert len(lines) == 3 + 3 * 3
    assert all("e-1" in line for line in lines)
