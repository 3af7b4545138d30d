"""What is wrong with an installation, and how to mend it. Needs neither Detectron2 nor what it needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from . import __version__
from .modeling.kept_attention import attention
from .modeling.reversible import ReversibleSequence

OK, NOTE, PROBLEM = "ok", "note", "problem"
_MIN_TORCH = (2, 6)
# Relative, in float32 and in mixed precision; what is measured is 1e-6 and 1e-3 and below.
_GRADIENT_TOLERANCES = (1e-3, 1e-2)
_BUILD_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@02b5c4e2'"
)
_INSTALL_DETECTRON2 = f"in a checkout of rev_det: make setup; elsewhere, with a compiler: {_BUILD_DETECTRON2}"
_OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
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
        # A broken package may raise anything when it is imported, which is what is to be found out.
        try:
            findings += check()
        except Exception as error:
            what = check.__name__.strip("_").replace("_", " ")
            fix = "this check itself failed; the other problems, mended first, may be the reason"
            findings.append(Finding(what, PROBLEM, _reason(error), fix))
    return findings


def _python() -> Iterator[Finding]:
    yield Finding("Python", OK, f"{platform.python_version()}, {sys.executable}")
    yield Finding("rev_det", OK, f"{__version__}, {Path(__file__).parent}")


def _pytorch() -> Iterator[Finding]:
    detail = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'}"
    if _numbers(torch.__version__)[:2] < _MIN_TORCH:
        wanted = ".".join(map(str, _MIN_TORCH))
        yield Finding("PyTorch", PROBLEM, detail, f"pip install --upgrade 'torch>={wanted}' torchvision")
    else:
        yield Finding("PyTorch", OK, detail)
    yield _cuda()


def _cuda() -> Finding:
    driver = shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        gpus = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        listed = "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
        return Finding("CUDA", OK, f"{listed}; mixed precision in {'bfloat16' if bf16 else 'float16'}")
    if not driver:
        return Finding("CUDA", NOTE, "no NVIDIA GPU: everything runs on the CPU, nothing to set")
    if torch.version.cuda is None:
        fix = "install the CUDA build: pip uninstall torch torchvision, then pip install torch torchvision"
        return Finding("CUDA", PROBLEM, "there is a GPU, but this PyTorch is built for the CPU", fix)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return Finding("CUDA", NOTE, f"GPUs are hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset it")
    reason = f" ({_first_line(str(caught[0].message))})" if caught else ""
    fix = (
        f"run nvidia-smi: its CUDA version must be at least PyTorch's {torch.version.cuda}; update the "
        "driver, or install a PyTorch for an older CUDA (https://pytorch.org/get-started/previous-versions/)"
    )
    return Finding("CUDA", PROBLEM, f"there is a GPU, but PyTorch cannot use it{reason}", fix)


def _torchvision() -> Iterator[Finding]:
    fix = "pip uninstall torch torchvision, then install both at once: pip install torch torchvision"
    torchvision, finding = _import("torchvision", fix)
    if torchvision is None:
        yield finding
        return
    from torchvision.ops import nms, roi_align

    device = "cuda" if torch.cuda.is_available() else "cpu"
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.5]], device=device)
    try:
        kept = nms(boxes, torch.tensor([0.5, 0.9], device=device), 0.5).tolist()
        pooled = roi_align(torch.ones(1, 1, 8, 8, device=device), [boxes], 2)
    except (RuntimeError, NotImplementedError) as error:
        yield Finding("torchvision", PROBLEM, f"its operators do not work on {device}: {_reason(error)}", fix)
        return
    if kept != [1] or not torch.allclose(pooled, torch.ones_like(pooled)):
        yield Finding("torchvision", PROBLEM, "NMS or RoIAlign computes wrong results", fix)
    else:
        yield Finding("torchvision", OK, f"{torchvision.__version__}, NMS and RoIAlign work on {device}")


def _setuptools() -> Iterator[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, finding = _import("pkg_resources", "pip install 'setuptools<81': Detectron2 needs it")
    detail = f"{_version('setuptools')}, has the pkg_resources that Detectron2 needs"
    yield Finding("setuptools", OK, detail) if module else finding


def _opencv() -> Iterator[Finding]:
    installed = [name for name in _OPENCV if _version(name)]
    name = installed[0] if installed else "opencv-python"
    headless = name if name.endswith("-headless") else f"{name}-headless"
    fix = (
        f"pip uninstall {' '.join(installed) or name}, then pip install {headless}; or, on Debian and Ubuntu "
        "as root, apt install libgl1 libglib2.0-0"
    )
    module, finding = _import("cv2", fix, "OpenCV")
    if module is None:
        yield finding
    elif len(installed) > 1:
        fix = f"pip uninstall {' '.join(installed)}, then install one of them"
        yield Finding("OpenCV", NOTE, f"{' and '.join(installed)} overwrite each other", fix)
    else:
        yield Finding("OpenCV", OK, f"{module.__version__}, {name}")


def _detectron2() -> Iterator[Finding]:
    if _absent("detectron2"):
        yield Finding("Detectron2", PROBLEM, "not installed", _INSTALL_DETECTRON2)
        return
    fix = f"mend what it names, or reinstall it: {_INSTALL_DETECTRON2}"
    module, finding = _import("detectron2", fix, "Detectron2")
    # The package itself imports little: what a detector needs is looked at, too.
    for part in ("modeling", "data", "engine", "evaluation", "model_zoo"):
        if module is not None and finding.status != PROBLEM:
            finding = _import(f"detectron2.{part}", fix, "Detectron2")[1]
    if module is None or finding.status == PROBLEM:
        yield finding
        return
    yield Finding(
        "Detectron2", OK, f"{module.__version__}, {_distribution('detectron2')}, {module.__path__[0]}"
    )
    yield _extension()


def _extension() -> Finding:
    what = "Detectron2's extension"
    found = "not built"
    if not _absent("detectron2._C"):
        module, failure = _import("detectron2._C", "", what)
        if module is not None:
            return Finding(what, OK, f"built with {module.get_compiler_version()}")
        found = f"built for another PyTorch ({failure.detail})"
    detail = "and not needed: NMS and RoIAlign are torchvision's; rotated boxes and deformable convolutions"
    return Finding(
        what, NOTE, f"{found}, {detail} do not work", f"for those, with a compiler: {_BUILD_DETECTRON2}"
    )


def _other_packages() -> Iterator[Finding]:
    broken = False
    for name in (
        "numpy",
        "PIL",
        "pycocotools.mask",
        "fvcore",
        "iopath",
        "matplotlib",
        "safetensors",
        "omegaconf",
    ):
        package = {"PIL": "Pillow"}.get(name, name.partition(".")[0])
        fix = f"pip install --force-reinstall --no-cache-dir {package}"
        module, finding = _import(name, fix)
        if module is None:
            broken = True
            yield finding
    if not broken:
        yield Finding(
            "other packages", OK, f"numpy {_version('numpy')}, pycocotools, fvcore and others can be imported"
        )
    if _absent("faster_coco_eval"):
        detail = "evaluation is pycocotools', several times slower than it could be"
        yield Finding("COCO evaluation", NOTE, detail, "pip install faster-coco-eval")
    else:
        yield Finding("COCO evaluation", OK, f"faster-coco-eval {_version('faster-coco-eval')}")


def _reversible_gradients() -> Iterator[Finding]:
    fix = "report it, with this output: training would go wrong; MODEL.REV.ACTIVATIONS cached avoids it"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        mixed = torch.bfloat16 if has_bf16 else torch.float16
        for dtype, tolerance in zip((None, mixed), _GRADIENT_TOLERANCES, strict=True):
            what = f"gradients on {device}" + (f" in {dtype}".replace("torch.", "") if dtype else "")
            error = gradient_error(device, dtype)
            detail = f"reversible against ordinary: relative error {error:.1e}"
            if error <= tolerance:  # which NaN is not
                yield Finding(what, OK, detail)
            else:
                yield Finding(what, PROBLEM, detail, fix)


def gradient_error(device: str, dtype: torch.dtype | None = None) -> float:
    """Train a few reversible blocks one step, forward and backward, in both ways.

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
        blocks = nn.ModuleList(_Block(32) for _ in range(8)).to(device)
        x = torch.randn(2, 64, 32).to(device)
    gradients = {}
    for activations in ("cached", "reversible"):
        sequence = ReversibleSequence(blocks, activations=activations, keep_attention=dtype is not None)
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y1, y2 = sequence(x, x)
            loss = (y1 * y2).mean()
        gradients[activations] = torch.autograd.grad(loss, list(blocks.parameters()))
    errors = [
        (ours - theirs).abs().max() / theirs.abs().max()
        for ours, theirs in zip(gradients["reversible"], gradients["cached"], strict=True)
    ]
    # Python's own max overlooks NaN.
    return torch.stack(errors).max().item()


class _Block(nn.Module):
    """F attends, G is an MLP, as in the backbones, but small."""

    def __init__(self, dim: int):
        super().__init__()
        self.F = _Attention(dim)
        self.G = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class _Attention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # With heads, (B, heads, N, C / heads) each: fused kernels take nothing less.
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return attention(q, k, v).transpose(1, 2).flatten(2)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _pytorch,
    _torchvision,
    _setuptools,
    _opencv,
    _detectron2,
    _other_packages,
    _reversible_gradients,
)


def _import(name: str, fix: str, what: str = "") -> tuple[ModuleType | None, Finding]:
    """A module, or None; and what was found about it."""
    what = what or name.partition(".")[0]
    try:
        return importlib.import_module(name), Finding(what, OK, _version(what) or "")
    except Exception as error:
        return None, Finding(what, PROBLEM, f"import {name} fails: {_reason(error)}", fix)


def _absent(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        return True


def _version(distribution: str) -> str:
    """The version of an installed distribution; empty if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _distribution(module: str) -> str:
    """Which distribution a module came with."""
    names = importlib.metadata.packages_distributions().get(module)
    return f"from {names[0]} {_version(names[0])}" if names else "from a folder on the path"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdigit())


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
