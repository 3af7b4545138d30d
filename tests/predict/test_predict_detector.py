"""A detector from a run's folder, or config and weights: what it is made of, and that it predicts."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from nano_detector import CATEGORY_IDS, CLASSES, nano_config

from rev_det import model_zoo
from rev_det.engine import Precision
from rev_det.predict import Classes, Detector, Origin, classes_from_json, load_detector
from rev_det.predict.classes import classes_of_config

COCO_CONFIG = model_zoo.get_config_file("mask_rcnn_rev_mvit_b_fpn_3x")


def image(seed, height=48, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def load(run, **options):
    return load_detector(Origin.find(run=str(run)), device="cpu", **{"threshold": 0.0, **options})


# ---- where it is from ----


def test_a_runs_folder_stands_for_its_config_and_last_checkpoint(nano_run, tmp_path):
    origin = Origin.find(run=str(nano_run))
    assert origin == Origin(str(nano_run / "config.yaml"), str(nano_run / "model_final.pth"))
    (tmp_path / "config.yaml").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    assert Origin.find(run=str(tmp_path)).weights == str(tmp_path / "model_0000099.pth")
    assert Origin.find(run=str(tmp_path), weights="best.pth").weights == "best.pth"
    (tmp_path / "last_checkpoint").write_bytes(b"../\x80")
    with pytest.raises(ValueError, match="last_checkpoint does not hold the name of a checkpoint"):
        Origin.find(run=str(tmp_path))


def test_the_config_beside_weights_is_theirs(nano_run):
    weights = str(nano_run / "model_final.pth")
    assert Origin.find(weights=weights) == Origin.find(run=str(nano_run))


def test_a_config_is_a_file_or_a_name_of_the_zoo(nano_run):
    config = str(nano_run / "config.yaml")
    assert Origin.find(config=config, weights="w.pth") == Origin(config, "w.pth")
    zoo = model_zoo.get_config_file("mask_rcnn_rev_mvit_b_fpn_3x")
    assert Origin.find(config="mask_rcnn_rev_mvit_b_fpn_3x", weights="w.pth") == Origin(zoo, "w.pth")


def test_weights_may_be_named_in_the_config(tmp_path):
    (tmp_path / "own.yaml").write_text("MODEL:\n  WEIGHTS: mine.pth\n")
    assert Origin.find(config=str(tmp_path / "own.yaml")).weights == "mine.pth"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "name a detector: --run"),
        ({"run": "{}", "config": "x"}, "either --run or --config"),
        ({"run": "{}/nowhere"}, "nowhere is not a folder"),
        ({"run": "{}"}, "has no config.yaml"),
        ({"weights": "{}/model_final.pth"}, "model_final.pth does not exist"),
        ({"weights": "{}/there.pth"}, "no config.yaml beside .*--config-file"),
        ({"config": "{}/empty.yaml"}, "--weights is missing: MODEL.WEIGHTS of .*empty.yaml are none"),
        ({"config": COCO_CONFIG}, "--weights is missing: MODEL.WEIGHTS of .* are a backbone's alone"),
        ({"config": "mask_rcnn_rev_vit_b_fpn_3x"}, "--weights is missing: no trained weights are published"),
        (
            {"config": "rcnn_rev_mvit_b_fpn_3x", "weights": "w"},
            "--config-file rcnn_rev_mvit_b_fpn_3x does not exist, and there is no model .* did you mean",
        ),
    ],
)
def test_what_is_too_little_or_too_much_is_named(tmp_path, arguments, message):
    (tmp_path / "empty.yaml").write_text("VERSION: 2\n")
    (tmp_path / "there.pth").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Origin.find(**{key: value.format(tmp_path) for key, value in arguments.items()})


# ---- classes ----


def test_classes_are_in_the_order_of_their_ids(dataset_json):
    assert classes_from_json(dataset_json) == Classes(CLASSES, CATEGORY_IDS)


@pytest.mark.parametrize("content", ["[]", "{}", '{"categories": [{"id": 1}]}', "no json"])
def test_a_file_without_categories_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json is not (in COCO's format|valid JSON)"):
        classes_from_json(str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match="b.json does not exist"):
        classes_from_json(str(tmp_path / "b.json"))


def test_an_empty_list_of_categories_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"categories": []}')
    with pytest.raises(ValueError, match="a.json has no categories"):
        classes_from_json(str(tmp_path / "a.json"))


def test_a_run_knows_the_classes_it_was_trained_on(nano_run):
    assert load(nano_run).classes == Classes(CLASSES, CATEGORY_IDS)


def test_coco_and_the_generated_shapes_are_known_without_their_files():
    cfg = model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x")
    coco = classes_of_config(cfg)
    assert coco.names == tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    assert (coco.names[0], coco.ids[0], coco.names[79], coco.ids[79]) == ("person", 1, "toothbrush", 90)
    shapes = classes_of_config(model_zoo.get_config("mask_rcnn_rev_mvit_nano_fpn"))
    assert shapes == Classes(("circle", "square", "triangle"), (1, 2, 3))


def test_classes_of_absent_data_are_numbered_with_a_warning(make_run, caplog):
    run = make_run(nano_config("nowhere.json"))
    with caplog.at_level(logging.WARNING, "rev_det"):
        classes = load(run).classes
    assert classes == Classes(("class 1", "class 2", "class 3"), (1, 2, 3))
    assert (
        "names of the detector's 3 classes are not known" in caplog.text and "--dataset-json" in caplog.text
    )


def test_paths_of_a_run_are_of_the_folder_it_was_started_in(
    nano_run, dataset_json, tmp_path, monkeypatch, caplog
):
    cfg = nano_config("data/own.json")
    cfg.OUTPUT_DIR = "./output/pets"
    project, elsewhere, moved = tmp_path / "project", tmp_path / "elsewhere", tmp_path / "elsewhere" / "pets"
    shutil.copytree(nano_run, project / "output" / "pets")
    (project / "output" / "pets" / "config.yaml").write_text(cfg.dump())
    shutil.copytree(project / "output" / "pets", moved)
    (project / "data").mkdir()
    shutil.copy(dataset_json, project / "data" / "own.json")
    monkeypatch.chdir(elsewhere)
    assert load("../project/output/pets").classes.names == CLASSES
    # What another project has there may be something else.
    (elsewhere / "data").mkdir()
    categories = [{"id": index, "name": f"other {index}"} for index in range(3)]
    (elsewhere / "data" / "own.json").write_text(json.dumps({"categories": categories}))
    assert load("../project/output/pets").classes.names == CLASSES
    (elsewhere / "data" / "own.json").unlink()
    with caplog.at_level(logging.WARNING, "rev_det"):
        load(moved)
    assert f"there is no {elsewhere}/data/own.json. They are numbered; --dataset-json" in caplog.text


def test_data_of_another_number_of_classes_are_not_said_to_be_absent(make_run, tmp_path, caplog):
    (tmp_path / "two.json").write_text('{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}')
    with caplog.at_level(logging.WARNING, "rev_det"):
        load(make_run(nano_config(str(tmp_path / "two.json"))))
    assert "detector's 3 classes are not known: the data of its config have 2" in caplog.text


def test_classes_of_absent_data_are_those_that_the_checkpoint_keeps(make_run, dataset_json, caplog):
    run = make_run(nano_config("/nowhere/own.json"))
    origin = {"classes": list(CLASSES), "versions": {}, "config": {}}
    kept = torch.load(run / "model_final.pth", weights_only=True)
    torch.save(kept | {"made_by": origin}, run / "model_final.pth")
    with caplog.at_level(logging.WARNING, "rev_det"):
        assert load(run).classes == Classes(CLASSES, (1, 2, 3))
    assert "not known" not in caplog.text
    assert load(run, dataset_json=dataset_json).classes.ids == CATEGORY_IDS
    torch.save(kept | {"made_by": origin | {"classes": list(CLASSES[::-1])}}, run / "model_final.pth")
    with pytest.raises(ValueError, match="trained on other classes than the data have .0: cat, now ant"):
        load(run, dataset_json=dataset_json)
    loose = ["MODEL.REV.STRICT_CLASSES", "False"]
    assert load(run, dataset_json=dataset_json, opts=loose).classes.names == CLASSES


def test_a_given_file_names_them(make_run, dataset_json):
    assert load(make_run(nano_config()), dataset_json=dataset_json).classes.names == CLASSES


def test_a_file_with_another_number_of_classes_is_refused(make_run, tmp_path):
    (tmp_path / "two.json").write_text('{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}')
    with pytest.raises(ValueError, match="two.json has 2 classes, but the detector has 3 .*ROI_HEADS"):
        load(make_run(nano_config()), dataset_json=str(tmp_path / "two.json"))


def test_the_default_of_80_classes_gives_way_to_those_of_the_data(nano_run, dataset_json, tmp_path):
    shutil.copy(nano_run / "model_final.pth", tmp_path)
    cfg = nano_config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load(tmp_path, dataset_json=dataset_json).classes.names == CLASSES
    with pytest.raises(ValueError, match="3 in the file, 80"):
        load(tmp_path)


def test_an_unknown_class_comes_with_close_ones(nano_run):
    with pytest.raises(ValueError, match="--classes: the detector has no class 'bees'; did you mean bee?"):
        load(nano_run, only=["ant", "bees"])
    with pytest.raises(ValueError, match="no class 'xyz'; the classes are ant, bee, cat"):
        load(nano_run, only=["xyz"])


# ---- predicting ----


def test_predictions_are_those_of_detectron2s_own_predictor(nano_run):
    cfg = nano_config()
    cfg.MODEL.WEIGHTS = str(nano_run / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    picture = image(1, 70, 50)
    (ours,) = load(nano_run)([picture])
    theirs = DefaultPredictor(cfg)(picture[:, :, ::-1])["instances"]  # takes BGR
    assert len(ours) == len(theirs) > 0 and ours.image_size == (70, 50)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)


def test_a_config_in_bgr_gets_bgr(make_run):
    cfg = nano_config()
    cfg.INPUT.FORMAT = "BGR"
    cfg.MODEL.PIXEL_MEAN = [10.0, 80.0, 200.0]
    run = make_run(cfg)
    picture = image(2)
    (ours,) = load(run)([picture])
    cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    theirs = DefaultPredictor(cfg)(picture[:, :, ::-1])["instances"]
    assert torch.equal(ours.scores, theirs.scores)


def test_other_image_formats_are_refused(nano_run):
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'L'; allowed are 'RGB' and 'BGR'"):
        load(nano_run, opts=["INPUT.FORMAT", "L"])


def test_a_batch_of_several_sizes_gives_what_single_images_give(nano_run):
    detector = load(nano_run, threshold=0.2)
    pictures = [image(seed, *size) for seed, size in enumerate([(48, 64), (70, 50), (40, 90)])]
    together = detector(pictures)
    for picture, instances in zip(pictures, together, strict=True):
        assert instances.image_size == picture.shape[:2]
        (alone,) = detector([picture])
        # Padding to the largest image reaches the features near the border: scores may differ a little.
        assert len(alone) > 0 and abs(len(alone) - len(instances)) <= 0.1 * len(alone) + 1


def test_only_what_is_certain_enough_and_of_the_classes_asked_for(nano_run):
    (everything,) = load(nano_run)([image(3)])
    middle = everything.scores.median().item() + 1e-6
    (certain,) = load(nano_run, threshold=middle)([image(3)])
    assert torch.equal(certain.scores, everything.scores[everything.scores >= middle])
    assert 0 < len(certain) < len(everything)
    (bees,) = load(nano_run, only=["bee"])([image(3)])
    assert torch.equal(bees.scores, everything.scores[everything.pred_classes == 1])
    assert 0 < len(bees) < len(everything)


def test_a_threshold_below_the_configs_holds(make_run):
    cfg = nano_config()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.99
    assert len(load(make_run(cfg))([image(3)])[0]) > 0


@pytest.mark.parametrize("amp, dtype", [(None, None), (False, None), (True, torch.bfloat16)])
def test_mixed_precision_is_only_on_request_on_the_cpu(nano_run, amp, dtype):
    detector = load(nano_run, amp=amp, opts=["SOLVER.AMP.ENABLED", "True"])
    assert detector.precision.dtype == dtype
    assert len(detector([image(0)])[0]) > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 1.5}, "--threshold must be from 0 to 1, got 1.5"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed on this machine are .*cpu"),
        ({"device": "cuda:99"}, "--device is 'cuda:99'; allowed on this machine are .*cpu"),
        ({"opts": ["MODEL.NOTHING", "1"]}, "no config key MODEL.NOTHING"),
        ({"opts": ["MODEL.ROI_HEADS.NAME", "NoHeads"]}, "cannot be built: .*NoHeads"),
        (
            {"opts": ["MODEL.PIXEL_STD", "[0.0, 0.0, 0.0]"]},
            r"MODEL.PIXEL_STD must be .* got \[0.0, ",
        ),
    ],
)
def test_arguments_that_do_not_go(nano_run, options, message):
    with pytest.raises(ValueError, match=message):
        load_detector(Origin.find(run=str(nano_run)), **{"device": "cpu", **options})


def test_weights_of_the_backbone_alone_are_refused(nano_run, tmp_path):
    state = torch.load(nano_run / "model_final.pth", weights_only=True)["model"]
    prefix = "backbone.bottom_up."
    torch.save({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="no detection heads"):
        load_detector(Origin(str(nano_run / "config.yaml"), str(tmp_path / "b.pth")), device="cpu")


@pytest.mark.parametrize("trained_with_masks", [False, True])
def test_weights_with_and_without_masks_are_told_apart(make_run, nano_run, trained_with_masks):
    cfg = nano_config()
    cfg.MODEL.MASK_ON = trained_with_masks
    weights = str(make_run(cfg) / "model_final.pth")
    options = ("MODEL.MASK_ON", str(not trained_with_masks))
    with pytest.raises(ValueError) as error:
        load_detector(Origin(str(nano_run / "config.yaml"), weights), device="cpu", opts=options)
    assert f"set MODEL.MASK_ON {trained_with_masks}" in str(error.value)
    assert "config.yaml of its run" in str(error.value) and "REV_MVIT" not in str(error.value)


def test_retinanet_predicts_boxes_of_the_datas_classes(make_run, dataset_json):
    cfg = nano_config(dataset_json)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_rev_mvit_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["scale3", "scale4", "scale5"]
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.RETINANET.NUM_CLASSES = len(CLASSES)
    run = make_run(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    (run / "config.yaml").write_text(cfg.dump())
    detector = load(run)
    assert detector.classes.names == CLASSES
    (found,) = detector([image(0)])
    assert len(found) > 0 and not found.has("pred_masks")
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


class Proposals(torch.nn.Module):
    def forward(self, inputs):
        return [{"proposals": None} for _ in inputs]


def test_a_model_without_instances_is_named():
    cfg = nano_config()
    detector = Detector(cfg, Proposals(), Classes.numbered(3), Precision.from_config(cfg))
    with pytest.raises(ValueError, match="a Proposals returns proposals, and no instances"):
        detector([image(0)])


class Two(torch.nn.Module):
    """Two instances of scores 0.8 and 0.2, whatever its config says."""

    def forward(self, inputs):
        instances = Instances((48, 64))
        instances.scores, instances.pred_classes = torch.tensor([0.8, 0.2]), torch.tensor([0, 1])
        return [{"instances": instances} for _ in inputs]


def test_a_model_with_a_threshold_of_its_own_is_held_to_ours_too():
    cfg = nano_config()
    detector = Detector(cfg, Two(), Classes.numbered(3), Precision.from_config(cfg), threshold=0.5)
    assert detector([image(0)])[0].scores.tolist() == pytest.approx([0.8])
