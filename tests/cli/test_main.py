"""`main`: help, version, errors in one line, the console entry point."""

import logging
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import rev_det
from rev_det.warning_filters import hide_advice
from rev_det_cli import COMMANDS, main

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def leave(*arguments):
    """The exit code of an argument parser that ends the program."""
    with pytest.raises(SystemExit) as info:
        main(arguments)
    return info.value.code


def test_help_lists_every_command_with_a_line(capsys):
    assert leave("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert any(re.match(rf"    {name} +\w", line) for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert leave(name, "--help") == 0
    assert f"usage: rev-det {name} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["predict", "--help"], ["nothing"]])
def test_what_needs_no_model_loads_neither_torch_nor_detectron2(words):
    code = (
        "import sys, rev_det_cli\n"
        f"try: rev_det_cli.main({words})\n"
        "except SystemExit: sys.exit(bool({'torch', 'detectron2', 'rev_det'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_version_is_the_packages(capsys):
    assert leave("--version") == 0
    assert capsys.readouterr().out == f"rev_det {rev_det.__version__}\n"


@pytest.mark.parametrize("arguments", [["nothing"], [], ["--nothing"]])
def test_what_is_no_command_is_an_error_with_the_usage(arguments, capsys):
    assert leave(*arguments) == 2
    assert capsys.readouterr().err.startswith("usage: rev-det ")


def test_a_misspelt_command_comes_with_the_nearest(capsys):
    assert leave("predct") == 2
    assert "there is no command 'predct'; did you mean predict?" in capsys.readouterr().err
    assert leave("qqqq") == 2
    assert "'qqqq'; commands are train, predict," in capsys.readouterr().err


def install(monkeypatch, run):
    monkeypatch.setattr("rev_det.cli.doctor.run", run)


def failing(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [ValueError("a value\n  is wrong"), FileNotFoundError("a value is wrong"), OSError("a value is wrong")],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    install(monkeypatch, failing(error))
    assert main(["doctor"]) == 2
    assert tuple(capsys.readouterr()) == ("", "error: a value is wrong\n")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    install(monkeypatch, failing(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert tuple(capsys.readouterr()) == ("", "\ninterrupted\n")


def test_what_torch_advises_detectron2_is_not_shown(monkeypatch):
    hide_advice()
    logger = logging.getLogger("torch.fx._symbolic_trace")
    shown = []
    monkeypatch.setattr(logger, "callHandlers", lambda record: shown.append(record.getMessage()))
    logger.warning("is_fx_tracing will return true for both fx.symbolic_trace and torch.export.")
    logger.warning("something else")
    assert shown == ["something else"]


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    install(monkeypatch, failing(KeyError("oops")))
    with pytest.raises(KeyError, match="oops"):
        main(["doctor"])


def test_the_commands_exit_code_is_returned(monkeypatch):
    install(monkeypatch, lambda args: 7)
    assert main(["doctor"]) == 7


def test_the_console_command_is_main():
    ((name, target),) = re.findall(r'"console_scripts": \["([\w-]+) = ([\w.:]+)"\]', SETUP.read_text())
    assert name == "rev-det"
    assert EntryPoint(name, target, "console_scripts").load() is main


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    install(monkeypatch, failing(error))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("error: the memory of this machine does not suffice")


def test_who_reads_no_further_ends_a_command_quietly():
    # A line that stays in the buffer until the end.
    code = (
        "import sys; from rev_det.cli import doctor; from rev_det_cli import main; "
        "doctor.run = lambda args: print('a line') or 0; "
        "sys.stdin.read(); sys.exit(main(['doctor']))"
    )
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=environment, **streams)
    process.stdout.close()
    process.stdin.close()
    error = process.stderr.read().decode()
    assert process.wait() == 141
    assert "Error" not in error and "Exception" not in error
