"""`rev-det doctor` finds what is broken and says how to mend it, also where Detectron2 is missing."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rev_det import doctor
from rev_det.doctor import NOTE, OK, PROBLEM, examine
from rev_det_cli import main

ROOT = Path(__file__).resolve().parents[1]


def found(what):
    (finding,) = (finding for finding in examine() if finding.what == what)
    return finding


@pytest.fixture
def broken(monkeypatch):
    """Make the import of a module fail."""

    def break_import(name, error):
        real = importlib.import_module

        def import_module(wanted, *args):
            if wanted == name:
                raise error
            return real(wanted, *args)

        monkeypatch.setattr(doctor.importlib, "import_module", import_module)

    return break_import


def test_this_environment_has_no_problems(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    environment, _, findings = out.partition("\n\n")
    assert re.search(rf"^PyTorch +{re.escape(torch.__version__)}", environment, re.MULTILINE)
    assert findings.endswith("\nno problems\n")
    for what in ("PyTorch", "torchvision", "OpenCV", "Detectron2", "rev_det", "gradients on cpu"):
        assert re.search(f"^ok +{what} ", findings, re.MULTILINE), what


def test_every_problem_comes_with_a_fix_and_exit_code_1(monkeypatch, capsys):
    import torchvision.ops

    monkeypatch.setattr(torchvision.ops, "nms", lambda *args: torch.tensor([0]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem  torchvision" in out and "NMS or RoIAlign computes wrong results" in out
    assert "fix: pip uninstall torch torchvision, then install both at once" in out
    assert out.endswith("\n1 problem\n")


@pytest.mark.parametrize(
    "module, error, what, fix",
    [
        ("cv2", ImportError("libGL.so.1: cannot open shared object file"), "OpenCV", "-headless.*libgl1"),
        ("pycocotools.mask", ValueError("numpy.dtype size changed"), "pycocotools", "force-reinstall"),
        ("detectron2.model_zoo", ImportError("pkg_resources"), "Detectron2", r"rev_det\[detectron2\]"),
        ("detectron2.data", SystemExit(3), "Detectron2", "reinstall"),
        ("detectron2.engine", GeneratorExit("as Rust's panic, no Exception"), "Detectron2", "reinstall"),
        ("rev_det.engine", ImportError("safetensors is broken"), "rev_det", "reinstall"),
    ],
)  # fmt: skip
def test_whatever_a_broken_package_raises_is_a_problem_with_a_fix(broken, module, error, what, fix):
    broken(module, error)
    finding = found(what)
    assert finding.status == PROBLEM and re.search(fix, finding.fix)
    assert f"import {module} fails: {type(error).__name__}: {error}" in finding.detail
    assert found("gradients on cpu").status == OK


def test_a_broken_extension_of_detectron2_is_worth_a_note(broken):
    broken("detectron2._C", ImportError("undefined symbol: _ZN3c10"))
    finding = found("Detectron2's extension")
    assert finding.status == NOTE and "undefined symbol" in finding.detail
    assert "only rotated boxes" in finding.detail and "no-build-isolation" in finding.fix


def test_packages_that_are_missing_or_old_are_problems(monkeypatch):
    lines = (
        "rev-det 0.1.0 has requirement torch>=2.6, but you have torch 2.5.1.",
        "rev_det 0.1.0 requires opencv-python, which is not installed.",  # another OpenCV will do
        "other 1 requires black, which is not installed.",
    )
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="\n".join(lines)))
    assert (found("packages").status, found("packages").detail) == (PROBLEM, lines[0])


@pytest.mark.parametrize(
    "driver, cuda, hidden, status, words",
    [
        (None, "13.0", None, NOTE, "no NVIDIA GPU: everything runs on the CPU"),
        ("nvidia-smi", "13.0", None, PROBLEM, "cannot use it.*update the driver"),
        ("nvidia-smi", None, None, PROBLEM, "built for the CPU.*install the CUDA build"),
        ("nvidia-smi", "13.0", "", NOTE, "hidden by CUDA_VISIBLE_DEVICES.*unset it"),
    ],
)
def test_a_gpu_that_is_missing_or_cannot_be_used(monkeypatch, driver, cuda, hidden, status, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = found("CUDA")
    assert finding.status == status
    assert re.search(words, f"{finding.detail} {finding.fix}")


@pytest.mark.parametrize("error", [KeyError("oops"), SystemExit("oops")])
def test_a_check_that_fails_itself_is_a_problem_and_does_not_stop_the_others(monkeypatch, error):
    def odd_check():
        yield doctor.Finding("first", OK, "")
        raise error

    monkeypatch.setattr(doctor, "CHECKS", (odd_check, *doctor.CHECKS))
    first, odd, *others = examine()
    assert (first.what, odd.what, odd.status) == ("first", "odd check", PROBLEM) and "oops" in odd.detail
    assert any(finding.what == "gradients on cpu" for finding in others)


# ---- the gradient check ----


def scale_outputs(monkeypatch, factor, wrong=lambda sequence: True):
    """Make what the reversible forward returns, and so its gradients, wrong."""

    class Wrong(doctor.ReversibleSequence):
        def forward(self, *args):
            y1, y2 = super().forward(*args)
            return (y1 * factor, y2) if self.activations == "reversible" and wrong(self) else (y1, y2)

    monkeypatch.setattr(doctor, "ReversibleSequence", Wrong)


def test_the_gradient_check_is_exact_repeatable_and_sees_a_wrong_gradient(monkeypatch):
    state = torch.get_rng_state()
    error = doctor.gradient_error("cpu")
    assert 0 < error < 1e-5
    assert doctor.gradient_error("cpu") == error and torch.equal(torch.get_rng_state(), state)
    scale_outputs(monkeypatch, 1.01)
    finding = found("gradients on cpu")
    assert finding.status == PROBLEM and "ACTIVATIONS cached" in finding.fix


def test_the_gradient_check_sees_nan_wherever_it_is(monkeypatch):
    class Broken(doctor.ReversibleBlock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # Neither the first nor the last of the parameters.
            self.F.norm.bias.register_hook(lambda grad: grad * float("nan"))

    monkeypatch.setattr(doctor, "ReversibleBlock", Broken)
    assert math.isnan(doctor.gradient_error("cpu"))
    finding = found("gradients on cpu")
    assert finding.status == PROBLEM and finding.detail.endswith("relative error nan")


def test_the_gradient_check_sees_what_is_wrong_in_mixed_precision_with_kept_attention_alone(monkeypatch):
    assert found("gradients on cpu in bfloat16").status == OK
    scale_outputs(
        monkeypatch, 1.1, lambda sequence: sequence.keep_attention and torch.is_autocast_enabled("cpu")
    )
    assert found("gradients on cpu").status == OK
    assert found("gradients on cpu in bfloat16").status == PROBLEM


def test_the_gradient_check_runs_a_fused_kernel():
    """Of an attention that is not fused nothing is kept, and there would be nothing to check."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func is fused
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        doctor.gradient_error("cpu", torch.bfloat16)
    # Eight blocks in each of two forward passes; the rebuild takes what was kept.
    assert counting.calls == 16


