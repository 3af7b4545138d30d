"""Packaging (setup.py), what ``make setup`` installs into which environment, and the Makefile."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import rev_det

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, **variables):
    environ = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


# ---- the built package ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the unpacked source archive, so that what holds of it holds of both."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "output", "datasets", "build")
    shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = run(sys.executable, "-c", build, cwd=source, REV_DET_OPENCV="opencv-contrib-python")
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out / "unpacked")
    (unpacked,) = (out / "unpacked").iterdir()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*pip, "--wheel-dir", str(out), str(unpacked), cwd=out, REV_DET_OPENCV="opencv-contrib-python")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_config_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (license_file,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rev_det").rglob("*.py")}
    configs = {f"rev_det/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "rev_det/configs/Base-RCNN-Rev-FPN.yaml" in configs
    assert packed >= modules | configs | {"rev_det/report.html"}
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in packed)


def test_the_wheel_asks_for_what_rev_det_needs_and_leaves_what_detectron2_needs_to_an_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    assert f"\nVersion: {rev_det.__version__}\n" in text
    lines = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", text, re.MULTILINE)
    plain = {name for name, rest in lines if "extra ==" not in rest}
    assert {"torch", "torchvision", "fvcore"} <= plain and not plain & {
        "setuptools",
        "detectron2",
        "omegaconf",
    }
    assert {name for name in plain if "opencv" in name} == {"opencv-contrib-python"}
    of_detectron2 = dict(
        line for line in lines if line[1].endswith("'detectron2'") or '"detectron2"' in line[1]
    )
    assert "<81" in of_detectron2["setuptools"] and {"yacs", "omegaconf"} <= of_detectron2.keys()


def test_an_empty_environment_gets_the_configs_with_the_wheel(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    done = run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (package,) = (tmp_path / "env/lib").glob("python3*/site-packages/rev_det")
    assert (package / "configs/Base-RCNN-Rev-FPN.yaml").is_file()
    done = run(python, "-c", "import rev_det", cwd=tmp_path, PYTHONPATH="")
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


# ---- what setup_env.py asks pip for ----


@pytest.fixture
def setup_env(monkeypatch):
    """The installer with a pip that only notes its commands; what is installed is given."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands, module.failing, module.missing = [], "", ()

    def play(command, env=None, **_):
        words = " ".join(map(str, command))
        if "--constraint" in words:
            words += " KEPT " + Path(command[command.index("--constraint") + 1]).read_text().replace(
                "\n", " "
            )
            words += env["REV_DET_OPENCV"]
        module.commands.append(words)
        return SimpleNamespace(returncode=int(bool(module.failing) and module.failing in words))

    def load(name):
        if name in module.missing:
            raise OSError(f"{name}: cannot open shared object file")

    def given(detectron2=True, **installed):
        dists = [SimpleNamespace(name=name, version=version) for name, version in installed.items()]
        found = SimpleNamespace(origin="/site/detectron2/__init__.py") if detectron2 else None
        monkeypatch.setattr(module.metadata, "distributions", lambda: dists)
        monkeypatch.setattr(
            module.importlib.util, "find_spec", lambda n: found if n == "detectron2" else True
        )
        module.main()
        return module.commands

    monkeypatch.setattr(module.subprocess, "run", play)
    monkeypatch.setattr(module.ctypes, "CDLL", load)
    module.given = given
    return module


def test_a_new_environment_gets_rev_det_then_the_prebuilt_detectron2_by_its_hash(setup_env):
    package, detectron2, check = setup_env.given(detectron2=False)
    assert f"-e {ROOT}[dev,baselines,eval,export,docs,detectron2] KEPT opencv-python" in package
    assert "--no-deps" in detectron2 and "--require-hashes" in detectron2 and "--target" in detectron2
    (line,) = (x for x in (ROOT / "tools/detectron2.txt").read_text().splitlines() if not x.startswith("#"))
    assert re.fullmatch(r"sal-detectron2==0\.7\.2 --hash=sha256:[0-9a-f]{64}", line)
    assert "import torchvision, cv2, detectron2" in check


