"""`rev-det doctor` finds what is broken and says how to mend it, also where Detectron2 is missing."""

import importlib
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rev_det import doctor
from rev_det.doctor import NOTE, OK, PROBLEM, Finding, examine
from rev_det_cli import main


def found(what):
    (finding,) = (finding for finding in examine() if finding.what == what)
    return finding


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: False)


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
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no problems"
    for what in (
        "Python",
        "rev_det",
        "PyTorch",
        "CUDA",
        "torchvision",
        "OpenCV",
        "Detectron2",
        "gradients on cpu",
    ):
        assert any(what in line for line in lines), what


def test_every_problem_comes_with_a_fix_and_exit_code_1(broken, capsys):
    broken("torchvision", RuntimeError("operator torchvision::nms does not exist"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem  torchvision" in out and "operator torchvision::nms does not exist" in out
    assert "fix: pip uninstall torch torchvision, then install both at once" in out
    assert out.endswith("\n1 problem\n")


@pytest.mark.parametrize(
    "module, error, what, fix",
    [
        ("cv2", ImportError("libGL.so.1: cannot open shared object file"), "OpenCV", r"-headless.*libgl1"),
        (
            "pkg_resources",
            ModuleNotFoundError("No module named 'pkg_resources'"),
            "pkg_resources",
            "setuptools<81",
        ),
        (
            "pycocotools.mask",
            ValueError("numpy.dtype size changed"),
            "pycocotools",
            "force-reinstall.*pycocotools",
        ),
        (
            "detectron2.data",
            AttributeError("module 'PIL.Image' has no attribute 'LINEAR'"),
            "Detectron2",
            "reinstall",
        ),
    ],
)
def test_a_package_that_does_not_import_is_a_problem(broken, module, error, what, fix):
    broken(module, error)
    finding = found(what)
    assert finding.status == PROBLEM
    assert f"import {module} fails: {type(error).__name__}: {error}" in finding.detail
    assert re.search(fix, finding.fix)


def test_an_extension_for_another_pytorch_is_as_good_as_none(broken, monkeypatch):
    absent = doctor._absent
    monkeypatch.setattr(doctor, "_absent", lambda name: name == "detectron2._C" or absent(name))
    finding = found("Detectron2's extension")
    assert finding.status == NOTE and finding.detail.startswith("not built, and not needed")
    monkeypatch.setattr(doctor, "_absent", absent)
    monkeypatch.setattr(doctor, "_absent", lambda name: name != "detectron2._C" and absent(name))
    broken("detectron2._C", ImportError("undefined symbol: _ZN3c10"))
    finding = found("Detectron2's extension")
    assert finding.status == NOTE and "undefined symbol" in finding.detail
    assert "built for another PyTorch" in finding.detail and "not needed" in finding.detail
    assert "no-build-isolation" in finding.fix


def test_an_old_pytorch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    finding = found("PyTorch")
    assert finding.status == PROBLEM and "torch>=2.6" in finding.fix
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git123")
    assert found("PyTorch").status == OK


def test_wrong_operators_are_a_problem(monkeypatch):
    import torchvision.ops

    monkeypatch.setattr(torchvision.ops, "nms", lambda *args: torch.tensor([0]))
    assert (found("torchvision").status, found("torchvision").detail) == (
        PROBLEM,
        "NMS or RoIAlign computes wrong results",
    )


def test_two_opencvs_are_worth_a_note(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "4.10" if "opencv-python" in name else version(name))
    finding = found("OpenCV")
    assert finding.status == NOTE and "opencv-python and opencv-python-headless" in finding.detail


def test_no_gpu_is_no_problem(without_gpu):
    assert found("CUDA") == Finding("CUDA", NOTE, "no NVIDIA GPU: everything runs on the CPU, nothing to set")


@pytest.mark.parametrize(
    "cuda, hidden, status, words",
    [
        ("13.0", None, PROBLEM, "cannot use it.*update the driver"),
        (None, None, PROBLEM, "built for the CPU.*install the CUDA build"),
        ("13.0", "", NOTE, "hidden by CUDA_VISIBLE_DEVICES.*unset it"),
    ],
)
def test_a_gpu_that_cannot_be_used(without_gpu, monkeypatch, cuda, hidden, status, words):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = found("CUDA")
    assert finding.status == status
    assert re.search(words, f"{finding.detail} {finding.fix}")


def test_a_check_that_fails_itself_is_a_problem_and_does_not_stop_the_others(monkeypatch):
    def odd_check():
        raise KeyError("oops")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (odd_check, *doctor.CHECKS))
    findings = examine()
    assert (findings[0].what, findings[0].status) == ("odd check", PROBLEM) and "oops" in findings[0].detail
    assert any(finding.what == "gradients on cpu" for finding in findings)


def test_the_self_check_is_exact_repeatable_and_sees_a_wrong_gradient(monkeypatch):
    state = torch.get_rng_state()
    error = doctor.gradient_error("cpu")
    assert 0 < error < 1e-5
    assert doctor.gradient_error("cpu") == error and torch.equal(torch.get_rng_state(), state)

    class Wrong(doctor.ReversibleSequence):
        def forward(self, x1, x2):
            y1, y2 = super().forward(x1, x2)
            return (y1 * 1.01, y2) if self.activations == "reversible" else (y1, y2)

    monkeypatch.setattr(doctor, "ReversibleSequence", Wrong)
    finding = found("gradients on cpu")
    assert finding.status == PROBLEM and "ACTIVATIONS cached" in finding.fix


def test_the_self_check_sees_nan_wherever_it_is(monkeypatch):
    class Broken(doctor._Block):
        def __init__(self, dim):
            super().__init__(dim)
            # Neither the first nor the last of the parameters.
            self.G[1].bias.register_hook(lambda grad: grad * float("nan"))

    monkeypatch.setattr(doctor, "_Block", Broken)
    assert math.isnan(doctor.gradient_error("cpu"))
    finding = found("gradients on cpu")
    assert finding.status == PROBLEM and finding.detail.endswith("relative error nan")


def test_the_self_check_sees_what_is_wrong_in_mixed_precision_with_kept_attention_alone(monkeypatch):
    class Wrong(doctor.ReversibleSequence):
        def forward(self, x1, x2):
            y1, y2 = super().forward(x1, x2)
            wrong = self.activations == "reversible" and self.keep_attention
            wrong = wrong and torch.get_autocast_dtype("cpu") is torch.bfloat16
            return (y1 * 1.1, y2) if wrong and torch.is_autocast_enabled("cpu") else (y1, y2)

    assert found("gradients on cpu in bfloat16").status == OK
    monkeypatch.setattr(doctor, "ReversibleSequence", Wrong)
    assert found("gradients on cpu").status == OK
    assert found("gradients on cpu in bfloat16").status == PROBLEM


def test_the_self_check_runs_a_fused_kernel():
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


def run_without_detectron2(folder, *arguments):
    """The command in a process where Detectron2 is not installed."""
    code = f"""
import sys, importlib.util
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith("detectron2") else real(name, *args)
sys.meta_path.insert(0, Hide())
from rev_det_cli import main
sys.exit(main({list(arguments)}))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True)


def test_without_detectron2_the_doctor_still_examines(tmp_path):
    done = run_without_detectron2(tmp_path, "doctor")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "problem  Detectron2" in done.stdout and "not installed" in done.stdout
    assert "make setup" in done.stdout and "detectron2.git@" in done.stdout
    assert "ok       gradients on cpu" in done.stdout and done.stdout.endswith("\n1 problem\n")


def test_without_detectron2_other_commands_send_to_the_doctor(tmp_path):
    done = run_without_detectron2(tmp_path, "predict", "photo.jpg")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: predict needs Detectron2, which is not installed\. .*`make setup`.*\n", done.stderr
    )


def test_with_a_broken_torchvision_other_commands_send_to_the_doctor(tmp_path):
    (tmp_path / "torchvision").mkdir()
    reason = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({reason!r})")
    code = "import sys; from rev_det_cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, "data", "check", "a=b:c"]
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    line = f"data needs Detectron2, which cannot be imported (RuntimeError: {reason}); run `rev-det doctor`"
    assert done.stderr == f"error: {line}\n"


def test_a_built_extension_names_its_compiler(monkeypatch, broken):
    extension = types.ModuleType("detectron2._C")
    extension.get_compiler_version = lambda: "GCC 12.2"
    monkeypatch.setitem(sys.modules, "detectron2._C", extension)
    monkeypatch.setattr(doctor, "_absent", lambda name: False)
    assert found("Detectron2's extension").detail == "built with GCC 12.2"


@pytest.mark.gpu
def test_the_gpu_is_named_and_its_gradients_checked():
    assert torch.cuda.get_device_name(0) in found("CUDA").detail
    assert found("gradients on cuda").status == OK
    mixed = [finding for finding in examine() if re.match("gradients on cuda in b?float16", finding.what)]
    assert [finding.status for finding in mixed] == [OK]
