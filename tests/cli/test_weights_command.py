"""`rev-det weights`: inspect, convert and check."""

import hashlib
import json
import os
import re

import pytest
import torch
from tiny_named import add_tiny_model, save_tiny

from rev_det.checkpoint import load_pretrained
from rev_det.checkpoint.named import NAMED_MODELS
from rev_det.cli import main


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    add_tiny_model(monkeypatch)
    return save_tiny(tmp_path / "tiny.pyth")


def refuse(capsys, *arguments):
    """The one line on the error stream of a command that ends with exit code 2 and prints nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err)
    return err


# ---- inspect ----


def test_a_sound_file(tiny, capsys):
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


def test_a_file_of_another_size(tmp_path, capsys):
    assert main(["weights", "inspect", save_tiny(tmp_path / "tiny.pyth")]) == 0
    assert capsys.readouterr().out.endswith("  sound; the size of none of the named models\n")


@pytest.mark.parametrize(
    "changes, end",
    [
        ({"norm.bias": None}, "not sound: 1 problem;"),
        ({"norm.bias": None, "extra": torch.ones(1)}, "not sound: 2 problems;"),
        ({"norm.bias": torch.full((64,), torch.inf)}, "not sound: 1 problem;"),
    ],
)
def test_a_file_with_problems_is_described_and_the_exit_code_is_1(tmp_path, changes, end, capsys):
    path = save_tiny(tmp_path / "tiny.pyth", **changes)
    assert main(["weights", "inspect", path]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^  problem: .*norm\.bias", out, re.MULTILINE)
    assert out.splitlines()[-1].strip().startswith(end)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[: len(data) // 2], "is damaged or truncated"),
        (lambda data: flip(data, len(data) // 2), r"is damaged: the checksum of its member \S+ is wrong"),
        (lambda data: b"", "is empty"),
        (lambda data: b"<!DOCTYPE html><title>404</title>", "is a web page"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(tiny, damage, words, capsys):
    with open(tiny, "rb") as f:
        data = f.read()
    with open(tiny, "wb") as f:
        f.write(damage(data))
    assert re.search(words, refuse(capsys, "weights", "inspect", tiny))


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def test_a_missing_file(tmp_path, capsys):
    line = refuse(capsys, "weights", "inspect", str(tmp_path / "absent.pyth"))
    assert line == f"error: weight file {tmp_path}/absent.pyth does not exist\n"


def test_the_digest_is_verified(tiny, capsys):
    with open(tiny, "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    assert main(["weights", "inspect", f"{tiny}#sha256={digest}"]) == 0
    capsys.readouterr()
    assert f"its sha256 is {digest}" in refuse(capsys, "weights", "inspect", f"{tiny}#sha256={'0' * 64}")


@pytest.mark.parametrize("changes, code", [({}, 0), ({"norm.bias": None}, 1)])
def test_json_has_the_same_figures(tmp_path, changes, code, capsys):
    path = save_tiny(tmp_path / "tiny.pyth", **changes)
    assert main(["weights", "inspect", path, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["layout"], found["model"], found["classes"]) == (
        path,
        "pyslowfast",
        None,
        10,
    )
    assert (found["geometry"]["family"], found["geometry"]["last_block_indexes"]) == ("rev_vit", [3])
    assert len(found["problems"]) == code


@pytest.mark.parametrize("name", ["tiny_rev_vit", "tiny_rev_mvit"])
def test_the_official_savers_files_are_sound_and_damaged_copies_are_not(shared, name, tmp_path, capsys):
    source = shared / "reference" / "container" / f"{name}.pyth"
    assert main(["weights", "inspect", str(source)]) == 0
    capsys.readouterr()
    data = source.read_bytes()
    for damaged in (flip(data, len(data) // 2), data[:-1000]):
        (tmp_path / "copy.pyth").write_bytes(damaged)
        assert "copy.pyth is damaged" in refuse(capsys, "weights", "inspect", str(tmp_path / "copy.pyth"))


# ---- convert ----


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_converted_file_holds_the_same_backbone(tiny, tmp_path, ending, capsys):
    from rev_det.checkpoint.named import build_named_model

    out = str(tmp_path / f"new{ending}")
    assert main(["weights", "convert", tiny, out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 69 tensors, converted from the pyslowfast layout\n")
    one, other = build_named_model("rev_vit_tiny"), build_named_model("rev_vit_tiny")
    load_pretrained(one, tiny)
    load_pretrained(other, out)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_an_existing_file_is_overwritten_by_force_only(tiny, tmp_path, capsys):
    out = tmp_path / "new.pth"
    out.write_text("mine")
    assert "--force" in refuse(capsys, "weights", "convert", tiny, str(out))
    assert out.read_text() == "mine"
    assert main(["weights", "convert", tiny, str(out), "--force"]) == 0
    capsys.readouterr()
    assert main(["weights", "inspect", str(out)]) == 0


def test_what_is_not_whole_is_not_converted(tmp_path, capsys):
    path = save_tiny(tmp_path / "tiny.pyth", **{"norm.bias": None})
    assert "is not whole" in refuse(capsys, "weights", "convert", path, str(tmp_path / "new.pth"))
    assert os.listdir(tmp_path) == ["tiny.pyth"]


# ---- check ----


def test_check_prints_the_report_and_the_fingerprint_which_conversion_does_not_change(tiny, tmp_path, capsys):
    assert main(["weights", "check", tiny]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny}: 69/69 tensors loaded (pyslowfast layout)"
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


def test_check_refuses_another_model_and_unknown_ones(tiny, capsys):
    assert "Another size" in refuse(capsys, "weights", "check", tiny, "--model", "rev_vit_s")
    assert "no model 'r50'" in refuse(capsys, "weights", "check", tiny, "--model", "r50")


def test_check_says_which_models_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["weights", "check", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in NAMED_MODELS)
