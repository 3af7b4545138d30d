"""Checkpoints keep what made them, and are not taken for those of other classes."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from tiny_weights import make_vit
from torch import nn

import rev_det
from rev_det.checkpoint import RevCheckpointer
from rev_det.checkpoint.origin import origin_of
from rev_det.config import add_rev_det_config

CLASSES = ["ant", "bee", "cat"]
SWAPPED = ["cat", "bee", "ant"]


class Other(nn.Module):
    """Without a reversible backbone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)


def origin(classes, config=None):
    return {"classes": classes, "versions": {"torch": "2.0"}, "config": config or {"MODEL.MASK_ON": "True"}}


@pytest.fixture(params=[make_vit, Other])
def saved(request, tmp_path):
    """Makes the model, whose checkpoint is in tmp_path."""
    RevCheckpointer(request.param(), str(tmp_path), origin=origin(CLASSES)).save("model")
    return request.param


def test_what_a_run_is_made_by_is_plain_and_names_no_path(tmp_path):
    MetadataCatalog.get("pets_of_a_test").thing_classes = CLASSES
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.DATASETS.COCO_JSON = [["pets_of_a_test", "/secret/json", "/secret/images"]]
    cfg.MODEL.WEIGHTS = cfg.OUTPUT_DIR = "/secret"
    try:
        RevCheckpointer(Other(), str(tmp_path), origin=origin_of(cfg, ["pets_of_a_test"])).save("model")
        assert origin_of(cfg, ["unknown_in_a_test"])["classes"] is origin_of(cfg, [])["classes"] is None
    finally:
        MetadataCatalog.pop("pets_of_a_test")
        MetadataCatalog.pop("unknown_in_a_test")
    made_by = torch.load(tmp_path / "model.pth", weights_only=True)["made_by"]
    assert made_by["classes"] == CLASSES
    assert made_by["versions"]["rev_det"] == rev_det.__version__
    assert made_by["versions"]["torch"] == str(torch.__version__)
    assert made_by["config"]["MODEL.REV.ACTIVATIONS"] == "reversible"
    assert "/secret" not in str(made_by)


@pytest.mark.parametrize(
    "classes, words",
    [
        (SWAPPED, "0: ant, now cat, 2: cat, now ant"),
        (["ant", "bee", "Cat"], "2: cat, now Cat"),
        (CLASSES[:2], "2: cat, now none"),
        ([*CLASSES, "dog"], "3: none, now dog"),
    ],
)
def test_other_classes_are_an_error_where_they_matter(saved, tmp_path, classes, words, caplog):
    path = str(tmp_path / "model.pth")
    error = f"model.pth was trained on other classes than the data have \\({words}\\).*STRICT_CLASSES False"
    for resume, evaluation in ((True, False), (False, True), (True, True)):
        model = saved()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        checkpointer = RevCheckpointer(model, str(tmp_path), origin=origin(classes), evaluation=evaluation)
        with pytest.raises(ValueError, match=error):
            checkpointer.resume_or_load(path, resume=resume)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for options in ({"evaluation": True, "strict_classes": False}, {}):
        caplog.clear()
        RevCheckpointer(saved(), origin=origin(classes), **options).load(path)
        assert f"trained on other classes than the data have ({words})" in caplog.text


def test_equal_or_unknown_classes_are_none_of_it(saved, tmp_path, caplog):
    path = str(tmp_path / "model.pth")
    for present in (origin(CLASSES), origin(None), {}, None):
        RevCheckpointer(saved(), evaluation=True, origin=present).load(path)
    # Checkpoints of before, and of those who make their own.
    kept = torch.load(path, weights_only=True)
    for made_by in (None, 5, {}, origin(3), origin([1, 2]), origin(SWAPPED) | {"config": "x"}):
        torch.save(kept | {"made_by": made_by}, path)
        RevCheckpointer(saved(), evaluation=True, origin=origin(CLASSES)).load(path)
    assert "other classes" not in caplog.text


@pytest.mark.parametrize(
    "mode, named",
    [
        ("resume", ["torch 2.0, now 2.1", "MODEL.MASK_ON True, now False", "SOLVER.MAX_ITER 1, now 2"]),
        ("evaluation", ["MODEL.MASK_ON True, now False"]),
        ("load", []),
    ],
)
def test_another_config_and_other_versions_are_named(tmp_path, caplog, mode, named):
    before = origin(CLASSES, {"MODEL.MASK_ON": "True", "SOLVER.MAX_ITER": "1", "INPUT.GONE": "1"})
    now = origin(CLASSES, {"MODEL.MASK_ON": "False", "SOLVER.MAX_ITER": "2", "INPUT.NEW": "1"})
    now["versions"] = {"torch": "2.1"}
    RevCheckpointer(make_vit(), str(tmp_path), origin=before).save("model")
    checkpointer = RevCheckpointer(make_vit(), str(tmp_path), origin=now, evaluation=mode == "evaluation")
    with caplog.at_level(logging.WARNING):
        checkpointer.resume_or_load(str(tmp_path / "model.pth"), resume=mode == "resume")
    lines = [text for text in caplog.messages if "was made with" in text]
    assert [line.partition("was made with ")[2] for line in lines] == ([", ".join(named)] if named else [])
