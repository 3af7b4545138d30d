"""The export command: what it prints and writes, and its errors."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from nano_detector import nano_config, save_image

from rev_det_cli import main

THRESHOLD = "MODEL.ROI_HEADS.SCORE_THRESH_TEST"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a training run leaves: weights, and the config beside them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    cfg = nano_config()
    torch.save({"model": build_model(cfg).state_dict()}, "model_final.pth")
    Path("config.yaml").write_text(cfg.dump())
    return tmp_path


def arguments(*more, format="torchscript", output="detector.ts"):
    return ["export", "--weights", "model_final.pth", "--format", format, "--output", output, *more]


def test_a_detector_is_written_with_the_config_beside_its_weights(run, capsys):
    assert main(arguments("--size", "64", "96", THRESHOLD, "0.01")) == 0
    first, second, last = capsys.readouterr().out.splitlines()[-3:]
    assert first.startswith("input 3 x 64 x 96: largest difference ") and first.endswith(" detections")
    assert second.startswith("input 3 x 53 x 83: largest difference ")
    assert last == "written to detector.ts"
    assert len(torch.jit.load("detector.ts")(torch.zeros(3, 50, 60))) == 5


def test_the_size_is_that_of_tests_unless_given(run, capsys):
    assert main(arguments("--part", "backbone", "--config-file", "config.yaml")) == 0
    # MIN_SIZE_TEST and MAX_SIZE_TEST are 64 and 96; a backbone is traced with two images.
    assert main(arguments("--part", "backbone", "INPUT.MIN_SIZE_TEST", "97")) == 0
    out = capsys.readouterr().out
    assert "input 2 x 3 x 64 x 96: largest difference" in out
    assert "input 2 x 3 x 128 x 96: largest difference" in out
    assert main(arguments("INPUT.MIN_SIZE_TEST", "0")) == 2
    assert "give --size H W" in capsys.readouterr().err


def test_an_image_of_ones_own_is_tried(run, capsys):
    save_image(run / "photo.png", seed=1)
    assert main(arguments("--image", "photo.png", "--size", "64", "64", THRESHOLD, "0.01")) == 0
    assert "input 3 x 64 x 64" in capsys.readouterr().out


def test_a_check_without_detections_is_said_to_be_little(run, capsys):
    assert main(arguments("--size", "64", "64", THRESHOLD, "1.0")) == 0
    captured = capsys.readouterr()
    assert "over 0 detections" in captured.out
    assert "warning: nothing was detected, which checks little; give an --image" in captured.err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--output", "a.txt"], "--output a.txt cannot be written: its name must end with .pt or .ts"),
        (
            ["--format", "torch-export", "--output", "a.pt2"],
            "what works: torchscript and onnx of the detector",
        ),
        (["--format", "coreml"], "--format is 'coreml'"),
        (["--config-file", "no_such_model"], "there is no model 'no_such_model'"),
        (["--weights", "gone.pth", "--config-file", "config.yaml"], "gone.pth"),
        (["--config-file", "mask_rcnn_rev_vit_nano_fpn"], "model_final.pth"),
        (["--image", "gone.png"], "gone.png"),
        (["--image", "config.yaml"], "--image config.yaml cannot be read"),
        (["--part", "backbone", "--size", "100", "100"], "must be multiples of 32"),
        (
            ["--image", "/dev/null"],
            "--image /dev/null cannot be read: /dev/null is a pipe or a device, not a file",
        ),
        (
            ["INPUT.MIN_SIZE_TEST", "-5"],
            "INPUT.MIN_SIZE_TEST must be a whole number of at least 0 and at most 9459, got -5",
        ),
        (["--output", "weights.ts", "--weights", "weights.ts"], "would overwrite weights.ts, which is read"),
        (["--output", "/proc/a.ts"], "--output /proc/a.ts cannot be written to the folder /proc"),
        (["MODEL.NO_KEY", "1"], "there is no config key MODEL.NO_KEY"),
        (["MODEL.ROI_HEADS.NAME", "NoHeads"], "the config cannot be built"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(run, more, message, capsys):
    shutil.copy("model_final.pth", "weights.ts")
    before = sorted(run.iterdir())
    assert main(arguments(*more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert sorted(run.iterdir()) == before


def test_a_killed_export_leaves_no_part(run, monkeypatch):
    def be_killed(part, path):
        assert part.endswith(".part-detector.ts") and Path(part).stat().st_size
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("os.replace", be_killed)
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(arguments("--size", "64", "64", "--part", "backbone"))
    assert stop.value.code == 143 and sorted(run.iterdir()) == before
