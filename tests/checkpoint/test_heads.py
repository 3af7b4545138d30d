"""A detector's heads: for another number of classes, and not in the file at all."""

import logging
import re

import pytest
import torch
from tiny_weights import make_detector, refuse, snapshot

from rev_det.checkpoint import load_pretrained

CLASS_HEADS = {
    "GeneralizedRCNN": [
        f"roi_heads.{name}.{what}"
        for name in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
        for what in ("weight", "bias")
    ],
    "RetinaNet": ["head.cls_score.weight", "head.cls_score.bias"],
}


@pytest.mark.parametrize(
    "arch, words",
    [
        ("GeneralizedRCNN", r"5 in the file, 3 in the model \(MODEL.ROI_HEADS.NUM_CLASSES\)"),
        ("RetinaNet", r"5 in the file, 3 in the model \(MODEL.RETINANET.NUM_CLASSES\)"),
    ],
)
def test_heads_for_other_classes_start_anew_in_training_and_are_an_error_in_evaluation(arch, words, caplog):
    source = make_detector(classes=5, arch=arch).state_dict()
    target = make_detector(classes=3, arch=arch)
    text = refuse(target, source, f"another number of classes: {words}", evaluation=True)
    key = re.search(r"MODEL\.\w+\.NUM_CLASSES", words.replace("\\", "")).group()
    assert f"set {key} to the file's" in text
    assert "MODEL.REV_MVIT" not in text  # the backbone fits
    before = snapshot(target)
    with caplog.at_level(logging.WARNING, "rev_det"):
        report = load_pretrained(target, source)
    assert report.initialised == CLASS_HEADS[arch]
    assert report.loaded == report.expected == len(source) - len(CLASS_HEADS[arch])
    for key, value in target.state_dict().items():
        assert torch.equal(value, (before if key in CLASS_HEADS[arch] else source)[key])
    (record,) = caplog.records
    assert "another number of classes" in record.getMessage()


def test_heads_that_differ_in_more_than_classes_are_an_error():
    source = make_detector().state_dict()
    source["roi_heads.box_predictor.bbox_pred.weight"] = torch.zeros(4, 16)  # one box for all classes
    source["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(4)
    refuse(make_detector(), source, r"bbox_pred.weight \(4, 16\) in the file, \(12, 16\) in the model")


def test_evaluation_refuses_weights_without_heads_unless_asked(official_mvit, caplog):
    model = make_detector()
    pyramid = make_detector().backbone.state_dict()
    for source in (official_mvit, pyramid):
        refuse(model, source, "no detection heads.*MODEL.REV.STRICT_WEIGHTS False", evaluation=True)
    with caplog.at_level(logging.WARNING, "rev_det"):
        report = load_pretrained(model, official_mvit, strict=False, evaluation=True)
    assert report.loaded == 151
    (record,) = caplog.records
    assert "which would be random" in record.getMessage()
