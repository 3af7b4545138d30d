"""The bench and analyze commands: what they print and write, and their errors."""

import csv
import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from rev_det_cli import main

ROOT = Path(__file__).resolve().parents[2]
NANO = str(ROOT / "configs" / "Quickstart" / "mask_rcnn_rev_mvit_nano_fpn.yaml")
SMALL = ["--model", "rev_vit_s", "--depth", "2", "--size", "32x32", "--batch", "1"]


@pytest.fixture(autouse=True)
def no_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def figures(path):
    content = json.loads(Path(path).read_text())
    return content, {row["labels"]["training"]: row["figures"] for row in content["rows"]}


def test_a_backbone_is_counted_beside_its_peers(capsys):
    files = ["--json", "a.json", "--csv", "a.csv", "--plot", "a.png"]
    assert main(["bench", *SMALL, "--peers", *files, "--at-peak", "20"]) == 0
    out = capsys.readouterr().out
    assert "relative" in out and "counted)" in out and "estimated)" in out and "alive at the peak" in out
    content, by_training = figures("a.json")
    assert {len(row["at_peak"]) for row in content["rows"]} == {20}
    assert {"cached", "checkpoint", "checkpoint, attention kept", "reversible, attention kept"} <= set(
        by_training
    )
    cases = "--model rev_vit_s --peers --depth 2 --size 32x32 --batch 1"
    assert content["command"] == f"rev-det bench {cases} --json a.json --csv a.csv --plot a.png"
    assert sorted(path.name for path in Path().iterdir()) == ["a.csv", "a.json", "a.png"]


def test_the_rules_of_the_cpu_are_counted_on_request(capsys):
    def count(*arguments):
        case = ["--model", "rev_mvit_b", "--depth", "7", "--size", "64x64", "--activations", "cached"]
        assert main(["bench", *case, *arguments, "--json", "a.json"]) == 0
        return figures("a.json")

    content, cuda = count()
    assert "by the rules of cuda" in content["definitions"][0]
    assert "2.5 TB/s" in content["definitions"][0]
    assert {"bytes moved", "launches", "estimated time"} < set(cuda["cached"])
    content, cpu = count("--device-rules", "cpu")
    assert "by the rules of cpu" in content["definitions"][0]
    assert "--device-rules cpu" in content["command"]
    # The CPU leaves the norms of pooled keys and values in bfloat16.
    assert cpu["cached"]["bytes moved"]["value"] < cuda["cached"]["bytes moved"]["value"]
    assert cpu["cached"]["FLOPs"] == cuda["cached"]["FLOPs"]


