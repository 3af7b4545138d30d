"""Runs of several processes, and runs that are killed, through the command itself."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rev_det.data import generate_shapes
from rev_det.engine.metrics import read_metrics

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_NET = str(REPOSITORY / "train_net.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

# Mask R-CNN averages over the RoIs of one forward pass, so that its losses depend on how images are shared
# out. The losses of the proposal network are means over images, once all anchors are sampled.
BY_IMAGE = {
    "MODEL.META_ARCHITECTURE": "ProposalNetwork",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "100000",
    "SOLVER.MAX_ITER": "8",
    "SOLVER.IMS_PER_BATCH": "4",
    "SEED": "7",
    "DATASETS.TEST": "()",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("shapes")
    annotations, images = generate_shapes(str(root), "train", num_images=16, size=64)
    return f"some={annotations}:{images}"


@pytest.fixture
def command(dataset, nano_mvit, tmp_path):
    """The arguments of train_net.py that write to ``tmp_path / name``."""

    def arguments(name: str, *options: str, config: str = nano_mvit, **settings: str) -> list[str]:
        keys = {
            "MODEL.DEVICE": "cpu",
            "DATASETS.TRAIN": "('some',)",
            "DATASETS.TEST": "('some',)",
            "INPUT.MIN_SIZE_TRAIN": "(64,)",
            "INPUT.MIN_SIZE_TEST": "64",
            "SOLVER.WARMUP_ITERS": "0",
            "TEST.EVAL_PERIOD": "0",
            "OUTPUT_DIR": str(tmp_path / name),
        }
        keys |= {key.replace("__", "."): value for key, value in settings.items()}
        words = [word for pair in keys.items() for word in pair]
        return ["--config-file", config, "--dataset", dataset, *options, *words]

    return arguments


def dotted(settings: dict[str, str]) -> dict[str, str]:
    return {key.replace(".", "__"): value for key, value in settings.items()}


def start(*command: str) -> subprocess.Popen:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENVIRONMENT,
        start_new_session=True,
        # Shells have programs in the background ignore Ctrl-C, and these would inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **output,
    )


def finish(process: subprocess.Popen) -> str:
    text = process.communicate()[0]
    assert process.returncode == 0, text[-3000:]
    return text


def records(folder: Path) -> list[dict]:
    return read_metrics(str(folder / "metrics.json"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_processes_machines_torchrun_and_accumulation_train_as_one_process(command, tmp_path):
    by_image = dotted(BY_IMAGE)
    finish(start(TRAIN_NET, *command("one", **by_image)))
    finish(start(TRAIN_NET, *command("two", "--num-gpus", "2", **by_image)))
    finish(start(TRAIN_NET, *command("accumulated", **by_image, SOLVER__ACCUMULATE="2")))
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = [
        start(
            TRAIN_NET,
            *command(
                "machines", *("--num-machines", "2", "--machine-rank", rank, "--dist-url", url), **by_image
            ),
        )
        for rank in "01"
    ]
    for machine in machines:
        finish(machine)
    port = f"--master-port={free_port()}"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", port)
    finish(start(*torchrun, TRAIN_NET, *command("torchrun", **by_image)))

    expected = torch.load(tmp_path / "one/model_final.pth", weights_only=True)["model"]
    losses = records(tmp_path / "one")[-1]
    for name in ("two", "accumulated", "machines", "torchrun"):
        model = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for key, value in expected.items():
            # AdamW divides by the size of a gradient, and so enlarges the rounding of the smallest.
            torch.testing.assert_close(model[key], value, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")
        last = records(tmp_path / name)[-1]
        for key in ("total_loss", "loss_rpn_cls", "loss_rpn_loc"):
            assert last[key] == pytest.approx(losses[key], rel=1e-4), (name, key)
    assert len(json.loads((tmp_path / "two/summary.json").read_text())["peak_memory_mib_by_process"]) == 2


@pytest.mark.parametrize("mode", ["FIND_UNUSED_PARAMETERS", "STATIC_GRAPH", "COMPRESSION"])
def test_every_way_to_exchange_gradients_trains_with_frozen_parts_and_accumulation(command, tmp_path, mode):
    settings = {"SOLVER__MAX_ITER": "3", "SOLVER__IMS_PER_BATCH": "8", "DATASETS__TEST": "()", "SEED": "7"}
    settings |= {"SOLVER__ACCUMULATE": "2", "MODEL__REV__FREEZE_AT": "2"}
    losses = []
    for name, value in {"plain": None, mode: "bf16" if mode == "COMPRESSION" else "True"}.items():
        chosen = {f"SOLVER__DDP__{mode}": value} if value else {}
        finish(start(TRAIN_NET, *command(name, "--num-gpus", "2", **settings, **chosen)))
        losses.append(records(tmp_path / name)[-1]["total_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if mode == "COMPRESSION" else 1e-4)


@pytest.mark.parametrize("launcher", ["num-gpus", "torchrun", "none"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_processes_that_are_asked_to_stop_are_resumed_exactly(command, tmp_path, launcher, number):
    settings = {"SOLVER__MAX_ITER": "30", "SOLVER__IMS_PER_BATCH": "4", "DATASETS__TEST": "()", "SEED": "7"}
    settings |= {"MODEL__REV_MVIT__DROP_PATH_RATE": "0.3", "SOLVER__CHECKPOINT_PERIOD": "10"}
    settings |= {"DATALOADER__NUM_WORKERS": "1"}

    def launch(name: str, *options: str) -> subprocess.Popen:
        if launcher != "torchrun":
            processes = "2" if launcher == "num-gpus" else "1"
            return start(TRAIN_NET, *command(name, "--num-gpus", processes, *options, **settings))
        words = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
        return start(*words, TRAIN_NET, *command(name, *options, **settings))

    finish(launch("whole"))
    process = launch("stopped")
    for line in process.stdout:
        if "Saving checkpoint" in line:
            break
    # Ctrl-C goes to all that the terminal sees, workers of the data loader included.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    text = process.communicate()[0]
    # torchrun has an exit code, and a traceback, of its own.
    assert process.returncode == (1 if launcher == "torchrun" else 128 + number), text[-3000:]
    assert launcher == "torchrun" or "Traceback" not in text
    said = [line for line in text.splitlines() if "Ctrl-C" in line]
    assert len(said) == (number == signal.SIGINT), said
    stopped_at = int((tmp_path / "stopped/last_checkpoint").read_text()[6:13])
    assert 10 <= stopped_at < 29
    finish(launch("stopped", "--resume"))
    assert_equal_ends(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_second_ctrl_c_ends_all_processes_in_the_middle_of_a_step(command, tmp_path, processes):
    settings = {"SOLVER__IMS_PER_BATCH": "512", "SOLVER__ACCUMULATE": "64", "DATASETS__TEST": "()"}
    settings |= {"DATALOADER__NUM_WORKERS": "1"}
    process = start(TRAIN_NET, *command("stopped", "--num-gpus", processes, **settings))
    for awaited in ("Starting training", "a second Ctrl-C"):
        for line in process.stdout:
            if awaited in line:
                break
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
    # Until the last of them has closed it.
    text = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGINT, text[-3000:]
    assert "Traceback" not in text
    assert not list((tmp_path / "stopped").glob("*.pth"))


def test_processes_whose_parent_is_killed_end(command, tmp_path):
    process = start(TRAIN_NET, *command("orphaned", "--num-gpus", "2", DATASETS__TEST="()"))
    for line in process.stdout:
        if "Starting training" in line:
            break
    process.kill()
    # Until the last of them has closed it.
    process.communicate(timeout=60)
    assert not (tmp_path / "orphaned/model_final.pth").exists()


def assert_equal_ends(folder: Path, whole: Path) -> None:
    """Weights, optimizer and position in the data, bit for bit."""
    ends = [torch.load(f / "model_final.pth", weights_only=True) for f in (folder, whole)]
    assert ends[0]["iteration"] == ends[1]["iteration"]
    for name, value in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], value), name
    states = [end["trainer"]["_trainer"] for end in ends]
    for key, value in states[1]["optimizer"]["state"].items():
        for name, moment in value.items():
            assert torch.equal(states[0]["optimizer"]["state"][key][name], moment), (key, name)
    assert states[0]["data_loader"] == states[1]["data_loader"]


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(command, tmp_path):
    settings = {
        "SOLVER__MAX_ITER": "120",
        "SOLVER__IMS_PER_BATCH": "2",
        "SEED": "7",
        "TEST__EVAL_PERIOD": "40",
    }
    settings |= {"MODEL__REV_MVIT__DROP_PATH_RATE": "0.3", "SOLVER__CHECKPOINT_PERIOD": "8"}
    settings |= {"SOLVER__CHECKPOINT_KEEP": "3", "DATALOADER__NUM_WORKERS": "1"}
    finish(start(TRAIN_NET, *command("whole", **settings)))
    draw = random.Random(0)
    # In a checkpoint, in an evaluation, and some time after the first iterations.
    moments = ["Saving checkpoint", "Start inference", "random"] * 3 + ["random"]
    begun, kills = [], 0
    for moment in moments:
        process = start(TRAIN_NET, *command("killed", "--resume", **settings))
        awaited = "Starting training" if moment == "random" else moment
        for line in process.stdout:
            if "Starting training from iteration" in line:
                begun.append(int(line.split()[-1]))
            if awaited in line:
                break
        time.sleep(draw.uniform(0, 8) if moment == "random" else draw.uniform(0, 0.05))
        kills += process.poll() is None
        # On a fast machine the last of them finds nothing left to train.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    text = finish(start(TRAIN_NET, *command("killed", "--resume", **settings)))
    assert kills >= 8
    # It went on, and never from further back than a period.
    assert begun == sorted(begun) and begun[-1] >= 8
    assert "Traceback" not in text and "error:" not in text
    assert_equal_ends(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".part*"))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")]
    for key in ("metrics", "best"):
        assert summaries[0][key] == summaries[1][key]


def test_the_3x_schedule_in_miniature_passes_every_milestone(command, nano_mvit, tmp_path):
    config = nano_mvit.replace("_fpn.yaml", "_fpn_3x.yaml")
    settings = {"SOLVER__IMS_PER_BATCH": "32", "SOLVER__ACCUMULATE": "2", "SOLVER__WARMUP_ITERS": "16"}
    text = finish(start(TRAIN_NET, *command("3x", config=config, **settings)))
    assert "written for 64 images per step and was rescaled to 32" in text
    assert "SOLVER.MAX_ITER 60 -> 120" in text and "SOLVER.STEPS (45, 55) -> (90, 110)" in text
    rates = {record["iteration"]: record["lr"] for record in records(tmp_path / "3x") if "lr" in record}
    full = 0.004 / 2**0.5
    # In the warm-up, after it, and behind each of the two steps.
    assert rates[79] == pytest.approx(full)
    assert rates[99] == pytest.approx(full / 10)
    assert rates[119] == pytest.approx(full / 100)
    assert json.loads((tmp_path / "3x/summary.json").read_text())["accumulate"] == 2
