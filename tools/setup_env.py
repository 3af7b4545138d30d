"""Install rev_det, Detectron2 and what they need into one environment; ``make setup`` runs it.

Usage: ``python tools/setup_env.py --venv FOLDER [--lint]``. A FOLDER that is not there becomes a new virtual
environment. In one that is there every package keeps its version, unless the bounds in setup.py exclude it;
torch keeps it in any case, and an importable Detectron2 is left alone. When nothing is missing a run takes a
moment: a note in the environment says what was found, and holds until setup.py, the installer or the packages
change.

Only the standard library is used, since nothing is installed yet.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DETECTRON2 = ROOT / "tools" / "detectron2.txt"
NOTE = ".rev_det-setup.json"
MODULES = ("torch", "torchvision", "cv2", "detectron2", "rev_det")

# Runs inside the environment. It imports none of the packages: torch alone takes a second.
PROBE = f"""
import importlib.metadata, importlib.util, json, re, sysconfig
installed = {{}}
for dist in importlib.metadata.distributions():
    if dist.metadata["Name"]:
        installed.setdefault(re.sub("[-_.]+", "-", dist.metadata["Name"]).lower(), dist.version)
specs = {{name: importlib.util.find_spec(name) for name in {MODULES}}}
found = {{name: spec.origin for name, spec in specs.items() if spec is not None and spec.origin}}
print(json.dumps([installed, found, sysconfig.get_path("purelib")]))
"""
# The versions that `==` in a constraints file understands; anything else pip would refuse to read.
PINNABLE = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[A-Za-z0-9.]+)?")


class SetupError(Exception):
    """What the user must know in one line: what is wrong, and the way out."""


class State(NamedTuple):
    """What an environment holds.

    Attributes:
        installed: version by distribution name, in lower case with dashes.
        found: file by name, of those `MODULES` that can be found.
        site: the folder packages are installed to.
    """

    installed: dict[str, str]
    found: dict[str, str]
    site: str


# ---- decisions: functions of what is there ----


def read_requirements(setup_py: Path) -> tuple[list[str], dict[str, list[str]]]:
    """REQUIRES and EXTRAS of ``setup.py``, read without running it."""
    literals = {}
    for node in ast.parse(setup_py.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS"):
            literals[node.targets[0].id] = ast.literal_eval(node.value)
    return literals["REQUIRES"], literals["EXTRAS"]


def requirement_name(requirement: str) -> str:
    """``"Pillow>=9.1"`` -> ``"pillow"``, as `State.installed` spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>]", requirement)[0]).lower()


def release(version: str) -> tuple[tuple[int, ...], int]:
    """``"2.5.0+cpu"`` -> ``((2, 5), 0)``: the numbers without trailing zeros, as 2.5 and 2.5.0 are equal,
    and that of the post release."""
    matched = re.match(r"([\d.]*\d|)(?:\.post(\d+))?", version)
    numbers = [int(n) for n in matched.group(1).split(".") if n]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), int(matched.group(2) or 0)


def satisfies(version: str, requirement: str) -> bool:
    """Whether ``version`` is within the bounds of ``requirement``: >= and <, all that setup.py uses."""
    for operator, bound in re.findall(r"(>=|<)([\d.]+(?:post\d+)?)", requirement):
        if (release(version) >= release(bound)) != (operator == ">="):
            return False
    return True


def constraints(installed: dict[str, str], requirements: list[str]) -> list[str]:
    """Constraint lines that keep every installed package as it is, unless ``requirements`` exclude it.

    setuptools is only bounded: a new environment's is old, and would hold torch back at an old release too.
    """
    bounds = {requirement_name(r): r for r in requirements}
    kept = {
        name: version
        for name, version in sorted(installed.items())
        if name not in ("pip", "rev-det", "setuptools")
        and PINNABLE.fullmatch(version)
        and satisfies(version, bounds.get(name, ""))
    }
    return [f"{name}=={version}" for name, version in kept.items()] + [bounds["setuptools"]]


def installed_opencv(installed: dict[str, str]) -> list[str]:
    """Those of OpenCV's four packages that are installed; each of them provides the same ``cv2``."""
    names = ("opencv-python", "opencv-contrib-python")
    return [n for name in names for n in (name, f"{name}-headless") if n in installed]


# ---- the environment ----


