"""Packaging (setup.py), what the installer does to a real environment, and the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from installer import EXTRAS, REQUIRES, ROOT, setup_env

import rev_det

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def python(*arguments, cwd, **variables) -> subprocess.CompletedProcess:
    environ = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True)


# ---- the built package ----


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What packaging reads of the checkout, copied: building writes beside its sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    for name in ("rev_det", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """The wheel, built from the unpacked source archive, so that what holds of it holds of both."""
    out = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = python("-c", build, cwd=source, REV_DET_OPENCV="")
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    done = python("-m", "tarfile", "--extract", str(archive), str(out / "unpacked"), cwd=out)
    assert done.returncode == 0, done.stderr
    (unpacked,) = (out / "unpacked").iterdir()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out))
    done = python("-m", "pip", "wheel", *options, str(unpacked), cwd=out, REV_DET_OPENCV="")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def metadata(built: Path) -> str:
    with zipfile.ZipFile(built) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def test_the_wheel_holds_every_module_and_every_config(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(p.relative_to(source)) for p in (source / "rev_det").rglob("*.py")}
    configs = {f"rev_det/{p.relative_to(source)}" for p in (source / "configs").rglob("*.yaml")}
    assert "rev_det/configs/Base-RCNN-Rev-FPN.yaml" in configs
    page = {"rev_det/report/page.html", "rev_det/report/page.css"}
    assert packed == modules | configs | page


def test_the_wheel_has_the_version_of_the_package_and_the_license(wheel):
    assert f"\nVersion: {rev_det.__version__}\n" in metadata(wheel)
    with zipfile.ZipFile(wheel) as archive:
        (license_file,) = (n for n in archive.namelist() if n.endswith("LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()


def test_the_requirements_are_those_the_installer_reads_and_detectron2_is_not_one(wheel):
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata(wheel), re.MULTILINE)
    plain = {re.sub(r"\s|[()]", "", line) for line in lines if "extra ==" not in line}
    # a specifier of two bounds may come back in another order
    assert {frozenset(re.split(r"(?=[<>])|,", r)) for r in plain} == {
        frozenset(re.split(r"(?=[<>])|,", r)) for r in REQUIRES
    }
    assert len(lines) == len(REQUIRES) + sum(map(len, EXTRAS.values()))
    assert not any("detectron2" in line for line in lines)


def prepare_metadata(source: Path, out: Path, opencv: str) -> subprocess.CompletedProcess:
    code = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(out)!r})"
    return python("-c", code, cwd=source, REV_DET_OPENCV=opencv)


def test_the_environment_can_name_its_own_opencv(source, tmp_path):
    done = prepare_metadata(source, tmp_path, "opencv-contrib-python-headless")
    assert done.returncode == 0, done.stderr
    (text,) = (p.read_text() for p in tmp_path.glob("*.dist-info/METADATA"))
    opencv = re.findall("^Requires-Dist: (opencv[a-z-]*)", text, re.MULTILINE)
    assert opencv == ["opencv-contrib-python-headless"]


def test_an_unknown_opencv_is_refused_and_the_known_ones_named(source, tmp_path):
    done = prepare_metadata(source, tmp_path, "opencv")
    assert done.returncode != 0
    assert "REV_DET_OPENCV is 'opencv'" in done.stderr
    assert "opencv-python-headless" in done.stderr


# ---- a real environment, empty but for pip ----


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield setup_env.open_environment(tmp_path_factory.mktemp("environments") / "empty")


def test_an_empty_environment_gets_the_configs_with_the_wheel(empty, wheel):
    assert "rev_det" not in empty.probe().found
    empty.pip("install", "--no-index", "--no-deps", str(wheel))
    state = empty.probe()
    assert state.installed["rev-det"] == rev_det.__version__
    package = Path(state.found["rev_det"]).parent
    assert package == Path(state.site) / "rev_det"
    assert (package / "configs" / "Base-RCNN-Rev-FPN.yaml").is_file()
    assert empty.import_error("rev_det") == "ModuleNotFoundError: No module named 'torch'"


def test_a_failing_pip_shows_its_reason_and_the_way_on(empty, capfd):
    with pytest.raises(setup_env.SetupError, match="run make setup again"):
        empty.pip("install", "--no-index", "a-package-that-is-nowhere", keep=["setuptools<81"])
    assert "a-package-that-is-nowhere" in capfd.readouterr().err


def test_constraints_hold_against_pip(empty, wheel):
    before = empty.probe().installed
    with pytest.raises(setup_env.SetupError):
        empty.pip("install", "--no-index", "--no-deps", str(wheel), keep=["rev-det==0.0.1"])
    assert empty.probe().installed == before


# ---- the Makefile ----


def make(*arguments) -> subprocess.CompletedProcess:
    # the tests themselves run under make, whose variables would reach this one
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV")
    environ = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_make
def test_an_old_python_is_named_before_anything_is_made(tmp_path):
    pretend = 'exec "{}" -c "import sys; sys.version_info = (3, 8, 18); exec(sys.argv[1])" "$2"'
    old = executable(tmp_path / "python3.8", pretend.format(sys.executable))
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'env'}")
    assert done.returncode != 0
    assert f"error: rev_det needs Python 3.10 or newer, {old} is 3.8; name another" in done.stderr
    assert not (tmp_path / "env").exists()


@needs_make
def test_a_missing_python_is_named(tmp_path):
    done = make("setup", f"PYTHON={tmp_path}/python3", f"VENV={tmp_path / 'env'}")
    assert done.returncode != 0
    assert f"error: there is no {tmp_path}/python3" in done.stderr


@needs_make
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("demo", "train_net.py"),
        ("test", 'pytest -m "not slow"'),
        ("test-slow", "pytest -m slow"),
        ("lint", "ruff"),
    ],
)
def test_targets_set_up_first_and_run_in_the_environment(target, runs, tmp_path):
    done = make("--dry-run", target, "PYTHON=some-python", f"VENV={tmp_path}/env")
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if f"setup_env.py --venv {tmp_path}/env" in line)
    work = [i for i, line in enumerate(lines) if line.startswith(f"{tmp_path}/env/bin/python -m {runs}")]
    work += [i for i, line in enumerate(lines) if line.startswith(f"{tmp_path}/env/bin/python {runs}")]
    assert lines[first].startswith("some-python")
    assert work and min(work) > first


@needs_make
def test_an_environment_that_is_there_sets_itself_up(tmp_path):
    (tmp_path / "bin").mkdir()
    own = executable(tmp_path / "bin" / "python", "exit 0")
    done = make("--dry-run", "setup", "PYTHON=some-python", f"VENV={tmp_path}")
    assert f"{own} tools/setup_env.py --venv {tmp_path}" in done.stdout
    assert "some-python" not in done.stdout


@needs_make
def test_the_demo_names_a_config_that_exists():
    done = make("--dry-run", "demo")
    config = re.search(r"--config-file (\S+)", done.stdout).group(1)
    assert (ROOT / config).is_file()