def test_a_sweep_runs_every_combination():
    arguments = ["--model", "rev_vit_s", "--depth", "2", "3", "--size", "32x32", "48x32", "--batch", "1", "2"]
    assert main(["bench", *arguments, "--activations", "cached", "reversible", "--json", "a.json"]) == 0
    rows = json.loads(Path("a.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 2
    assert len({json.dumps(row["labels"]) for row in rows}) == 16


def test_attention_need_not_be_kept():
    arguments = ["--activations", "reversible", "--no-keep-attention", "--dtype", "fp32", "--json", "a.json"]
    assert main(["bench", *SMALL, *arguments]) == 0
    content, by_training = figures("a.json")
    assert list(by_training) == ["reversible"]
    assert "--no-keep-attention" in content["command"]
    assert content["rows"][0]["labels"]["type"] == "fp32"


def test_a_backbone_is_measured_on_the_cpu(capsys):
    arguments = ["--device", "cpu", "--warm-up", "1", "--steps", "2", "--activations", "cached", "reversible"]
    assert main(["bench", *SMALL, *arguments, "--json", "a.json"]) == 0
    _, by_training = figures("a.json")
    relative = by_training["reversible, attention kept"]["time, relative"]
    assert (relative["unit"], relative["method"]) == ("x cached", "measured")
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "how", [["--peers"], ["--device", "cpu", "--warm-up", "1", "--steps", "2"]], ids=["counted", "measured"]
)
def test_a_whole_detector_is_counted_and_measured(how):
    arguments = ["--config-file", NANO, "--size", "64x64", "--batch", "1", "--activations", "reversible"]
    classes = ["--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    assert main(["bench", *arguments, *how, "--json", "a.json", *classes]) == 0
    content, by_training = figures("a.json")
    made = by_training["reversible, attention kept"]
    assert content["rows"][0]["labels"]["depth"] == 9
    is_counted = "--peers" in how
    assert ("time" in made) != is_counted and ("FLOPs" in made) == is_counted
    if is_counted:
        assert {"cached", "checkpoint", "checkpoint, attention kept"} < set(by_training)
        for row in content["rows"]:
            parts = {"weights", "optimizer state", "gradients", "outputs", "backbone: working memory"}
            assert parts | {"heads: kept for backward"} <= set(row["split"])
            assert row["figures"]["in all"]["value"] > row["figures"]["peak memory"]["value"]


def test_the_depth_of_a_detector_can_be_swept():
    arguments = ["--config-file", NANO, "--size", "64x64", "--batch", "1", "--activations", "cached"]
    assert main(["bench", *arguments, "--depth", "7", "12", "--json", "a.json"]) == 0
    rows = json.loads(Path("a.json").read_text())["rows"]
    assert rows[0]["figures"]["FLOPs"]["value"] < rows[1]["figures"]["FLOPs"]["value"]


def test_the_largest_batch_under_a_limit_is_counted():
    arguments = ["--model", "rev_vit_s", "--depth", "1", "--size", "32x32", "--dtype", "fp32"]
    limit = ["--max-batch", "--memory-limit", "60MiB", "--activations", "cached"]
    assert main(["bench", *arguments, *limit, "--json", "a.json"]) == 0
    content, by_training = figures("a.json")
    assert by_training["cached"]["largest batch"]["value"] > 1
    assert "0.06 GiB" in content["definitions"][1]


def test_any_detectron2_config_is_counted(tmp_path):
    Path("r50.yaml").write_text(
        "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n  WEIGHTS: ''\n"
        "  BACKBONE: {NAME: build_resnet_fpn_backbone}\n  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}\n"
        "  FPN: {IN_FEATURES: [res2, res3, res4, res5]}\n"
        "  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}\n"
        "  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}\n"
        "  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5]}\n"
        "  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 64, POOLER_RESOLUTION: 7}\n"
    )
    assert (
        main(["bench", "--config-file", "r50.yaml", "--size", "64x64", "--batch", "1", "--json", "a.json"])
        == 0
    )
    _, by_training = figures("a.json")
    assert list(by_training) == ["as configured"]
    assert main(["bench", "--config-file", "r50.yaml", "--activations", "cached"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "800"], "--size must be HEIGHTxWIDTH in pixels, such as 800x1344; got '800'"),
        (["--size", "0x32"], "--size must be HEIGHTxWIDTH"),
        (["--size", "99999x99999"], "--size 99999x99999 has more than 268 million pixels"),
        (["--batch", "1000000", "--size", "64x64"], "1000000 images of 64x64 would take very long to count"),
        (["--batch", "1000"], "1000 images of 800x1344 would take very long to count"),
        (
            ["--depth", "1000000", "--size", "64x64"],
            "2 images of 64x64 at depth 1000000 would take very long",
        ),
        (["--activations", "stored"], "--activations must be some of"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--depth", "0"], "--depth must be at least 1, got 0"),
        (["--depth", "5"], "--depth of a Rev-MViT must be at least 7"),
        (["--steps", "5"], "--steps and --warm-up are of a measurement: give a --device"),
        (["--device", "tpu"], "--device is 'tpu'; allowed on this machine are"),
        (["--device", "cpu", "--device-rules", "cpu"], "--device-rules is of a count: leave out --device"),
        (["--max-batch"], "--max-batch needs a --memory-limit"),
        (["--max-batch", "--memory-limit", "16"], "--memory-limit must be a number of GB, GiB, MB or MiB"),
        (["--max-batch", "--memory-limit", "0GB"], "--memory-limit must be a number"),
        (["--max-batch", "--memory-limit", "1GB", "--batch", "2"], "leave out --batch"),
        (["--memory-limit", "1GB", "--device", "cpu"], "--memory-limit is enforced on CUDA devices"),
        (["--preset", "figure3b"], "is about time, which cannot be counted: give a --device"),
        (["--preset", "detection", "--batch", "2", "--peers"], "leave out --peers, --batch"),
        (["--opts", "MODEL.MASK_ON", "False"], "--opts needs a --config-file"),
        (["--config-file", "missing.yaml"], "missing.yaml does not exist"),
        (
            ["--json", "missing/a.json"],
            "--json missing/a.json cannot be written: the folder",
        ),
        (["--json", "o", "--csv", "./o"], "--json and --csv are one file, ./o: give each a name of its own"),
        (["--config-file", "c.yaml", "--json", "c.yaml"], "the config and --json are one file, c.yaml"),
        (["--at-peak", "-1"], "--at-peak is of a count, and at least 0, got -1"),
        (["--device", "cpu", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--max-batch", "--memory-limit", "9" * 400 + "GB"], "--memory-limit must be a number of GB"),
        (["--csv", "../"], "../ cannot be written: it is a folder"),
        (["--plot", "a.xyz"], "a.xyz cannot be written: its name must end with .png or .pdf or .svg"),
        (["--memory-limit", "1GB"], "--memory-limit changes nothing here: give --max-batch"),
        (["--config-file", NANO, "--opts", "MODEL.META_ARCHITECTURE", "Other"], "the config cannot be built"),
        (["--config-file", NANO, "--opts", "MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON True"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]
    assert not list(Path().iterdir())


def test_a_float16_config_is_counted_though_the_cpu_does_not_train_in_it():
    arguments = ["--config-file", NANO, "--size", "64x64", "--batch", "1", "--activations", "cached"]
    amp = ["--opts", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "fp16"]
    assert main(["bench", *arguments, "--json", "a.json", *amp]) == 0
    assert figures("a.json")[0]["rows"][0]["labels"]["type"] == "bf16"


def test_a_gpu_without_bfloat16_is_not_asked_for_it(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert main(["bench", *SMALL, "--device", "cuda"]) == 2
    assert "does not compute in bfloat16: give --dtype fp32" in capsys.readouterr().err
    assert main(["bench", *SMALL, "--device", "cuda:3"]) == 2
    assert "--device is 'cuda:3'; allowed on this machine are cuda, cuda:0, cpu" in capsys.readouterr().err


def test_a_config_is_analyzed(capsys):
    parts = ["--size", "64x64", "--inversion", "--depth", "2"]
    files = ["--json", "a.json", "--csv", "a.csv", "--plot", "a.png"]
    few = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4"]
    assert main(["analyze", NANO, *parts, *files, "--opts", *few]) == 0
    out = capsys.readouterr().out
    for words in ("RevMViT", "12 GB", "reversible", "blocks.6", "N * 10^9 bytes"):
        assert words in out
    content = json.loads(Path("a.json").read_text())
    assert content["command"].startswith("rev-det analyze ")
    assert content["command"].endswith(
        " ".join([*parts[:2], *parts[3:], "--inversion", *files, "--opts", *few])
    )
    whole = content["modules"][0]
    assert whole["labels"] == {"module": "", "class": "GeneralizedRCNN"}
    assert whole["figures"]["FLOPs"]["unit"] == "multiply-adds"
    assert [row["labels"]["training"] for row in content["fits"]] == [
        *("cached", "checkpoint, attention kept", "reversible, attention kept"),
    ]
    inverted = content["inversion"]
    assert [row["labels"]["block"] for row in inverted] == [f"blocks.{i}" for i in (0, 2, 4, 5, 6, 8)]
    assert inverted[0]["figures"]["float32"]["value"] < 1e-5
    lines = list(csv.DictReader(Path("a.csv").open()))
    rows = [row for name in ("modules", "fits", "inversion") for row in content[name]]
    assert len(lines) == sum(len(row["figures"]) for row in rows)
    assert {line["table"] for line in lines} == {"modules", "fits", "inversion"}
    assert all(line["unit"] and line["method"] for line in lines)
    assert Path("a.png").stat().st_size > 10_000
    assert len(list(Path().iterdir())) == 3


def test_parts_of_the_analysis_can_be_left_out(capsys):
    left_out = ["--no-flops", "--no-fits", "--json", "a.json", "--opts", "MODEL.MASK_ON", "False"]
    assert main(["analyze", NANO, *left_out]) == 0
    content = json.loads(Path("a.json").read_text())
    assert set(content) == {"command", "config", "options", "size", "machine"}
    assert (content["size"], content["options"]) == ([128, 128], ["MODEL.MASK_ON", "False"])


@pytest.mark.parametrize("option", [[], ["--config-file"]])
def test_a_config_may_be_named_as_elsewhere(option):
    nothing = ["--no-flops", "--no-fits", "--json", "a.json"]
    assert main(["analyze", *option, "mask_rcnn_rev_mvit_nano_fpn", *nothing]) == 0
    content = json.loads(Path("a.json").read_text())
    assert content["config"] == "mask_rcnn_rev_mvit_nano_fpn" and content["size"] == [128, 128]
    assert content["command"].startswith("rev-det analyze mask_rcnn_rev_mvit_nano_fpn ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.yaml"], "missing.yaml does not exist, and there is no model"),
        (["mask_rcnn_rev_mvit_nano_fp"], "did you mean mask_rcnn_rev_mvit_nano_fpn "),
        ([], "CONFIG is missing"),
        ([NANO, "--config-file", NANO], "CONFIG and --config-file mean the same"),
        ([NANO, "--opts", "MODEL.NO_KEY", "1"], "there is no config key MODEL.NO_KEY"),
        ([NANO, "--size", "big"], "--size must be HEIGHTxWIDTH"),
        ([NANO, "--json", "missing/a.json"], "the folder missing does not exist"),
        ([NANO, "--csv", "a.png", "--plot", "a.png"], "--csv and --plot are one file, a.png"),
        (["a.yaml", "--json", "a.yaml"], "the config and --json are one file, a.yaml"),
        ([NANO, "--size", "9999x9999"], "--size 9999x9999 has more than 16 million pixels"),
        ([NANO, "--plot", "a"], "a cannot be written: its name must end with .png"),
        ([NANO, "--plot", "a.png", "--no-fits"], "--plot draws the images that fit: leave out --no-fits"),
        ([NANO, "--depth", "0"], "--depth must be at least 1, got 0"),
        ([NANO, "--opts", "MODEL.ROI_HEADS.NAME", "NoHeads"], "the config cannot be built"),
    ],
)
def test_errors_of_the_analysis_are_one_line(arguments, message, capsys):
    assert main(["analyze", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]
