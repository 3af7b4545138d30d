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
    make_mvit,
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
@pytest.mark.parametrize("family, prefix", [("vit", "backbone.net."), ("mvit", "backbone.bottom_up.")])
def test_both_checkpointers_load_a_rewritten_file_as_we_load_the_published(
    files, family, prefix, checkpointer, caplog
):
    written = rewrite_weights(files / f"{family}.pyth", files / "new.pth")
    assert written.prefix == prefix
    expected, model = detector(family), detector(family)
    report = load_pretrained(expected, files / f"{family}.pyth")
    before = snapshot(model)
    caplog.clear()
    rest = checkpointer(model).load(str(files / "new.pth"))
    assert same(model.state_dict(), expected.state_dict())
    assert not same(model.state_dict(), before)
    assert written.tensors == report.loaded
    assert rest == {}
    assert not any("shape" in record.message or "unused" in record.message for record in caplog.records)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_rewritten_file_loads_into_a_bare_backbone(files, ending):
    rewrite_weights(files / "mvit.pyth", files / f"new{ending}")
    expected, model = make_mvit(), make_mvit()
    load_pretrained(expected, files / "mvit.pyth")
    load_pretrained(model, files / f"new{ending}")
    assert same(model.state_dict(), expected.state_dict())


def test_types_are_kept_and_the_classifier_and_the_training_state_left_out(official_vit, tmp_path):
    state = {key: value.bfloat16() for key, value in official_vit.items()}
    torch.save(pyslowfast_container(state), tmp_path / "half.pyth")
    written = rewrite_weights(tmp_path / "half.pyth", tmp_path / "new.safetensors")
    assert written.dropped == [
        "head.projection.weight",
        "head.projection.bias",
        "epoch",
        "optimizer_state",
        "cfg",
    ]
    assert str(written).splitlines() == [
        f"{tmp_path}/new.safetensors: 69 tensors, converted from the pyslowfast layout",
        "  the backbone's names start with backbone.net.",
        "  left out: head.projection.weight, head.projection.bias, epoch, optimizer_state, cfg",
    ]
    tensors = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert same(without_prefix(tensors, "backbone.net."), convert_state_dict(state))


def test_the_parts_of_a_fused_qkv_are_written_once_each(official_vit, tmp_path):
    torch.save({"state_dict": mmpretrain_state(official_vit)}, tmp_path / "mm.pth")
    for ending in (".pth", ".safetensors"):
        rewrite_weights(tmp_path / "mm.pth", tmp_path / f"new{ending}")
        model = make_vit()
        load_pretrained(model, tmp_path / f"new{ending}")
        assert same(model.state_dict(), convert_state_dict(official_vit))
        values = sum(value.numel() for value in model.state_dict().values())
        assert os.path.getsize(tmp_path / f"new{ending}") < 4 * values + 40_000


@pytest.mark.parametrize("outer", ["", "module."])
def test_a_detector_keeps_its_names_without_what_wraps_it(outer, tmp_path):
    state = make_detector().state_dict()
    torch.save(
        {"model": {outer + key: value for key, value in state.items()}, "iteration": 7}, tmp_path / "d.pth"
    )
    written = rewrite_weights(tmp_path / "d.pth", tmp_path / "new.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "new.safetensors"), state)
    assert (written.prefix, written.dropped) == ("backbone.bottom_up.", ["iteration"])


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
    written = rewrite_weights(tmp_path / "other.pth", tmp_path / "new.safetensors")
    assert written.dropped == ["decoder.weight"]
    tensors = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert same(without_prefix(tensors, "backbone.net."), bare)


def test_an_existing_file_is_replaced_only_on_request(files):
    (files / "new.pth").write_text("mine")
    with pytest.raises(ValueError, match=r"new\.pth is there already.*--force"):
        rewrite_weights(files / "vit.pyth", files / "new.pth")
    assert (files / "new.pth").read_text() == "mine"
    rewrite_weights(files / "vit.pyth", files / "new.pth", overwrite=True)
    assert torch.load(files / "new.pth", weights_only=True).keys() == {"model"}


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
