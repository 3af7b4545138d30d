"""Install rev_det, Detectron2 and what they need into the environment that runs this; for ``make setup``.

What the environment has is kept: torch, torchvision and numpy in their versions, its OpenCV package, and a
Detectron2 that can be imported. Without one the prebuilt Detectron2 of ``detectron2.txt`` is installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREBUILT = "sal-detectron2"
KEPT = ("torch", "torchvision", "numpy")
OPENCV = (
    "opencv-python",
    "opencv-contrib-python",
    "opencv-python-headless",
    "opencv-contrib-python-headless",
)
# What opencv-python needs of the system.
LIBRARIES = ("libGL.so.1", "libgthread-2.0.so.0")
EXTRAS = ("dev", "baselines", "eval", "export", "docs")
# The wheel is tagged for one Python and platform, but is plain Python. With --target pip takes it for any.
TAGS = ("--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any")
CHECK = "import torchvision, cv2, detectron2.model_zoo, rev_det"
PIP_FAILED = """\
error: pip failed for the reason above; mend it, and run make setup again.
- Without a network: PIP_INDEX_URL names a mirror; PIP_NO_INDEX=1 and PIP_FIND_LINKS a folder of wheels. Where
  all packages are installed, `pip install --no-index --no-deps --no-build-isolation -e .` is enough.
- Versions in conflict: an installed torch, torchvision or numpy is never changed here. Upgrade it yourself,
  or let make setup VENV=.venv make an environment of its own."""


def choose_opencv(installed: dict[str, str]) -> str:
    """The OpenCV that is there, else the one that works on this machine."""
    for name in OPENCV:
        if name in installed:
            return name
    try:
        for library in LIBRARIES:
            ctypes.CDLL(library)
    except OSError as error:
        print(f"opencv-python would not work here ({error}): installing opencv-python-headless", flush=True)
        return "opencv-python-headless"
    return "opencv-python"


def pip_install(*arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env={**os.environ, **variables}).returncode:
        sys.exit(PIP_FAILED)


def main() -> None:
    if importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"])
    found = metadata.distributions()
    installed = {dist.name.lower().replace("_", "-"): dist.version for dist in found if dist.name}
    detectron2 = importlib.util.find_spec("detectron2")
    prebuilt = detectron2 is None or PREBUILT in installed
    extras = [*EXTRAS, *(["detectron2"] if prebuilt else [])]
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch, "constraints.txt")
        kept.write_text("".join(f"{name}=={installed[name]}\n" for name in KEPT if name in installed))
        package = f"{ROOT}[{','.join(extras)}]"
        pip_install("--constraint", str(kept), "-e", package, REV_DET_OPENCV=choose_opencv(installed))
    if detectron2:
        print(f"keeping the Detectron2 in {Path(detectron2.origin).parent}", flush=True)
    else:
        hashed = ["--require-hashes", "--requirement", str(ROOT / "tools" / "detectron2.txt")]
        wheel = ["--no-deps", "--only-binary", ":all:", *TAGS, "--target", sysconfig.get_path("purelib")]
        pip_install(*wheel, *hashed)
    # Not from the checkout, where rev_det can be imported without being installed.
    if subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], cwd=sys.prefix).returncode:
        subprocess.run([Path(sys.executable).with_name("rev-det"), "doctor"], cwd=sys.prefix)
        sys.exit(f"error: the packages in {sys.prefix} do not work; for the fix see `rev-det doctor` above")


if __name__ == "__main__":
    main()
