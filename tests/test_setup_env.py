"""The decisions of the installer (tools/setup_env.py)."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
from installer import EXTRAS, REQUIRES, ROOT, setup_env

SetupError = setup_env.SetupError


# ---- making an environment ----


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert setup_env.main(["--venv", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .* has no working bin/python: .*VENV=\n", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_missing_venv_module_is_named_with_its_apt_line(module, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    assert setup_env.main(["--venv", str(tmp_path / "env")]) == 2
    error = capsys.readouterr().err
    assert f"no module {module};" in error
    assert "apt install python3-venv" in error
    assert not (tmp_path / "env").exists()


def test_half_an_environment_is_removed(tmp_path, monkeypatch):
    def fail(command, **_):
        Path(command[-1], "bin").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no space left")

    monkeypatch.setattr(setup_env.subprocess, "run", fail)
    with pytest.raises(SetupError, match="no space left"):
        setup_env.create_environment(tmp_path / "env")
    assert not (tmp_path / "env").exists()


# ---- decisions ----


@pytest.mark.parametrize(
    ("version", "requirement", "answer"),
    [
        ("2.6.0", "torch>=2.6", True),
        ("2.6.0+cu126", "torch>=2.6", True),
        ("2.10.0", "torch>=2.6", True),
        ("2.5.1", "torch>=2.6", False),
        ("2.7.0a0+ecf3bae40a.nv25.01", "torch>=2.6", True),
        ("0.1.5.post20221221", "fvcore>=0.1.5", True),
        ("0.1.5.post20221221", "fvcore>=0.1.5.post20221221", True),
        ("0.1.5.post20210915", "fvcore>=0.1.5.post20221221", False),
        ("0.1.6", "fvcore>=0.1.5.post20221221", True),
        ("80.10.2", "setuptools<81", True),
        ("81.0.0", "setuptools<81", False),
        ("2.3.1", "omegaconf>=2.1,<2.4", True),
        ("2.4.0", "omegaconf>=2.1,<2.4", False),
        ("2.0.6", "omegaconf>=2.1,<2.4", False),
        ("unknown", "tqdm>=4.64", False),
        ("unknown", "tqdm", True),
    ],
)
def test_bounds(version, requirement, answer):
    assert setup_env.satisfies(version, requirement) is answer


def test_bounds_in_setup_py_are_of_the_kind_the_installer_reads():
    for requirement in [*REQUIRES, *(line for lines in EXTRAS.values() for line in lines)]:
        assert re.fullmatch(r"[A-Za-z0-9-]+(>=[\d.]+(?:post\d+)?)?,?(<[\d.]+)?", requirement), requirement


def test_constraints_keep_what_the_bounds_allow():
    installed = {
        "numpy": "1.26.4",
        "torch": "2.7.0+cpu",
        "omegaconf": "2.0.6",  # below the bound: pip may replace it
        "setuptools": "65.5.0",
        "pip": "23.0",
        "rev-det": "0.0.9",
        "odd": "built-by-hand",  # no version pip could read
    }
    kept = setup_env.constraints(installed, REQUIRES)
    assert kept == ["numpy==1.26.4", "torch==2.7.0+cpu", "setuptools<81"]


# ---- the installation, with pip played by a dictionary ----


class FakeEnvironment(setup_env.Environment):
    """What is installed is a dictionary, pip changes it, and the commands given to pip are kept."""

    def __init__(self, folder: Path, libgl: bool = True, detectron2_error: str = "", **installed: str):
        super().__init__(folder)
        self.installed = {name.replace("_", "-"): version for name, version in installed.items()}
        self.libgl = libgl
        self.detectron2_error = detectron2_error
        self.rev_det = str(ROOT / "rev_det" / "__init__.py")
        self.commands: list[str] = []
        self.kept: list[list[str]] = []

    def probe(self):
        modules = {"torch": "torch", "torchvision": "torchvision", "sal-detectron2": "detectron2"}
        modules |= {
            "detectron2": "detectron2",
            **{n: "cv2" for n in self.installed if n.startswith("opencv")},
        }
        found = {m: f"/site/{m}/__init__.py" for dist, m in modules.items() if dist in self.installed}
        if "rev-det" in self.installed:
            found["rev_det"] = self.rev_det
        return setup_env.State(dict(self.installed), found, "/site")

    def import_error(self, module):
        if module == "torchvision" and "+cpu" in self.installed["torch"]:
            return "RuntimeError: operator torchvision::nms does not exist"
        if module == "cv2" and not self.libgl and not any(n.endswith("headless") for n in self.installed):
            return "ImportError: libGL.so.1: cannot open shared object file"
        return self.detectron2_error if module == "detectron2" else ""

    def pip(self, *arguments, keep=None, **variables):
        self.commands.append(" ".join([*(f"{k}={v}" for k, v in variables.items()), *arguments]))
        self.kept.append(keep)
        if arguments[0] == "uninstall":
            for name in arguments[2:]:
                del self.installed[name]
            return
        if "--requirement" in arguments:
            wanted = ["sal-detectron2"]
        elif "--editable" in arguments:
            requires = [setup_env.requirement_name(r) for r in REQUIRES]
            wanted = [variables["REV_DET_OPENCV"] if r == "opencv-python" else r for r in requires] + [
                "rev-det"
            ]
        else:
            wanted = [setup_env.requirement_name(r) for r in arguments[1:]]
        for name in wanted:
            self.installed.setdefault(name, "99.0")


def test_a_new_environment_gets_torch_with_torchvision_then_rev_det_then_detectron2(tmp_path):
    env = FakeEnvironment(tmp_path, setuptools="65.5.0")
    setup_env.set_up(env)
    torch, package, detectron2 = env.commands
    assert torch == "install torch>=2.6 torchvision>=0.21"
    assert (
        package == f"REV_DET_OPENCV=opencv-python install --editable {ROOT}[dev,baselines,eval,export,docs]"
    )
    assert "--no-deps" in detectron2 and "--require-hashes" in detectron2 and "--target /site" in detectron2
    assert env.kept[0] == ["setuptools<81"]


def test_the_detectron2_that_is_installed_is_pinned_by_hash():
    (line,) = (x for x in setup_env.DETECTRON2.read_text().splitlines() if not x.startswith("#"))
    assert re.fullmatch(r"sal-detectron2==0\.7\.2 --hash=sha256:[0-9a-f]{64}", line)


def test_an_environment_of_ones_own_keeps_its_packages(tmp_path, capsys):
    own = {"torch": "2.7.0", "torchvision": "0.22.0", "numpy": "1.26.4", "detectron2": "0.6"}
    env = FakeEnvironment(tmp_path, **own)
    setup_env.set_up(env)
    assert len(env.commands) == 1 and "--editable" in env.commands[0]
    assert set(env.kept[0]) == {"setuptools<81", *(f"{name}=={version}" for name, version in own.items())}
    assert own.items() <= env.installed.items()
    assert "keeping the Detectron2 in /site/detectron2" in capsys.readouterr().out


def test_a_torch_without_torchvision_is_kept_and_gets_one_that_fits(tmp_path):
    env = FakeEnvironment(tmp_path, torch="2.7.0")
    setup_env.set_up(env)
    assert env.commands[0] == "install torchvision>=0.21"
    assert "torch==2.7.0" in env.kept[0]


def test_a_torch_that_is_too_old_is_not_touched(tmp_path):
    env = FakeEnvironment(tmp_path, torch="2.1.2", torchvision="0.16.2")
    with pytest.raises(SetupError, match="has torch 2.1.2, rev_det needs torch>=2.6: upgrade it there"):
        setup_env.set_up(env)
    assert env.commands == []


def test_a_cpu_only_torch_is_explained_and_the_useless_torchvision_removed(tmp_path):
    env = FakeEnvironment(tmp_path, torch="2.13.0+cpu")
    with pytest.raises(
        SetupError, match="with torch 2.13.0.cpu.*nms does not exist.*built for CUDA.*uninstall"
    ):
        setup_env.set_up(env)
    assert env.installed == {"torch": "2.13.0+cpu"}
    env = FakeEnvironment(tmp_path, torch="2.13.0+cpu", torchvision="0.28.0")
    with pytest.raises(SetupError):
        setup_env.set_up(env)
    assert env.commands == []  # one that was there is the user's to remove


def test_without_libgl_the_headless_opencv_replaces_the_other_and_stays(tmp_path, capsys):
    env = FakeEnvironment(tmp_path, libgl=False, torch="2.7.0", torchvision="0.22.0", detectron2="0.6")
    setup_env.set_up(env)
    assert "libGL.so.1" in capsys.readouterr().out
    broken, removed, headless = env.commands
    assert broken.startswith("REV_DET_OPENCV=opencv-python install")
    assert removed == "uninstall --yes opencv-python"
    assert headless.startswith("REV_DET_OPENCV=opencv-python-headless install")
    (tmp_path / setup_env.NOTE).unlink()
    setup_env.set_up(env)
    assert env.commands[3:] == [headless]


def test_an_opencv_of_ones_own_is_kept(tmp_path):
    env = FakeEnvironment(
        tmp_path, torch="2.7.0", torchvision="0.22.0", opencv_contrib_python="4.10.0.84", detectron2="0.6"
    )
    setup_env.set_up(env)
    assert env.commands[0].startswith("REV_DET_OPENCV=opencv-contrib-python install")
    assert "opencv-contrib-python==4.10.0.84" in env.kept[0]
    assert "opencv-python" not in env.installed


def test_a_broken_detectron2_is_reported_not_overwritten(tmp_path):
    env = FakeEnvironment(
        tmp_path,
        detectron2_error="ImportError: no fvcore",
        torch="2.7.0",
        torchvision="0.22.0",
        detectron2="0.6",
    )
    with pytest.raises(SetupError, match="import detectron2 fails in .*no fvcore.*repair or uninstall it"):
        setup_env.set_up(env)
    assert not any("--requirement" in command for command in env.commands)
    assert not (tmp_path / setup_env.NOTE).exists()


def test_another_rev_det_in_the_way_is_an_error(tmp_path):
    env = FakeEnvironment(tmp_path)
    env.rev_det = "/elsewhere/rev_det/__init__.py"
    with pytest.raises(SetupError, match="finds rev_det in /elsewhere"):
        setup_env.set_up(env)


def test_a_second_run_does_nothing(tmp_path):
    env = FakeEnvironment(tmp_path)
    setup_env.set_up(env)
    env.commands.clear()
    setup_env.set_up(env)
    assert env.commands == []


def remove_torchvision(env, monkeypatch):
    del env.installed["torchvision"]


def upgrade_torch(env, monkeypatch):
    env.installed["torch"] = "99.1"


def use_it_from_another_checkout(env, monkeypatch):
    note = env.folder / setup_env.NOTE
    note.write_text(note.read_text().replace(json.dumps(str(ROOT)), '"/another/checkout"'))


def edit_the_hash(env, monkeypatch):
    changed = env.folder / "detectron2.txt"
    changed.write_text("another")
    monkeypatch.setattr(setup_env, "DETECTRON2", changed)


@pytest.mark.parametrize(
    "change", [remove_torchvision, upgrade_torch, use_it_from_another_checkout, edit_the_hash]
)
def test_a_change_is_noticed(change, tmp_path, monkeypatch):
    env = FakeEnvironment(tmp_path)
    setup_env.set_up(env)
    env.commands.clear()
    change(env, monkeypatch)
    setup_env.set_up(env)
    assert any("--editable" in command for command in env.commands)


def test_lint_needs_the_linter_alone_and_once(tmp_path):
    env = FakeEnvironment(tmp_path)
    setup_env.set_up_lint(env)
    assert len(env.commands) == 1 and re.fullmatch("install ruff>=.*", env.commands[0])
    env.installed["ruff"] = "0.17.5"
    setup_env.set_up_lint(env)
    assert len(env.commands) == 1


def test_the_linter_used_here_is_within_the_bounds():
    try:
        version = importlib.metadata.version("ruff")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ruff is not installed")
    (bound,) = (r for r in EXTRAS["dev"] if r.startswith("ruff"))
    assert setup_env.satisfies(version, bound)