class Environment:
    """A Python environment, asked and changed through its own interpreter alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        # from the folder: `import rev_det` must not succeed just because the checkout is the current folder
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)

    def probe(self) -> State:
        done = self.run("-c", PROBE)
        if done.returncode:
            why = last_line(done.stderr)
            raise SetupError(
                f"{self.python} does not work ({why}): remove {self.folder} or name another VENV="
            )
        return State(*json.loads(last_line(done.stdout)))

    def import_error(self, module: str) -> str:
        """Why ``module`` cannot be imported, in one line; empty if it can."""
        done = self.run("-c", f"import {module}")
        return "" if not done.returncode else last_line(done.stderr) or f"exit status {done.returncode}"

    def pip(self, *arguments: str, keep: list[str] | None = None, **variables: str) -> None:
        """Run pip, showing what it downloads (from a megabyte on) and its last words if it fails.

        Args:
            arguments: those of pip.
            keep: constraint lines.
            variables: additions to the process environment.
        """
        environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1", **variables}
        with tempfile.TemporaryDirectory() as scratch:
            command = [str(self.python), "-m", "pip", *arguments]
            if keep:
                file = Path(scratch, "constraints.txt")
                file.write_text("\n".join(keep) + "\n", encoding="utf-8")
                command += ["--constraint", str(file)]
            output = []
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            with subprocess.Popen(command, cwd=self.folder, env=environ, **pipes) as process:
                for line in process.stdout:
                    output.append(line)
                    if re.match(r"\s*Downloading .*\([\d.]+ [MG]B\)", line):
                        say(f"  {line.strip()}")
        if process.returncode:
            sys.stderr.writelines(line for line in output[-30:] if not line.startswith("WARNING"))
            raise SetupError(
                f"pip {arguments[0]} failed in {self.folder} for the reason above; cure it and run "
                "make setup again (an environment of its own, VENV=.venv, has no conflicts)"
            )


def say(line: str) -> None:
    print(line, flush=True)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


def open_environment(folder: Path) -> Environment:
    """The environment in ``folder``, made first if there is none."""
    env = Environment(folder)
    if not env.python.exists():
        create_environment(folder)
    if env.run("-m", "pip", "--version").returncode:
        say(f"{folder} has no pip: adding it")
        done = env.run("-m", "ensurepip")
        if done.returncode:
            why = last_line(done.stderr)
            raise SetupError(f"{folder} has no pip and ensurepip does not add it ({why}): install pip there")
    return env


def create_environment(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SetupError(
            f"{folder} is there but has no working bin/python: remove it, or name an environment with VENV="
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        version = "python{}.{}".format(*sys.version_info)
        raise SetupError(
            f"{sys.executable} has no module {missing[0]}; on Debian and Ubuntu: apt install python3-venv "
            f"(for a Python that is not the system's: {version}-venv)"
        )
    say(f"making the environment {folder} with {sys.executable}")
    try:
        done = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
        if done.returncode:
            why = last_line(done.stdout + done.stderr)
            raise SetupError(f"{sys.executable} -m venv {folder} failed: {why}")
    except BaseException:  # an interrupt too: half an environment would be taken for a whole one
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- installing ----


def install_torch(env: Environment, requirements: list[str]) -> None:
    """torch and torchvision in one go, or the torchvision that fits a torch that is there."""
    wanted = {requirement_name(r): r for r in requirements}
    installed = env.probe().installed
    torch = installed.get("torch")
    if torch is not None and not satisfies(torch, wanted["torch"]):
        raise SetupError(
            f"{env.folder} has torch {torch}, rev_det needs {wanted['torch']}: upgrade it there "
            "(make setup changes no installed torch), or use an environment of its own: make setup VENV=.venv"
        )
    missing = [wanted[name] for name in ("torch", "torchvision") if name not in installed]
    if missing:
        say(f"installing {' and '.join(missing)}{' (some 3 GB: minutes)' if torch is None else ''}")
        env.pip("install", *missing, keep=constraints(installed, requirements))
    error = env.import_error("torchvision")
    if not error:
        return
    installed = env.probe().installed
    if wanted["torchvision"] in missing:
        env.pip("uninstall", "--yes", "torchvision")
    raise SetupError(
        f"torchvision {installed['torchvision']} does not work with torch {installed['torch']} in "
        f"{env.folder} ({error}): both must be of one build, and PyPI's torchvision needs PyPI's torch, "
        "built for CUDA (it runs without a GPU too); a CPU-only torch needs the torchvision published with "
        f"it. To take both from PyPI: {env.python} -m pip uninstall torch torchvision, then make setup"
    )


def install_package(env: Environment, requirements: list[str]) -> None:
    """rev_det itself (editable) with all its requirements, and an OpenCV that works on this machine."""
    installed = env.probe().installed
    # rev_det's metadata names the OpenCV that is there, so that pip does not put a second one over it
    opencv = (installed_opencv(installed) or ["opencv-python"])[0]
    say("installing rev_det and its requirements")
    install_editable(env, requirements, opencv)
    error = env.import_error("cv2")
    if error and not opencv.endswith("-headless"):
        say(f"{opencv} does not work here ({error}): installing {opencv}-headless instead")
        env.pip("uninstall", "--yes", *installed_opencv(env.probe().installed))
        opencv += "-headless"
        install_editable(env, requirements, opencv)
        error = env.import_error("cv2")
    if error:
        raise SetupError(f"import cv2 fails in {env.folder} ({error}): {opencv} must be repaired there")


def install_editable(env: Environment, requirements: list[str], opencv: str) -> None:
    bounds = [re.sub("^opencv-python(?=>)", opencv, r) for r in requirements]
    keep = constraints(env.probe().installed, bounds)
    env.pip(
        "install", "--editable", f"{ROOT}[dev,baselines,eval,export,docs]", keep=keep, REV_DET_OPENCV=opencv
    )


def install_detectron2(env: Environment) -> None:
    """The prebuilt Detectron2 whose hash we know, unless there is one."""
    state = env.probe()
    if "detectron2" in state.found:
        say(f"keeping the Detectron2 in {Path(state.found['detectron2']).parent}")
    else:
        say("installing the prebuilt Detectron2 (sal-detectron2 0.7.2)")
        # Its wheel is tagged for one Python and platform, but is plain Python; pip puts it under another with
        # --target alone. A hash it takes only in a requirements file.
        tags = ("--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any")
        binary = ("--no-deps", "--only-binary", ":all:", *tags, "--target", state.site)
        env.pip("install", *binary, "--require-hashes", "--requirement", str(DETECTRON2))
    error = env.import_error("detectron2")
    if error:
        raise SetupError(
            f"import detectron2 fails in {env.folder} ({error}): repair or uninstall it, then make setup"
        )


def snapshot(state: State, names: list[str]) -> dict:
    """What a later run compares with: this checkout, where the modules lie, the packages' versions."""
    content = hashlib.sha256()
    for file in (ROOT / "setup.py", Path(__file__).resolve(), DETECTRON2):
        content.update(file.read_bytes())
    versions = {name: state.installed.get(name) for name in [*names, *installed_opencv(state.installed)]}
    return {"root": str(ROOT), "files": content.hexdigest(), "found": state.found, "versions": versions}


