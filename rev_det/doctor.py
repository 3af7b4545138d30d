"""What is wrong with an installation, and how to mend it. Needs neither Detectron2 nor what it needs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .modeling.attention import MultiHeadAttention
from .modeling.layers import ReversibleBlock
from .modeling.reversible import ReversibleSequence

OK, NOTE, PROBLEM = "ok", "note", "problem"
# Relative, in float32 and in mixed precision; what is measured is 1e-6 and 4e-3 and below.
_GRADIENT_TOLERANCES = (1e-3, 2e-2)
_BUILD_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@02b5c4e2'"
)
_INSTALL_DETECTRON2 = f"in a checkout of rev_det: make setup; elsewhere, with a compiler: {_BUILD_DETECTRON2}"
_COLLECTORS = (
    ("detectron2.utils.collect_env", "collect_env_info"),
    ("torch.utils.collect_env", "get_pretty_env_info"),
)


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        what: the thing.
        status: `OK`; `NOTE`, all works but something could be better; or `PROBLEM`.
        detail: what was found.
        fix: what to do; of a problem always.
    """

    what: str
    status: str
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything that rev_det needs; nothing is changed, nothing is downloaded.

    Returns:
        what was found, in the order in which to mend it.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        error = _error_of(findings.extend, check())
        if error:
            what = check.__name__.strip("_").replace("_", " ")
            fix = "this check itself failed; the other problems, mended first, may be the reason"
            findings.append(Finding(what, PROBLEM, _reason(error), fix))
    return findings


def describe_environment() -> str:
    """Versions, compilers and GPUs as Detectron2 collects them, or PyTorch where that does not work."""
    described: list[str] = []
    for module, function in _COLLECTORS:
        if not described:
            _error_of(lambda: described.append(getattr(importlib.import_module(module), function)()))  # noqa: B023
    return "".join(described)


def _pytorch() -> Iterator[Finding]:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    yield Finding("PyTorch", OK, f"{torch.__version__}, built for {built}, Python in {sys.executable}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if available:
        gpus = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        listed = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
        mixed = f"mixed precision in {_mixed_dtype('cuda')}".replace("torch.", "")
        yield Finding("CUDA", OK, f"{listed}; {mixed}")
    elif not (shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0")):
        yield Finding("CUDA", NOTE, "no NVIDIA GPU: everything runs on the CPU, nothing to set")
    elif torch.version.cuda is None:
        fix = "install the CUDA build: pip uninstall torch torchvision, then pip install torch torchvision"
        yield Finding("CUDA", PROBLEM, "there is a GPU, but this PyTorch is built for the CPU", fix)
    elif hidden in ("", "-1"):
        yield Finding("CUDA", NOTE, f"GPUs are hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset it")
    else:
        reason = f" ({_first_line(str(caught[0].message))})" if caught else ""
        fix = (
            f"run nvidia-smi: its CUDA version must be at least PyTorch's {torch.version.cuda}; update the "
            "driver, or install a PyTorch for an older CUDA "
            "(https://pytorch.org/get-started/previous-versions/)"
        )
        yield Finding("CUDA", PROBLEM, f"there is a GPU, but PyTorch cannot use it{reason}", fix)


def _torchvision() -> Iterator[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    error = _error_of(_try_operators, device)
    if error:
        fix = "pip uninstall torch torchvision, then install both at once: pip install torch torchvision"
        yield Finding("torchvision", PROBLEM, f"it does not work on {device}: {_reason(error)}", fix)
    else:
        yield Finding("torchvision", OK, f"NMS and RoIAlign work on {device}")


def _try_operators(device: str) -> None:
    from torchvision.ops import nms, roi_align

    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.5]], device=device)
    kept = nms(boxes, torch.tensor([0.5, 0.9], device=device), 0.5)
    pooled = roi_align(torch.ones(1, 1, 8, 8, device=device), [boxes], 2)
    if kept.tolist() != [1] or not torch.allclose(pooled, torch.ones_like(pooled)):
        raise RuntimeError("NMS or RoIAlign computes wrong results")


