"""One run at a time in a folder; what a killed run leaves does not keep others out."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from rev_det.engine import lock, main
from rev_det.engine.lock import NAME, locked

HOLD = """
import sys
from rev_det.engine.lock import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has locked the folder ``run``."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def write_lock(folder, **changes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(lock._owner(os.getppid()) | changes))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_in_use_is_refused_and_whose_it_is_said(other, tmp_path):
    with pytest.raises(ValueError, match=rf"run is in use by process {other.pid} on .*set another") as info:
        with locked(str(tmp_path / "run")):
            pass
    assert "remove" not in str(info.value)
    # It was kept for its owner, who removes it.
    assert (tmp_path / "run" / NAME).exists()
    other.communicate("")
    assert not (tmp_path / "run").exists()
    with locked(str(tmp_path / "run")):
        pass


def test_what_a_killed_run_leaves_is_replaced(other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / "run" / NAME).exists()
    with locked(str(tmp_path / "run")):
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "changes, stale",
    [
        ({}, False),
        ({"started": "1"}, True),  # the number was given to another process
        ({"boot": "before"}, True),
        ({"host": "another"}, None),
        ({"host": "another", "boot": "its own"}, None),
        ({"container": "another"}, None),
        ({"pid": "text", "container": 5}, None),
    ],
)
def test_only_what_is_certainly_over_is_replaced(tmp_path, changes, stale):
    write_lock(tmp_path / "run", **changes)
    before = files(tmp_path)
    with contextlib.nullcontext() if stale else pytest.raises(ValueError, match="is in use by") as info:
        with locked(str(tmp_path / "run")):
            assert files(tmp_path) != before
    if not stale:
        assert files(tmp_path) == before
        # Who knows better is told how.
        assert (f"remove {tmp_path}/run/{NAME}" in str(info.value)) == (stale is None)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00"])
def test_a_lock_that_says_nothing_is_one(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match="in use by a run that has not said which: .* remove "):
        with locked(str(tmp_path)):
            pass


def test_a_lock_that_was_taken_over_is_left_to_its_new_owner(tmp_path):
    with locked(str(tmp_path)):
        write_lock(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getppid()


def test_a_lock_that_cannot_be_written_is_told_and_removed(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("json.dump", fail)
    with pytest.raises(OSError, match=rf"{NAME} cannot be written: No space left"):
        with locked(str(tmp_path)):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--resume",), ("--eval-only",)])
def test_a_second_command_in_a_folder_changes_nothing(tiny_run, nano_mvit, tmp_path, capsys, options):
    write_lock(tmp_path / "output")
    before = files(tmp_path)
    opts = ("MODEL.REV.STRICT_WEIGHTS", "False") if options == ("--eval-only",) else ()
    assert main(tiny_run(nano_mvit, *opts, options=options)) == 2
    assert f"output is in use by process {os.getppid()} on " in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_run_leaves_no_lock(tiny_run, nano_mvit, tmp_path):
    assert main(tiny_run(nano_mvit, "DATASETS.TEST", "()")) == 0
    assert (tmp_path / "output/model_final.pth").exists() and not (tmp_path / "output" / NAME).exists()