@pytest.mark.gpu
def test_the_gpu_is_named_and_its_gradients_checked():
    assert torch.cuda.get_device_name(0) in found("CUDA").detail
    assert found("gradients on cuda").status == OK
    mixed = [finding for finding in examine() if re.match("gradients on cuda in b?float16", finding.what)]
    assert [finding.status for finding in mixed] == [OK]


# ---- the commands where a package is missing or broken ----


def run(folder, *arguments, hook=""):
    code = f"import sys\n{hook}\nfrom rev_det_cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environ = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


WITHOUT_DETECTRON2 = """
import importlib.util
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith("detectron2") else real(name, *args)
sys.meta_path.insert(0, Hide())
"""


def test_without_detectron2_the_doctor_examines_and_other_commands_say_what_to_do(tmp_path):
    done = run(tmp_path, "doctor", hook=WITHOUT_DETECTRON2)
    assert (done.returncode, done.stderr) == (1, "")
    assert "PyTorch version: " in done.stdout  # torch's own description of the environment
    assert re.search("problem  Detectron2 +not installed\n +fix: .*make setup.*detectron2.git@", done.stdout)
    assert "ok       gradients on cpu" in done.stdout and done.stdout.endswith("\n1 problem\n")
    done = run(tmp_path, "predict", "photo.jpg", hook=WITHOUT_DETECTRON2)
    words = r"error: predict needs Detectron2, which is not installed\. .*`make setup`.*\n"
    assert done.returncode == 2 and re.fullmatch(words, done.stderr)


def test_with_a_broken_torchvision_other_commands_send_to_the_doctor(tmp_path):
    reason = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({reason!r})")
    done = run(tmp_path, "data", "check", "a=b:c")
    line = f"data needs Detectron2, which cannot be imported (RuntimeError: {reason}); run `rev-det doctor`"
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    done = run(tmp_path, "doctor")
    assert done.returncode == 1 and "fix: pip uninstall torch torchvision" in done.stdout
