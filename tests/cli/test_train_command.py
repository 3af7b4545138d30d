"""`rev-det train` is train_net.py's main."""

import os
import subprocess
import sys

import pytest

import rev_det.engine
from rev_det_cli import main


@pytest.fixture
def passed_on(monkeypatch):
    """The arguments that the training's own main gets."""
    got = []

    def training(argv):
        got.append(argv)
        return 7

    monkeypatch.setattr(rev_det.engine, "main", training)
    monkeypatch.setattr(sys, "argv", ["rev-det"])
    return got


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-file", "c.yaml", "--eval-only", "MODEL.WEIGHTS", "w.pth"],
        ["--num-gpus", "2", "--dataset", "a=b:c", "DATASETS.TRAIN", "('a',)"],
        ["SEED", "-1"],
        ["--version"],
        [],
    ],
)
def test_arguments_and_exit_code_are_train_nets(arguments, passed_on):
    assert main(["train", *arguments]) == 7
    assert passed_on == [arguments]


def test_errors_are_one_line_and_name_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rev-det"])
    assert main(["train", "--config-file", "nowhere.yaml"]) == 2
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as info:
        main(["train", "--nothing"])
    assert info.value.code == 2
    assert "rev-det train: error:" in capsys.readouterr().err


def test_the_config_may_be_named_as_in_the_zoo(monkeypatch, capsys):
    words = ["train", "--config-file", "mask_rcnn_rev_mvit_nano_fp"]
    assert main(words) == 2
    assert "--config-file mask_rcnn_rev_mvit_nano_fp does not exist, and" in capsys.readouterr().err
    words[-1] += "n"
    assert main([*words, "SOLVER.MAX_ITER", "0"]) == 2
    assert "SOLVER.MAX_ITER must be" in capsys.readouterr().err


def run_program(code: str, **variables) -> list[str]:
    """Lines that the program prints, run as `rev-det` is: with arguments of its own."""
    environ = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | variables
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PROGRAM = """
import os, sys
sys.argv[:] = ["rev-det", *{arguments}]
from rev_det_cli import main
try:
    main()
finally:
    print("wait policy", os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize("given, policy", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_something_else_is_asked_for(given, policy):
    lines = run_program(PROGRAM.format(arguments=["train", "--help"]), **given)
    assert lines[0].startswith("usage: rev-det train ") and lines[-1] == f"wait policy {policy}"


def test_a_rank_that_is_no_number_is_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "abc")
    assert main(["train", "--config-file", "nowhere.yaml"]) == 2
    assert "the environment variable RANK is 'abc'" in capsys.readouterr().err
