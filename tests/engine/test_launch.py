"""The training command: exit codes, the one line of an error, and several processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rev_det.engine import main
from rev_det.engine.processes import error_line

REPOSITORY = Path(__file__).resolve().parents[2]


def train_net(*args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(REPOSITORY / "train_net.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "opts, message",
    [
        (("MODEL.WEIGHTS", "/no/such/file.pth"), "error: .*/no/such/file.pth does not exist"),
        (("SOLVER.LR", "1"), "error: there is no config key SOLVER.LR"),
        (("OUTPUT_DIR", "/dev/null/output"), "error: .*/dev/null/output"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_no_output(
    tiny_run, nano_mvit, tmp_path, capsys, opts, message
):
    before = set(tmp_path.iterdir())
    assert main([*tiny_run(nano_mvit), *opts]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(message, error)
    assert set(tmp_path.iterdir()) == before


def test_the_program_itself_ends_with_the_exit_code(tiny_run, nano_mvit, tmp_path):
    done = train_net(*tiny_run(nano_mvit, "MODEL.REV_MVIT.NUM_HEADS", "3"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "output").exists()


def test_the_console_stays_readable_and_the_log_has_it_all(tiny_run, nano_mvit, tmp_path):
    done = train_net(*tiny_run(nano_mvit, "DATASETS.TEST", "()"))
    assert done.returncode == 0, done.stderr
    *before, _ = done.stdout.partition("total_loss")[0].splitlines()
    assert len(before) < 40 and "\x1b" not in done.stdout
    log = (tmp_path / "output/log.txt").read_text()
    for message in ("Environment info:", "Contents of args", "Running with full config:", "Model:\n"):
        assert message in log and message not in done.stdout
    assert "Loading from  ..." not in done.stdout
    assert f"Environment, config and model are described in {tmp_path}/output/log.txt" in done.stdout
    assert re.search(r"The model has \d\.\d M parameters", done.stdout)
    # Nothing is there twice.
    for text in (done.stdout, log):
        assert text.count("Command line arguments: ") == text.count("Training is complete") == 1


def test_names_with_bytes_that_are_no_text_are_logged(tiny_run, nano_mvit, tiny_dataset, tmp_path):
    annotations, _, images = tiny_dataset.partition("=")[2].partition(":")
    folder, config = tmp_path / "images\udcff", tmp_path / "config\udcff.yaml"
    shutil.copytree(images, folder)
    config.write_text(f"_BASE_: {nano_mvit}\n")
    words = tiny_run(str(config), "DATASETS.TEST", "()")
    words[words.index("--dataset") + 1] = f"tiny={annotations}:{folder}"
    done = train_net(*words)
    assert done.returncode == 0, done.stderr
    assert "Logging error" not in done.stderr
    assert "config\\udcff.yaml" in (tmp_path / "output/log.txt").read_text()


def test_a_disk_that_is_full_is_told_once_without_tracebacks(tiny_run, nano_mvit, tmp_path):
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        f"sys.argv.pop(0); runpy.run_path({str(REPOSITORY / 'train_net.py')!r}, run_name='__main__')"
    )
    words = ["train_net.py", *tiny_run(nano_mvit, "DATASETS.TEST", "()")]
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("warning", "error"))]
    output = tmp_path / "output"
    assert lines[0] == (
        f"warning: the log goes on without {output}/log.txt, which cannot be written: File too large"
    )
    assert re.fullmatch(
        rf"error: {output}/model_final.pth cannot be written: File too large; \d+ MiB are free in {output}; "
        "the last checkpoint is none. Make room and go on with --resume",
        lines[1],
    )
    assert len(lines) == 2 and "the last checkpoint" not in done.stdout
    assert not list(output.glob(".part*")) and not (output / "run.lock").exists()


def test_without_torch_the_program_names_the_way_out_in_one_line():
    # Isolated and without site-packages, where torch is.
    command = [sys.executable, "-I", "-S", str(REPOSITORY / "train_net.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    way_out = "first 'source .venv/bin/activate', or 'make setup'"
    assert done.stderr == f"error: PyTorch is not installed in {sys.executable}; {way_out}\n"


def test_an_error_of_a_data_loader_worker_is_told_without_its_traceback():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    text += '  File "x", line 1\nValueError: image a.jpg: cannot be decoded\n'
    assert error_line(ValueError(text)) == "image a.jpg: cannot be decoded"
    assert error_line(ValueError("two\n  lines")) == "two lines"
    assert error_line(ValueError()) == "ValueError()"


def broken_dataset(tiny_dataset: str, folder: Path) -> str:
    """The tiny set, its images cut off in the middle."""
    annotations, _, images = tiny_dataset.partition("=")[2].partition(":")
    (folder / "images").mkdir()
    for image in Path(images).iterdir():
        content = image.read_bytes()
        (folder / "images" / image.name).write_bytes(content[: len(content) // 2])
    return f"broken={annotations}:{folder / 'images'}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_image_that_cannot_be_decoded_ends_every_process_with_one_line(
    tiny_run, nano_mvit, tiny_dataset, tmp_path, processes
):
    options = ("--dataset", broken_dataset(tiny_dataset, tmp_path), "--num-gpus", processes)
    done = train_net(*tiny_run(nano_mvit, "DATASETS.TRAIN", "('broken',)", options=options))
    assert done.returncode == 2
    # torch may have printed warnings of its own before.
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: image ") and "cannot be decoded" in last
    assert not [line for line in before if "rror" in line or "Traceback" in line]


@pytest.mark.slow
def test_two_processes_on_the_cpu_train_and_evaluate_as_one(tiny_run, nano_mvit, tmp_path):
    done = train_net(*tiny_run(nano_mvit, options=("--num-gpus", "2")))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert "bbox/AP" in records[-1] and "segm/AP" in records[-1]
    state = torch.load(tmp_path / "output/model_final.pth", weights_only=False)
    assert state["iteration"] == 1
    assert not [key for key in state["model"] if key.startswith("module.")]
    # Each process kept a log, and the second its own.
    assert (tmp_path / "output/log.txt.rank1").exists()
    # Images are shared out, and the results of both processes are evaluated together.
    results = torch.load(tmp_path / "output/inference/tiny/instances_predictions.pth", weights_only=False)
    assert sorted(result["image_id"] for result in results) == [1, 2, 3, 4]