def test_an_environment_of_ones_own_keeps_torch_and_detectron2(setup_env, capsys):
    own = {"torch": "2.7.0+cpu", "torchvision": "0.22.0", "numpy": "1.26.4", "opencv_contrib_python": "4.10"}
    package, check = setup_env.given(**own)
    assert f"-e {ROOT}[dev,baselines,eval,export,docs] " in package
    assert package.endswith("KEPT torch==2.7.0+cpu torchvision==0.22.0 numpy==1.26.4 opencv-contrib-python")
    assert "keeping the Detectron2 in /site/detectron2" in capsys.readouterr().out
    # The prebuilt one still needs what it was installed with.
    assert "docs,detectron2] " in setup_env.given(**own, sal_detectron2="0.7.2")[2]


@pytest.mark.parametrize("library", ["libGL.so.1", "libgthread-2.0.so.0"])
def test_without_libgl_or_glib_opencv_is_headless(setup_env, library, capsys):
    setup_env.missing = (library,)
    assert setup_env.given()[0].endswith(" opencv-python-headless")
    assert library in capsys.readouterr().out


def test_a_failing_pip_names_the_way_out(setup_env):
    setup_env.failing = "--constraint"
    with pytest.raises(SystemExit, match="(?s)error: pip failed.*PIP_INDEX_URL.*VENV=.venv"):
        setup_env.given()


def test_packages_that_do_not_work_are_examined_by_the_doctor(setup_env):
    setup_env.failing = "import torchvision"
    with pytest.raises(SystemExit, match="do not work"):
        setup_env.given()
    assert setup_env.commands[-1].endswith("/rev-det doctor")


# ---- the Makefile ----


@pytest.fixture
def make(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    # The tests themselves run under make, whose variables would reach this one.
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "PYTHON")
    environ = {name: value for name, value in os.environ.items() if name not in outer}

    def call(*arguments):
        command = ["make", "--no-print-directory", f"VENV={tmp_path}/env", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)

    return call


def test_a_python_that_is_old_or_missing_is_named_before_anything_is_made(make, tmp_path):
    old = tmp_path / "python3.8"
    pretend = "import sys; sys.version_info = (3, 8, 18); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"error: rev_det needs Python 3.10 or newer, {old} is 3.8; name another" in done.stderr
    done = make("setup", f"PYTHON={tmp_path}/gone")
    assert done.returncode != 0 and f"error: there is no {tmp_path}/gone" in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_folder_that_is_no_environment_is_left_alone(make, tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env/mine.txt").write_text("x")
    done = make("setup", f"PYTHON={sys.executable}")
    assert done.returncode != 0 and "has no working bin/python: remove it" in done.stderr
    assert os.listdir(tmp_path / "env") == ["mine.txt"]


def test_an_environment_that_cannot_be_made_leaves_nothing(make, tmp_path):
    failing = tmp_path / "python"
    failing.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p {tmp_path}/env/bin; exit 1\n')
    failing.chmod(0o755)
    assert make("setup", f"PYTHON={failing}").returncode != 0
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize(
    "target, work",
    [
        ("demo", "train_net.py --config-file configs/Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml"),
        ("test", '-m pytest -m "not slow"'),
        ("test-slow", "-m pytest -m slow"),
    ],
)
def test_targets_set_up_once_and_run_in_the_environment(make, tmp_path, target, work):
    python = f"{tmp_path}/env/bin/python"
    lines = make("--dry-run", target, "PYTHON=some-python").stdout.splitlines()
    made = [i for i, line in enumerate(lines) if line.startswith(f"some-python -m venv {tmp_path}/env")]
    installed = [i for i, line in enumerate(lines) if line == f"{python} tools/setup_env.py"]
    worked = [i for i, line in enumerate(lines) if line.startswith(f"{python} {work}")]
    assert len(made) == len(installed) == len(worked) == 1 and made < installed < worked
    (tmp_path / "env/bin").mkdir(parents=True)
    for name in ("bin/python", ".rev_det-ready"):
        (tmp_path / "env" / name).touch()
    assert make("--dry-run", target).stdout.splitlines() == lines[worked[0] :]


def test_lint_needs_the_linter_alone(make):
    lines = make("--dry-run", "lint").stdout
    assert "setup_env.py" not in lines
    bounds = re.search(r"pip install .*\"ruff([^\"]+)\"", lines).group(1)
    assert re.fullmatch(r">=[\d.]+,<[\d.]+", bounds)
