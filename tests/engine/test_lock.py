"""One run at a time in a folder; what a killed run leaves does not keep others out."""

import json
import os
import platform
import subprocess
import sys

import pytest

from rev_det.engine import main
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
    """Another process that has locked the folder ``output``."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "output")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_in_use_is_refused_and_whose_it_is_said(other, tmp_path):
    folder = str(tmp_path / "output")
    for _ in range(2):  # being refused does not end the lock
        with pytest.raises(ValueError, match=rf"in use by process {other.pid} on .*set another") as info:
            with locked(folder):
                pass
    assert "remove" not in str(info.value)
    other.communicate("")
    # Its owner has removed it, and the folder where nothing was written.
    assert not (tmp_path / "output").exists()
    with locked(folder):
        pass


def test_what_a_killed_run_leaves_is_replaced(other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / "output" / NAME).exists()
    with locked(str(tmp_path / "output")):
        assert json.loads((tmp_path / "output" / NAME).read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize(
    "text, who",
    [
        ('{"pid": 7, "host": "another"}', "process 7 on another"),
        *((text, "a run that has not said which") for text in ("", "[]", "{}", "7", "\x00")),
    ],
)
def test_a_lock_of_another_machine_is_one_and_who_knows_better_is_told_how(tmp_path, text, who):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=f"in use by {who}: .* remove {tmp_path}/{NAME}"):
        with locked(str(tmp_path)):
            pass
    assert (tmp_path / NAME).read_text() == text


def test_the_lock_of_an_older_version_of_this_machine_is_replaced(tmp_path):
    older = {"pid": 1, "host": platform.node(), "boot": "x", "container": "pid:[1]", "started": "5"}
    (tmp_path / NAME).write_text(json.dumps(older))
    with locked(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_by_hand_and_taken_anew_is_left_to_its_new_owner(tmp_path):
    with locked(str(tmp_path)):
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).write_text("new")
    assert (tmp_path / NAME).read_text() == "new"


def test_a_lock_that_cannot_be_written_is_told_and_removed(tmp_path, full_disk):
    with full_disk(4), pytest.raises(OSError, match=rf"{NAME} cannot be written: File too large"):
        with locked(str(tmp_path)):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--resume",), ("--eval-only",)])
def test_a_second_command_in_a_folder_changes_nothing(other, tiny_run, nano_mvit, tmp_path, capsys, options):
    before = files(tmp_path)
    assert main(tiny_run(nano_mvit, options=options)) == 2
    assert f"output is in use by process {other.pid} on " in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_run_leaves_no_lock(tiny_run, nano_mvit, tmp_path):
    assert main(tiny_run(nano_mvit, "DATASETS.TEST", "()")) == 0
    assert (tmp_path / "output/model_final.pth").exists() and not (tmp_path / "output" / NAME).exists()
