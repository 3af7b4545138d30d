"""`make gpu` without a GPU: parts run, fail, stop and are skipped as it says; the page is of its results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """benchmarks/gpu.py, with no images carried along."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "CARRIED_DATA", tmp_path / "none")
    return gpu


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_parts

    return gpu_parts


@pytest.fixture
def run(parts, tmp_path):
    """A trial on the CPU."""
    deadline = time.monotonic() + 600
    return parts.Run(str(tmp_path / "part.json"), torch.device("cpu"), True, deadline, "")


def trial(folder, *words):
    return ["--quick", "--device", "cpu", "--results", str(folder), "--parts", *words]


@pytest.mark.slow
def test_a_part_that_fails_stops_no_other_and_what_is_finished_is_skipped(gpu, tmp_path, capsys):
    # There is no limit on the CPU's memory.
    assert gpu.main(trial(tmp_path, "batch_mvit", "doctor")) == 1
    assert "2 parts, 10 minutes at most: batch_mvit doctor" in capsys.readouterr().out
    failed, done = (
        json.loads((tmp_path / f"gpu_{name}.json").read_text()) for name in ("batch_mvit", "doctor")
    )
    assert "failed: ValueError: the largest batch is found under a limit" in failed["error"]
    assert done["error"] == "" and done["is_trial"] and done["machine"]["torch"] == torch.__version__
    assert "gradients on cpu" in [row["labels"]["what"] for row in done["rows"]]
    assert str(Path(sys.executable).parent) not in json.dumps(done), "the file names a folder of this machine"

    before = (tmp_path / "gpu_doctor.json").stat().st_mtime_ns
    assert gpu.main(trial(tmp_path, "doctor", "nano")) == 0
    out = capsys.readouterr().out
    assert "0 parts" in out and "skipped: it needs images" in out
    assert "doctor       finished on" in out
    assert (tmp_path / "gpu_doctor.json").stat().st_mtime_ns == before

    # Too short for Python to start: repeated, stopped, and saved as that.
    assert gpu.main([*trial(tmp_path, "doctor"), "--force", "--minutes", "0.005"]) == 1
    assert json.loads((tmp_path / "gpu_doctor.json").read_text())["error"] == "stopped after 0.005 minutes"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_part_is_saved_and_leaves_no_process(number, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *trial(tmp_path, "depth", "doctor")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # The first row has come.
        next(line for line in process.stdout if line.startswith("Rev-MViT-B, cached"))
        process.send_signal(number)
        # Ends only when nothing holds the pipe any more, the part included.
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    saved = json.loads((tmp_path / "gpu_depth.json").read_text())
    assert saved["error"] == "interrupted" and len(saved["rows"]) >= 1
    assert not (tmp_path / "gpu_doctor.json").exists()
    assert "depth        failed: interrupted" in out


def test_a_trial_is_not_saved_among_the_measurements(gpu, monkeypatch, capsys):
    for machine, quick in (
        ({"gpu": "stub sm_90"}, []),
        ({"cpu": "a CPU"}, []),
        ({"gpu": "H100"}, ["--quick"]),
    ):
        monkeypatch.setattr(gpu, "in_a_process", lambda *_, machine=machine, **__: (machine, ""))
        assert gpu.main(["--results", str(gpu.RESULTS), "--parts", "doctor", *quick]) == 2
        assert "is for measurements on a GPU" in capsys.readouterr().err


def test_a_machine_without_the_device_is_told_so(gpu, tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert "error: there is no CUDA device here; --device cpu --quick tries" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_part_takes_more_than_eight_minutes(gpu):
    assert max(part.minutes for part in gpu.PARTS.values()) <= 8 and len(gpu.PARTS) == 14


def test_a_measured_step_stands_beside_its_count_and_the_cached_one(parts, run):
    cases = [case for case in parts.backbones(run, "bf16") if case.model.title == "Rev-ViT-B"]
    run.compare(cases[:2], parts.beside_the_count)
    cached, reversible = json.loads(Path(run.path).read_text())["rows"]
    assert reversible["labels"]["training"] == "reversible, attention kept"
    assert reversible["figures"]["timed steps"]["value"] == 2
    assert reversible["figures"]["peak memory, counted"]["method"] == "counted"
    ours, theirs = (row["figures"]["time"]["value"] for row in (reversible, cached))
    assert reversible["figures"]["time, relative"]["value"] == pytest.approx(ours / theirs)


def test_a_case_that_fails_or_has_no_time_is_a_row_that_says_so(parts, run):
    def step(run, case, share):
        if case is cases[0]:
            raise RuntimeError("the device is gone\nat line 5")
        run.deadline = time.monotonic() + 1
        return parts.Row(case.labels, {"time": parts.measured(share, "s")})

    cases = parts.backbones(run, "bf16")[:3]
    run.compare(cases, step)
    assert run.rows[0].note == "failed: RuntimeError: the device is gone"
    # Its share of ten minutes, of which the first case used none.
    assert run.rows[1].figures["time"].value == pytest.approx(300, rel=0.2)
    assert run.rows[2].note == "not reached in the time of this part"


def test_steps_with_changing_shapes_are_timed_with_cudnn_on_and_off(parts, run):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    (case,) = [case for case in parts.detectors(run, "vit") if case.training == "cached"]
    figures = parts.shapes_row(run, case, share=1).figures
    for state in ("on", "off"):
        first, again = (
            figures[f"{name}, cuDNN attention {state}"].value for name in ("new shapes", "the same again")
        )
        assert min(first, again) > 0
        lost = figures[f"lost by a new shape, cuDNN attention {state}"].value
        assert lost == pytest.approx(1e3 * (first - again))
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_shapes_are_distinct_once_padded(parts):
    sizes = parts.multi_scale_shapes(100, 1333)
    assert len({(-(-h // 32), -(-w // 32)) for h, w in sizes}) == 100
    assert all(479 <= min(size) <= 800 and max(size) <= 1333 for size in sizes)


def test_the_largest_batch_is_found_under_each_limit(parts, run, monkeypatch):
    """A GPU whose allocator wastes 5 %, and a count that knows nothing of that."""
    tries = []

    class Measuring:
        def __init__(self, device, warm_up, steps, limit):
            self.limit = limit

        def try_measure(self, case, warm_up, steps):
            tries.append(case.batch)
            if 1.05 * 10**6 * (400 + 30 * case.batch) > self.limit:
                return None
            return SimpleNamespace(images_per_second=2.0 * case.batch)

    monkeypatch.setattr(parts, "Measuring", Measuring)
    monkeypatch.setattr(parts, "memory_by_images", lambda case: (430 * 10**6, 30 * 10**6))
    run.device, run.quick = torch.device("cuda"), False
    (case, *_) = parts.backbones(run, "bf16")
    found = parts.largest_row(run, case, 1, (10**9, 20 * 10**9, 10**8)).figures
    assert {name: figure.value for name, figure in found.items()} == {
        "largest batch in 1 GB": 18,
        "throughput in 1 GB": 36,
        "largest batch in 20 GB": 621,
        "throughput in 20 GB": 1242,
        "largest batch in 0.1 GB": 0,
    }
    # Every try is a model built and three steps.
    assert len(tries) <= 25


def test_kernels_are_told_apart_by_what_launched_them(parts, tmp_path):
    # The operators of a real trace, each given a kernel of the time that stands here in microseconds.
    expected = {
        "aten::mm": ("matrix products", 1000),
        "aten::native_layer_norm": ("norms", 200),
        "aten::copy_": ("casts", 30),
        "aten::convolution": ("convolution", 4000),
        "aten::gelu": ("elementwise and all else", 50),
        "aten::scaled_dot_product_attention": ("attention", 700),
    }
    x, image = torch.rand(2, 8), torch.rand(1, 1, 4, 4)
    mlp, conv = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.GELU()), nn.Conv2d(1, 1, 2)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        mlp(x).bfloat16()
        conv(image)
        nn.functional.scaled_dot_product_attention(*[x.view(1, 1, 2, 8)] * 3)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    # The first of each name.
    operators = {event["name"]: event for event in reversed(events) if event.get("cat") == "cpu_op"}
    for name, (_, microseconds) in expected.items():
        identity = operators[name]["args"]["External id"]
        events.append({"cat": "kernel", "name": "k", "dur": microseconds, "args": {"External id": identity}})
    events.append({"cat": "gpu_memset", "name": "Memset (Device)", "dur": 6, "args": {}})
    events.append({"cat": "kernel", "name": "nvjet_hsh_128x256", "dur": 8, "args": {}})
    times, launches = parts.kernel_times(events)
    assert launches == len(expected) + 1
    assert times == pytest.approx(
        {kind: microseconds / 1e3 for kind, microseconds in expected.values()}
        | {"matrix products": 1.008, "copies and fills": 0.006}
        | {"NMS and RoIAlign": 0, "optimizer and clipping": 0}
    )
    with pytest.raises(RuntimeError, match="saw no kernel"):
        parts.kernel_times([event for event in events if event.get("cat") == "cpu_op"])


@pytest.mark.slow
def test_losses_and_ap_of_both_ways_of_training_are_kept(parts, run, tmp_path):
    from rev_det.data import generate_shapes

    annotations, images = generate_shapes(str(tmp_path / "shapes"), "train", num_images=4, size=64)
    run.data = str(tmp_path / "data")
    os.mkdir(run.data)
    shutil.copy(annotations, os.path.join(run.data, "instances_train.json"))
    os.symlink(images, os.path.join(run.data, "images"))
    parts.nano(run)
    saved = json.loads(Path(run.path).read_text())
    assert saved["data"] == "data/instances_train.json"
    assert saved["losses"].keys() == {"reversible", "cached"}
    reversible, cached = saved["rows"]
    assert 0 <= reversible["figures"]["mask AP"]["value"] <= 100
    assert cached["figures"]["losses apart"]["value"] < 1, "the first steps of both are the same"


def result(gpu, name, error="", is_trial=False):
    figure = {"value": 0.25, "unit": "s", "method": "measured"}
    rows = [
        {"labels": {"model": "M", "training": mode}, "figures": {"mean": figure}, "note": note}
        for mode, note in (("cached", ""), ("reversible", "out of memory"))
    ]
    return {
        "title": gpu.PARTS[name].title,
        "command": f"python benchmarks/gpu.py --parts {name}",
        "date": "2030-01-02T03:04+00:00",
        "is_trial": is_trial,
        "machine": {"gpu": "H100", "torch": "2.11.0"},
        "rows": rows,
        "remarks": ["Read this."],
        "error": error,
    }


def test_the_page_shows_what_was_measured_and_what_is_owed(gpu, tmp_path):
    contents = {
        "step_mvit": result(gpu, "step_mvit"),
        "depth": result(gpu, "depth", "ended by signal 9"),
        "kernels": result(gpu, "kernels", is_trial=True),
    }
    for name, content in contents.items():
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps(content))
    page = gpu.page(gpu.read_results(tmp_path))
    measured, owed = page.split("## What is owed")
    assert "H100, torch 2.11.0; 2030-01-02: `python benchmarks/gpu.py --parts step_mvit`" in measured
    assert (
        "M\n\n| training | note | mean (s, measured) |\n| --- | --- | --- |\n| cached |  | 0.250 |\n"
        in measured
    )
    assert "| reversible | out of memory | 0.250 |" in measured and "Read this." in measured
    assert "**Not complete**: ended by signal 9." in measured
    assert gpu.PARTS["kernels"].title not in measured
    assert "| depth |" in owed and "| kernels |" in owed and "| step_mvit |" not in owed


def test_without_results_the_page_lists_every_part(gpu):
    page = gpu.page({})
    assert "**No figure has been measured on a GPU yet" in page
    for name, part in gpu.PARTS.items():
        assert f"| {name} | {part.title} | {part.minutes:g} |" in page


def test_the_page_is_that_of_the_results(gpu):
    assert gpu.PAGE.read_text(encoding="utf-8") == gpu.page(gpu.read_results(gpu.RESULTS)), (
        "run python benchmarks/gpu.py --page"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_runs_in_the_python_that_is_given_and_installs_nothing():
    words = ["gpu", "PYTHON=some-python", "PARTS=doctor tests", "GPU_DATA=a folder", "FORCE=1", "MINUTES=5"]
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(
        ["make", "--dry-run", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    line = " ".join(done.stdout.replace("\\\n", " ").split())
    assert line == (
        'some-python benchmarks/gpu.py --parts doctor tests --data "a folder" --force --minutes 5'
    )