def set_up(env: Environment) -> None:
    """Bring ``env`` into the state in which all commands of the Makefile work."""
    requires, extras = read_requirements(ROOT / "setup.py")
    requirements = [*requires, *(line for lines in extras.values() for line in lines)]
    names = [requirement_name(r) for r in requirements]
    note = env.folder / NOTE
    if not (note.exists() and note.read_text(encoding="utf-8") == json.dumps(snapshot(env.probe(), names))):
        install_torch(env, requirements)
        install_package(env, requirements)
        install_detectron2(env)
        state = env.probe()
        if state.found.get("rev_det") != str(ROOT / "rev_det" / "__init__.py"):
            raise SetupError(
                f"{env.python} finds rev_det in {state.found.get('rev_det')}, not in {ROOT}: "
                "another one is installed or on PYTHONPATH; remove that"
            )
        note.write_text(json.dumps(snapshot(state, names)), encoding="utf-8")
    say(f"{env.folder} is ready")


def set_up_lint(env: Environment) -> None:
    """Just the linter: it needs neither torch nor the package."""
    ruff = next(r for r in read_requirements(ROOT / "setup.py")[1]["dev"] if requirement_name(r) == "ruff")
    version = env.probe().installed.get("ruff")
    if version is None or not satisfies(version, ruff):
        say(f"installing {ruff}")
        env.pip("install", ruff)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="the environment's folder; made if missing")
    parser.add_argument("--lint", action="store_true", help="install the linter and nothing else")
    args = parser.parse_args(arguments)
    try:
        # absolute, but with its links: a virtual environment's python is known by its path
        env = open_environment(Path(os.path.abspath(args.venv.expanduser())))
        set_up_lint(env) if args.lint else set_up(env)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
