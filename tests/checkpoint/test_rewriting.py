"""rewrite_weights: files that Detectron2's own checkpointer loads, exactly."""

import os

import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from tiny_weights import (
    detector_config,
    make_detector,
    make_vit,
    mmpretrain_state,
    pyslowfast_container,
    same,
    snapshot,
    without_prefix,
)

from rev_det.checkpoint import RevCheckpointer, convert_state_dict, load_pretrained, rewriting
from rev_det.checkpoint.rewriting import rewrite_weights


@pytest.fixture
def files(official_vit, official_mvit, tmp_path):
    """A published file of each family."""
    torch.save(pyslowfast_container(official_vit), tmp_path / "vit.pyth")
    torch.save(pyslowfast_container(official_mvit, num_heads=1), tmp_path / "mvit.pyth")
    return tmp_path


def detector(family):
    torch.manual_seed(0)
    # With norms in the pyramid of the backbone's name and shape, which Detectron2's heuristics cannot tell.
    cfg = detector_config(f"build_rev_{family}_fpn_backbone", norm="LN")
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    return build_model(cfg)


@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, RevCheckpointer])
@pytest.mark.parametrize("family", ["vit", "mvit"])
def test_both_checkpointers_load_a_rewritten_file_as_we_load_the_published(
    files, family, checkpointer, caplog
):
    rewrite_weights(files / f"{family}.pyth", files / "new.pth")
    expected, model = detector(family), detector(family)
    load_pretrained(expected, files / f"{family}.pyth")
    before = snapshot(model)
    caplog.clear()
    assert checkpointer(model).load(str(files / "new.pth")) == {}
    assert same(model.state_dict(), expected.state_dict())
    assert not same(model.state_dict(), before)
    assert not any("shape" in record.message or "unused" in record.message for record in caplog.records)


def test_types_are_kept_and_the_classifier_and_the_training_state_left_out(official_vit, tmp_path):
    state = {key: value.bfloat16() for key, value in official_vit.items()}
    torch.save(pyslowfast_container(state), tmp_path / "half.pyth")
    assert rewrite_weights(tmp_path / "half.pyth", tmp_path / "new.safetensors").splitlines() == [
        f"{tmp_path}/new.safetensors: 69 tensors, converted from the pyslowfast layout",
        "  the backbone's names start with backbone.net.",
        "  left out: head.projection.weight, head.projection.bias, epoch, optimizer_state, cfg",
    ]
    tensors = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert same(without_prefix(tensors, "backbone.net."), convert_state_dict(state))


@pytest.mark.parametrize("ending", [".pth", ".PTH", ".safetensors"])
def test_the_parts_of_a_fused_qkv_are_written_once_each(official_vit, tmp_path, ending):
    torch.save({"state_dict": mmpretrain_state(official_vit)}, tmp_path / "mm.pth")
    new = tmp_path / f"new{ending}"
    rewrite_weights(tmp_path / "mm.pth", new)
    model = make_vit()
    load_pretrained(model, new)
    assert same(model.state_dict(), convert_state_dict(official_vit))
    assert new.read_bytes().startswith(b"PK") == (ending != ".safetensors")
    values = sum(value.numel() for value in model.state_dict().values())
    assert os.path.getsize(new) < 4 * values + 40_000


@pytest.mark.parametrize("outer", ["", "module."])
def test_a_detector_keeps_its_names_without_what_wraps_it(outer, tmp_path):
    state = make_detector().state_dict()
    wrapped = {outer + key: value for key, value in state.items()}
    torch.save({"model": wrapped, "iteration": 7}, tmp_path / "d.pth")
    text = rewrite_weights(tmp_path / "d.pth", tmp_path / "new.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "new.safetensors"), state)
    assert text.splitlines()[1:] == [
        "  the backbone's names start with backbone.bottom_up.",
        "  left out: iteration",
    ]


def test_a_pyramid_becomes_a_detectors(tmp_path):
    model = make_detector("build_rev_vit_fpn_backbone")
    torch.save(model.backbone.state_dict(), tmp_path / "pyramid.pth")
    rewrite_weights(tmp_path / "pyramid.pth", tmp_path / "new.safetensors")
    expected = {key: value for key, value in model.state_dict().items() if key.startswith("backbone.")}
    assert same(safetensors.torch.load_file(tmp_path / "new.safetensors"), expected)


def test_a_backbone_in_another_module_is_taken_out_of_it(official_vit, tmp_path):
    bare = convert_state_dict(official_vit)
    state = {f"encoder.{key}": value for key, value in bare.items()} | {"decoder.weight": torch.ones(2)}
    torch.save(state, tmp_path / "other.pth")
    text = rewrite_weights(tmp_path / "other.pth", tmp_path / "new.safetensors")
    assert text.endswith("\n  left out: decoder.weight")
    tensors = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert same(without_prefix(tensors, "backbone.net."), bare)


@pytest.mark.parametrize(
    "out, error, words",
    [
        ("new.pyth", ValueError, r"new\.pyth cannot be written: .* end with .pth or .safetensors"),
        ("nowhere/new.pth", FileNotFoundError, "the folder .*nowhere does not exist"),
        ("folder.pth", ValueError, r"folder\.pth cannot be written: it is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_named(files, out, error, words):
    (files / "folder.pth").mkdir()
    with pytest.raises(error, match=words):
        rewrite_weights(files / "vit.pyth", files / out, overwrite=True)


def test_a_link_to_nowhere_is_not_overwritten_without_asking(files):
    (files / "new.pth").symlink_to("nowhere")
    with pytest.raises(ValueError, match="is there already"):
        rewrite_weights(files / "vit.pyth", files / "new.pth")


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_source_is_never_overwritten(official_vit, tmp_path, link):
    source = out = tmp_path / "weights.pth"
    torch.save(pyslowfast_container(official_vit), source)
    content = source.read_bytes()
    if link is not None:
        out = tmp_path / "link.pth"
        link(source, out)
    with pytest.raises(ValueError, match=r"is the file that is to be converted, .*weights\.pth"):
        rewrite_weights(f"{source}", out, overwrite=True)
    assert source.read_bytes() == out.read_bytes() == content


@pytest.mark.parametrize("stem", ["a" * 251, "é" * 125])
def test_a_name_as_long_as_the_file_system_allows_can_be_written(files, stem):
    rewrite_weights(files / "vit.pyth", files / f"{stem}.pth")
    assert load_pretrained(make_vit(), files / f"{stem}.pth").loaded == 69


def test_a_source_that_is_not_whole_is_refused(official_vit, tmp_path):
    del official_vit["norm.bias"]
    torch.save(official_vit, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth is not whole and was not converted: .* norm\.bias"):
        rewrite_weights(tmp_path / "part.pth", tmp_path / "new.pth")
    assert os.listdir(tmp_path) == ["part.pth"]


def test_a_failure_while_writing_leaves_everything_as_it_was(files, monkeypatch):
    (files / "new.pth").write_text("mine")

    def fail(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewriting.torch, "save", fail)
    with pytest.raises(OSError, match=r"new\.pth cannot be written: No space left on device; .* free"):
        rewrite_weights(files / "vit.pyth", files / "new.pth", overwrite=True)
    assert (files / "new.pth").read_text() == "mine"
    assert sorted(os.listdir(files)) == ["mvit.pyth", "new.pth", "vit.pyth"]
