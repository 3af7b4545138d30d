"""Configs are read without running code, wherever a command or a function takes one."""

import functools
import html
import http.server
import os
import threading

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file

from rev_det.config import add_rev_det_config
from rev_det.config_files import read_config_file
from rev_det.engine import load_config
from rev_det.engine import main as train_main
from rev_det.model_zoo import find_config_file
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


@pytest.fixture
def server(tmp_path):
    """The address of ``tmp_path`` on a web server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_report_names_a_config_that_would_run_code_and_does_not_run_it(malicious, marker):
    assert main(["report", str(malicious.parent)]) == 0
    page = html.unescape((malicious.parent / "report.html").read_text())
    assert f"the tag {RUNS_CODE} " in page and not marker.exists()


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
    ],
)
def test_no_command_runs_what_a_config_asks_for(arguments, malicious, marker, tmp_path, capsys):
    image = tmp_path / "image.png"
    image.touch()
    names = {"config": malicious, "run": malicious.parent, "image": image}
    require_refused([word.format(**names) for word in arguments], malicious, marker, capsys)


@pytest.mark.parametrize("base", ["run/config.yaml", "[run/config.yaml]", "{url}"])
def test_what_a_config_is_based_on_runs_nothing(base, malicious, marker, tmp_path, server, capsys):
    url = f"{server}/run/config.yaml"
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
        ("MODEL: " + "[" * 5000, "config.yaml is not a valid config: it is nested too deeply"),
        ("MODEL: {DEVICES: cpu}", "there is no config key MODEL.DEVICES; did you mean MODEL.DEVICE"),
        ("MODEL: {MASK_ON: [1]}", "config.yaml is not a valid config: Type mismatch"),
        ("MODEL: {DEVICE: null}", "config.yaml: MODEL.DEVICE must be of type str, such as 'cuda'; got None"),
        ("MODEL:", "config.yaml: MODEL holds other keys, such as MODEL.*; set those, got None"),
        ("MODEL: 3", "config.yaml: MODEL holds other keys, .* got 3"),
        ("MODEL: {REV: [1]}", "config.yaml: MODEL.REV holds other keys, such as MODEL.REV.ACTIVATIONS"),
        ("1: 2", "config.yaml: 1 is not the name of a config key"),
        ("MODEL: {null: 2}", "config.yaml: None is not the name of a config key"),
        ("SOLVER: {STEPS: !!python/object/apply:eval ['(1,)']}", "line 1 of .*: the tag !!python/.*:eval "),
        ("SOLVER: {STEPS: !!python/object/apply:eval {args: x}}", "the tag !!python/object/apply:eval "),
        ("MODEL: !!python/name:os.system", "the tag !!python/name:os.system "),
        ("MODEL: !include other.yaml", "the tag !include "),
        ("SEED: 1\nMODEL: {}\nSEED: 2", "line 3 of .*: SEED is given twice; make them one"),
        ("_BASE_: config.yaml", "config.yaml is not a valid config: it is based on itself"),
        ("_BASE_: 5", "_BASE_ of .*config.yaml must be the path or URL of a config, or a list; got 5"),
        ("_BASE_:", "_BASE_ of .*config.yaml must be .* got None"),
        ("_BASE_: [5]", r"_BASE_ of .*config.yaml must be .* got \[5\]"),
        ("_BASE_: [missing.yaml]", "^_BASE_ of .*config.yaml: .*missing.yaml does not exist"),
        ("_BASE_: .", "^_BASE_ of .*config.yaml: .* is a folder"),
        ("_BASE_: fifo", "^_BASE_ of .*config.yaml: .*fifo is not a file"),
        ("_BASE_: loop", "^_BASE_ of .*config.yaml: .*loop is not a file"),
        (
            "_BASE_: http://127.0.0.1:1/x.yaml",
            "^_BASE_ of .*: http://127.0.0.1:1/x.yaml cannot be read: .*refus",
        ),
    ],
)
def test_other_files_are_named_once_with_what_is_wrong(text, message, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / "config.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises((ValueError, OSError), match=message) as info:
        read_config_file(str(path))
    assert str(info.value).count(str(path)) == 1


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"MODEL: \xff")
    with pytest.raises(ValueError, match="config.yaml is not a text file in YAML"):
        read_config_file(str(tmp_path / "config.yaml"))


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, what in {"fifo": "is not a file", "loop": "is not a file", "none": "does not exist"}.items():
        for read in (read_config_file, find_config_file, load_config):
            with pytest.raises(FileNotFoundError, match=f"{name} {what}"):
                read(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="is a folder.* no model"):
        find_config_file(str(tmp_path))
    with pytest.raises(ValueError, match="--config-file is missing"):
        load_config("")


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
    ours = read_config_file(str(derived), ["SOLVER.STEPS", "(4,)"])
    assert (ours.SOLVER.STEPS, ours.DATASETS.TRAIN) == ((4,), ("a", "b"))
    assert ours.MODEL.ANCHOR_GENERATOR.SIZES == theirs.MODEL.ANCHOR_GENERATOR.SIZES


def test_configs_of_an_older_version_are_upgraded(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("VERSION: 1\nMODEL: {WEIGHT: old.pth}\n")
    cfg = read_config_file(str(path))
    assert (cfg.VERSION, cfg.MODEL.WEIGHTS) == (2, "old.pth")


def test_a_lazy_config_is_sent_to_detectron2s_script(capsys):
    assert train_main(["--config-file", "configs/Lazy/fcos_rev_mvit_b.py"]) == 2
    assert "lazyconfig_train_net.py --config-file configs/Lazy/fcos_rev_mvit_b.py" in capsys.readouterr().err