def _packages() -> Iterator[Finding]:
    """What pip knows to be missing or too old, and what cannot be imported."""
    command = [sys.executable, "-m", "pip", "check"]
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        # Of OpenCV any package will do.
        if line.startswith(("rev-det ", "rev_det ")) and "opencv" not in line:
            fix = "pip install --upgrade what it names; torch and torchvision together"
            yield Finding("packages", PROBLEM, line, fix)
    headless = (
        "pip uninstall opencv-python, then pip install opencv-python-headless; or, on Debian and Ubuntu as "
        "root, apt install libgl1 libglib2.0-0"
    )
    yield from _imports("OpenCV", ["cv2"], headless)
    broken = "pip install --force-reinstall --no-cache-dir pycocotools"
    yield from _imports("pycocotools", ["pycocotools.mask"], broken)


def _detectron2() -> Iterator[Finding]:
    if importlib.util.find_spec("detectron2") is None:
        yield Finding("Detectron2", PROBLEM, "not installed", _INSTALL_DETECTRON2)
        return
    fix = (
        "if it misses a package or pkg_resources: pip install 'rev_det[detectron2]'; otherwise reinstall it, "
        f"{_INSTALL_DETECTRON2}"
    )
    # The package itself imports little.
    parts = ("modeling", "data", "engine", "evaluation", "model_zoo")
    findings = [*_imports("Detectron2", ["detectron2", *(f"detectron2.{part}" for part in parts)], fix)]
    yield from findings
    if findings[0].status == PROBLEM:
        return
    # These import all other packages that rev_det needs.
    modules = ("rev_det.engine", "rev_det.predict", "rev_det.export", "rev_det.report")
    yield from _imports("rev_det", modules, "pip install --force-reinstall the package that it names")
    (extension,) = _imports("Detectron2's extension", ["detectron2._C"], "")
    if extension.status == PROBLEM:
        detail = f"{extension.detail}; only rotated boxes and deformable convolutions need it"
        yield Finding(extension.what, NOTE, detail, f"for those, with a compiler: {_BUILD_DETECTRON2}")


def _gradients() -> Iterator[Finding]:
    fix = "report it, with this output: training would go wrong; MODEL.REV.ACTIVATIONS cached avoids it"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype, tolerance in zip((None, _mixed_dtype(device)), _GRADIENT_TOLERANCES, strict=True):
            what = f"gradients on {device}" + (f" in {dtype}".replace("torch.", "") if dtype else "")
            error = gradient_error(device, dtype)
            detail = f"reversible against ordinary: relative error {error:.1e}"
            if error <= tolerance:  # which NaN is not
                yield Finding(what, OK, detail)
            else:
                yield Finding(what, PROBLEM, detail, fix)


def gradient_error(device: str, dtype: torch.dtype | None = None) -> float:
    """Train a few blocks of a Rev-ViT one step, forward and backward, in both ways.

    Args:
        device: to compute on.
        dtype: of mixed precision, in which results of attention are kept, as training does by default; None
            for float32, where they are computed again.

    Returns:
        the largest difference of any gradient to ordinary training's, over the largest of its values; NaN if
        there is one among them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A bias of the keys has no gradient but rounding.
        attentions = [MultiHeadAttention(32, num_heads=2, qkv_bias=False) for _ in range(8)]
        blocks = nn.ModuleList(ReversibleBlock(32, attn, mlp_ratio=4.0) for attn in attentions).to(device)
        x = torch.randn(2, 64, 32).to(device)
    gradients = {}
    for activations in ("cached", "reversible"):
        sequence = ReversibleSequence(blocks, activations=activations, keep_attention=dtype is not None)
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y1, y2 = sequence(x, x, (8, 8))
            loss = (y1 * y2).mean()
        gradients[activations] = torch.autograd.grad(loss, list(blocks.parameters()))
    errors = [
        (ours - theirs).abs().max() / theirs.abs().max()
        for ours, theirs in zip(gradients["reversible"], gradients["cached"], strict=True)
    ]
    # Python's own max overlooks NaN.
    return torch.stack(errors).max().item()


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _pytorch,
    _torchvision,
    _packages,
    _detectron2,
    _gradients,
)


def _mixed_dtype(device: str) -> torch.dtype:
    has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def _imports(what: str, modules: Iterable[str], fix: str) -> Iterator[Finding]:
    """Whether some modules can be imported, or which is the first that cannot."""
    for name in modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = _error_of(importlib.import_module, name)
        if error:
            yield Finding(what, PROBLEM, f"import {name} fails: {_reason(error)}", fix)
            return
    yield Finding(what, OK, f"works, {getattr(sys.modules[name], '__file__', '')}")


def _error_of(work: Callable[..., Any], *args: Any) -> BaseException | None:
    """What some work raises; a broken package may raise anything when it is imported."""
    try:
        work(*args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
