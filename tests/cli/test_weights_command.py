"""`rev-det weights`: inspect, convert and check."""

import json
import os
import re

import pytest
import torch
from tiny_named import add_tiny_model, save_tiny

from rev_det.checkpoint.named import NAMED_MODELS
from rev_det_cli import main

NOT_UTF8 = os.fsdecode(b"w\xff.pth")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    add_tiny_model(monkeypatch)
    return save_tiny(tmp_path / "tiny.pyth")


def refuse(capsys, *arguments):
    """The one line on the error stream of a command that ends with exit code 2 and prints nothing else."""
    assert main(["weights", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err)
    return err


def test_inspect_describes_a_sound_file(tiny, capsys):
    assert main(["weights", "inspect", tiny]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tiny}: Rev-ViT-TINY (width 32, depth 4)",
        "  layout: pyslowfast",
        "  backbone: 69 tensors, 76,064 parameters (69 float32)",
        "  position embedding: 4 x 4",
        "  classifier: 10 classes",
        "  also holds: epoch, cfg",
        "  sound; the size of rev_vit_tiny",
    ]


@pytest.mark.parametrize(
    "changes, end",
    [
        ({"norm.bias": None}, "not sound: 1 problem; the size of none of the named models"),
        ({"norm.bias": None, "extra": torch.ones(1)}, "not sound: 2 problems; .*"),
    ],
)
def test_inspect_lists_problems_and_the_exit_code_is_1(tmp_path, changes, end, capsys):
    path = save_tiny(tmp_path / "tiny.pyth", **changes)
    assert main(["weights", "inspect", path]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^  problem: .*norm\.bias", out, re.MULTILINE)
    assert re.fullmatch(f"  {end}", out.splitlines()[-1])


@pytest.mark.parametrize("changes, code", [({}, 0), ({"norm.bias": None}, 1)])
def test_inspect_prints_the_same_as_json(tmp_path, changes, code, capsys):
    path = save_tiny(tmp_path / "tiny.pyth", **changes)
    assert main(["weights", "inspect", path, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert len(found.pop("problems")) == code
    assert found.pop("geometry") == {
        "family": "rev_vit",
        "width": 32,
        "depth": 4,
        "last_block_indexes": [3],
        "patch_kernel": [16, 16],
        "grid": 4,
        "mlp_ratio": 4.0,
        "head_dim": None,
    }
    assert found == {
        "source": path,
        "layout": "pyslowfast",
        "model": None,
        "tensors": 69 - code,
        "parameters": 76_064 - 64 * code,
        "dtypes": {"float32": 69 - code},
        "classes": 10,
        "others": 0,
        "training_state": ["epoch", "cfg"],
    }


@pytest.mark.parametrize("action", [["inspect"], ["check"], ["convert", "new.pth"]])
def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(tiny, tmp_path, action, capsys):
    action, *out = action
    absent = str(tmp_path / "absent.pyth")
    assert refuse(capsys, action, absent, *out) == f"error: weight file {absent} does not exist\n"
    assert "expected 000" in refuse(capsys, action, f"{tiny}#sha256={'0' * 64}", *out)
    with open(tiny, "r+b") as file:
        file.truncate(9000)
    assert "tiny.pyth is damaged or truncated" in refuse(capsys, action, tiny, *out)


def test_convert_overwrites_a_file_by_force_only(tiny, tmp_path, capsys):
    out = tmp_path / "new.pth"
    out.write_text("mine")
    assert "--force" in refuse(capsys, "convert", tiny, str(out))
    assert out.read_text() == "mine"
    assert main(["weights", "convert", tiny, str(out), "--force"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out}: 69 tensors, converted from the pyslowfast layout\n")
    assert main(["weights", "inspect", str(out)]) == 0


def test_check_prints_the_result_and_the_fingerprint_which_conversion_does_not_change(tiny, tmp_path, capsys):
    assert main(["weights", "check", tiny]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny}: 71/71 tensors loaded (pyslowfast layout)"
    start = lines.index("rev_vit_tiny on the fixed input, in float64:")
    (scale, logits) = lines[start + 1 :]
    assert re.fullmatch(
        r"  last_feat \(1 x 64 x 14 x 14\): mean \S+, std \S+, values( -?\d\.\d{5}){4}, crc [0-9a-f]{8}",
        scale,
    )
    assert logits.startswith("  logits (1 x 10): mean ")

    out = str(tmp_path / "new.safetensors")
    assert main(["weights", "convert", tiny, out]) == 0
    capsys.readouterr()
    assert main(["weights", "check", out, "--model", "rev_vit_tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == scale


def test_check_refuses_another_model_and_says_which_there_are(tiny, capsys):
    assert "Another size" in refuse(capsys, "check", tiny, "--model", "rev_vit_s")
    line = refuse(capsys, "check", tiny, "--model", "r50")
    assert "no model 'r50'" in line and all(name in line for name in NAMED_MODELS)


@pytest.mark.parametrize("name", [NOT_UTF8, f"{NOT_UTF8[:-4]}.safetensors"])
def test_a_name_that_is_not_utf_8_can_be_printed(tiny, tmp_path, name, capsys):
    shown = str(tmp_path / name).replace("\udcff", "\\udcff")
    assert main(["weights", "convert", tiny, str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.startswith(f"{shown}: 69 tensors")
    for action in ("inspect", "check"):
        assert main(["weights", action, str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.startswith(f"{shown}: ")
    assert "\\udcff" in refuse(capsys, "inspect", str(tmp_path / "no" / name))
