"""Configs are read without running code, wherever a command or a function takes one."""

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file

from rev_det.config import add_rev_det_config
from rev_det.config_files import read_config_file
from rev_det_cli import main

RUNS_CODE = "!!python/object/apply:os.mkdir"


@pytest.fixture
def marker(tmp_path):
    """The folder that is made if a config runs code."""
    return tmp_path / "made"


@pytest.fixture
def malicious(tmp_path, marker):
    """A run's folder with weights and a config that makes a folder when it is read as Detectron2 reads it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model_final.pth").touch()
    config = run / "config.yaml"
    config.write_text(f"MODEL:\n  MASK_ON: {RUNS_CODE} ['{marker}']\n")
    return config


def require_refused(arguments, config, marker, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and f"line 2 of {config}: the tag {RUNS_CODE} " in error
    assert not marker.exists()


def test_detectron2_would_run_it(malicious, marker):
    get_cfg().load_yaml_with_base(str(malicious), allow_unsafe=True)
    assert marker.is_dir()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--config-file", "{config}"),
        ("predict", "{image}", "--run", "{run}"),
        ("predict", "{image}", "--weights", "{run}/model_final.pth"),
        ("predict", "{image}", "--config-file", "{config}"),
        ("export", "--weights", "{run}/model_final.pth", "--format", "torchscript", "--output", "{run}/x.pt"),
        ("analyze", "{config}"),
        ("bench", "--config-file", "{config}"),
        ("report", "{run}"),
    ],
)
def test_no_command_runs_what_a_config_asks_for(arguments, malicious, marker, tmp_path, capsys):
    image = tmp_path / "image.png"
    image.touch()
    names = {"config": malicious, "run": malicious.parent, "image": image}
    require_refused([word.format(**names) for word in arguments], malicious, marker, capsys)


@pytest.mark.parametrize("base", ["run/config.yaml", "[run/config.yaml]", "{url}"])
def test_what_a_config_is_based_on_runs_nothing(base, malicious, marker, tmp_path, capsys, monkeypatch):
    url = "http://127.0.0.1:1/config.yaml"
    # As if it had been downloaded.
    opened = get_cfg()._open_cfg
    monkeypatch.setattr(
        "detectron2.config.CfgNode._open_cfg", lambda name: opened(str(malicious) if name == url else name)
    )
    derived = tmp_path / "derived.yaml"
    derived.write_text(f"_BASE_: {base.format(url=url)}\n")
    named = url if "url" in base else malicious
    require_refused(["train", "--config-file", str(derived)], named, marker, capsys)


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL: [", "line 2 of .*config.yaml: "),
        ("- MODEL", "config.yaml holds a list, not keys and values"),
        ("", "config.yaml holds a NoneType"),
        ("\x00", "config.yaml is not a text file in YAML: "),
        ("_BASE_: config.yaml", "config.yaml is not a valid config: it is based on itself"),
        ("MODEL: " + "[" * 5000, "config.yaml is not a valid config: it is based on itself, or nested"),
        ("MODEL: {DEVICES: cpu}", "there is no config key MODEL.DEVICES; did you mean MODEL.DEVICE"),
        ("MODEL: {MASK_ON: [1]}", "config.yaml is not a valid config: Type mismatch"),
        ("SOLVER: {STEPS: !!python/object/apply:eval ['(1,)']}", "line 1 of .*: the tag !!python/.*:eval "),
        ("SOLVER: {STEPS: !!python/object/apply:eval {args: x}}", "the tag !!python/object/apply:eval "),
        ("MODEL: !!python/name:os.system", "the tag !!python/name:os.system "),
        ("MODEL: !include other.yaml", "the tag !include "),
        ("SEED: 1\nMODEL: {}\nSEED: 2", "line 3 of .*: SEED is given twice; make them one"),
    ],
)
def test_other_files_are_named_with_what_is_wrong(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises(ValueError, match=message):
        read_config_file(str(path))
    path.write_bytes(b"MODEL: \xff")
    with pytest.raises(ValueError, match="config.yaml is not a text file in YAML"):
        read_config_file(str(path))


def test_detectron2s_retinanet_and_tuples_are_read_all_the_same(tmp_path):
    path = get_config_file("COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    theirs = get_cfg()
    add_rev_det_config(theirs)
    theirs.merge_from_file(path, allow_unsafe=True)
    ours = read_config_file(path)
    assert ours == theirs and type(ours.MODEL.RPN) is type(theirs.MODEL.RPN)
    derived = tmp_path / "derived.yaml"
    derived.write_text(
        yaml.dump({"_BASE_": path, "SOLVER": {"STEPS": (3, 5)}, "DATASETS": {"TRAIN": ("a", "b")}})
    )
    assert "!!python/tuple" in derived.read_text()
    ours = read_config_file(str(derived))
    assert (ours.SOLVER.STEPS, ours.DATASETS.TRAIN) == ((3, 5), ("a", "b"))
    assert ours.MODEL.ANCHOR_GENERATOR.SIZES == theirs.MODEL.ANCHOR_GENERATOR.SIZES


def test_configs_of_an_older_version_are_upgraded(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("VERSION: 1\nMODEL: {WEIGHT: old.pth}\n")
    cfg = read_config_file(str(path))
    assert (cfg.VERSION, cfg.MODEL.WEIGHTS) == (2, "old.pth")
