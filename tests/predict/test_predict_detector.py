"""A detector from a run's folder, or config and weights: what it is made of, and that it predicts."""

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
from rev_det.predict import Detector, Origin, load_detector
from rev_det.predict.classes import classes_of_config, classes_of_json, named_classes

COCO_CONFIG = model_zoo.get_config_file("mask_rcnn_rev_mvit_b_fpn_3x")


def image(seed, height=48, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def load(run, **options):
    return load_detector(Origin.find(run=str(run)), device="cpu", **{"threshold": 0.0, **options})


def named(classes):
    """Names and ids in the order of the model's class indices."""
    indices = classes.thing_dataset_id_to_contiguous_id
    return tuple(classes.thing_classes), tuple(sorted(indices, key=indices.get))


# ---- where it is from ----


def test_a_runs_folder_stands_for_its_config_and_last_checkpoint(nano_run, tmp_path):
    config, weights = str(nano_run / "config.yaml"), str(nano_run / "model_final.pth")
    assert Origin.find(run=str(nano_run)) == Origin.find(weights=weights) == Origin(config, weights)
    (tmp_path / "config.yaml").touch()
    assert Origin.find(run=str(tmp_path)).weights == str(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    assert Origin.find(run=str(tmp_path)).weights == str(tmp_path / "model_0000099.pth")
    assert Origin.find(run=str(tmp_path), weights="best.pth").weights == "best.pth"
    (tmp_path / "last_checkpoint").write_bytes(b"../\x80")
    with pytest.raises(ValueError, match="last_checkpoint does not hold the name of a checkpoint"):
        Origin.find(run=str(tmp_path))


def test_a_config_is_a_file_or_a_name_of_the_zoo_and_may_name_weights(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("MODEL:\n  WEIGHTS: mine.pth\n")
    assert Origin.find(config=str(own)) == Origin(str(own), "mine.pth")
    assert Origin.find(config=str(own), weights="w.pth") == Origin(str(own), "w.pth")
    assert Origin.find(config="mask_rcnn_rev_mvit_b_fpn_3x", weights="w") == Origin(COCO_CONFIG, "w")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "name a detector: --run"),
        ({"run": "{}", "config": "x"}, "either --run or --config"),
        ({"run": "{}/nowhere"}, "no .*/nowhere/config.yaml, which a training run writes; .*--config-file"),
        ({"weights": "{}/model_final.pth"}, "--weights .*/model_final.pth does not exist"),
        ({"weights": "{}/there.pth"}, "no .*/config.yaml, which a training run writes; .*--config-file"),
        ({"config": "{}/empty.yaml"}, "--weights is missing: MODEL.WEIGHTS of .*empty.yaml"),
        ({"config": "mask_rcnn_rev_mvit_b_fpn_3x"}, "--weights is missing: MODEL.WEIGHTS of .*_3x.yaml"),
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
    assert named(classes_of_json(dataset_json)) == (CLASSES, CATEGORY_IDS)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "has no categories"),
        ("[]", "is not in COCO's format: each of its categories needs"),
        ('{"categories": [{"id": 1}]}', "each of its categories needs"),
        ('{"categories": [{"id": true, "name": "a"}]}', "a whole number of its own as id"),
        ('{"categories": [{"id": 1, "name": ["a"]}]}', "a text as name"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "a whole number of its own"),
        ("no json", "is not valid JSON"),
        ('{"categories": ' + "[" * 100_000, "is not JSON that can be read"),
    ],
)
def test_a_file_whose_categories_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json .*{message}"):
        classes_of_json(str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match="b.json does not exist"):
        classes_of_json(str(tmp_path / "b.json"))


def test_a_byte_order_mark_is_passed_over(tmp_path, dataset_json):
    with open(dataset_json, "rb") as file:
        (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + file.read())
    assert named(classes_of_json(str(tmp_path / "a.json"))) == (CLASSES, CATEGORY_IDS)


def test_a_run_knows_the_classes_it_was_trained_on(nano_run):
    assert named(load(nano_run).classes) == (CLASSES, CATEGORY_IDS)


def test_coco_and_the_generated_shapes_are_known_without_their_files():
    coco = classes_of_config(model_zoo.get_config("mask_rcnn_rev_mvit_b_fpn_3x"))
    names, ids = named(coco)
    assert names == tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    assert (names[0], ids[0], names[79], ids[79]) == ("person", 1, "toothbrush", 90)
    shapes = classes_of_config(model_zoo.get_config("mask_rcnn_rev_mvit_nano_fpn"))
    assert named(shapes) == (("circle", "square", "triangle"), (1, 2, 3))


@pytest.mark.parametrize("content", [None, '{"categories": [{"id": 1, "name": "a"}]}'])
def test_without_data_of_its_classes_they_are_numbered_with_a_warning(make_run, tmp_path, caplog, content):
    if content:
        (tmp_path / "own.json").write_text(content)
    run = make_run(nano_config(str(tmp_path / "own.json")))
    with caplog.at_level(logging.WARNING, "rev_det"):
        assert named(load(run).classes) == (("class 1", "class 2", "class 3"), (1, 2, 3))
    assert "not at hand, or have not its 3 classes" in caplog.text and "--dataset-json FILE" in caplog.text


def test_classes_of_absent_data_are_those_that_the_checkpoint_keeps(make_run, dataset_json, caplog):
    run = make_run(nano_config("/nowhere/own.json"))
    origin = {"classes": list(CLASSES), "versions": {}, "config": {}}
    kept = torch.load(run / "model_final.pth", weights_only=True)
    torch.save(kept | {"made_by": origin}, run / "model_final.pth")
    with caplog.at_level(logging.WARNING, "rev_det"):
        assert named(load(run).classes) == (CLASSES, (1, 2, 3))
    assert "names are those that the checkpoint keeps" in caplog.text
    assert named(load(run, dataset_json=dataset_json).classes) == (CLASSES, CATEGORY_IDS)
    torch.save(kept | {"made_by": origin | {"classes": list(CLASSES[::-1])}}, run / "model_final.pth")
    with pytest.raises(ValueError, match="trained on other classes than the data have .0: cat, now ant"):
        load(run, dataset_json=dataset_json)
    loose = ["MODEL.REV.STRICT_CLASSES", "False"]
    assert named(load(run, dataset_json=dataset_json, opts=loose).classes)[0] == CLASSES


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
    assert named(load(tmp_path, dataset_json=dataset_json).classes)[0] == CLASSES
    with pytest.raises(ValueError, match="3 in the file, 80"):
        load(tmp_path)


def test_an_unknown_class_comes_with_close_ones(nano_run):
    with pytest.raises(ValueError, match="--classes: the detector has no class 'bees'; did you mean bee?"):
        load(nano_run, only=["ant", "bees"])
    with pytest.raises(ValueError, match="no class 'xyz'; the classes are ant, bee, cat"):
        load(nano_run, only=["xyz"])


# ---- predicting ----


@pytest.mark.parametrize("colours", ["RGB", "BGR"])
def test_predictions_are_those_of_detectron2s_own_predictor(make_run, colours):
    cfg = nano_config()
    cfg.INPUT.FORMAT = colours
    cfg.MODEL.PIXEL_MEAN = [10.0, 80.0, 200.0]
    run = make_run(cfg)
    cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    picture = image(1, 70, 50)
    (ours,) = load(run)([picture])
    theirs = DefaultPredictor(cfg)(picture[:, :, ::-1])["instances"]  # takes BGR
    assert len(ours) == len(theirs) > 0 and ours.image_size == (70, 50)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)


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
    (everything,) = load(nano_run, opts=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99"])([image(3)])
    middle = everything.scores.median().item() + 1e-6
    (certain,) = load(nano_run, threshold=middle)([image(3)])
    assert torch.equal(certain.scores, everything.scores[everything.scores >= middle])
    assert 0 < len(certain) < len(everything)
    (bees,) = load(nano_run, only=["bee"])([image(3)])
    assert torch.equal(bees.scores, everything.scores[everything.pred_classes == 1])
    assert 0 < len(bees) < len(everything)


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
        ({"opts": ["INPUT.FORMAT", "L"]}, "INPUT.FORMAT is 'L'; allowed are 'RGB', 'BGR'"),
        ({"opts": ["INPUT.MIN_SIZE_TEST", "-5"]}, "INPUT.MIN_SIZE_TEST must be .* at least 0 .*, got -5"),
        ({"opts": ["INPUT.MAX_SIZE_TEST", "0"]}, "INPUT.MAX_SIZE_TEST must be .* at least 1 .*, got 0"),
        (
            {"opts": ["INPUT.MIN_SIZE_TEST", "100000", "INPUT.MAX_SIZE_TEST", "100000"]},
            "INPUT.M.._SIZE_TEST must be .*, got 100000",
        ),
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
    assert named(detector.classes)[0] == CLASSES
    (found,) = detector([image(0)])
    assert len(found) > 0 and not found.has("pred_masks")
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


class Fixed(torch.nn.Module):
    """Returns the same for all images, whatever its config says."""

    def __init__(self, **result):
        super().__init__()
        self.result = result

    def forward(self, inputs):
        return [self.result for _ in inputs]


def fixed(**result):
    cfg = nano_config()
    return Detector(cfg, Fixed(**result), named_classes(CLASSES), Precision.from_config(cfg), threshold=0.5)


def test_a_model_without_instances_is_named():
    with pytest.raises(ValueError, match="a Fixed returns proposals, and no instances"):
        fixed(proposals=None)([image(0)])


def test_a_model_with_a_threshold_of_its_own_is_held_to_ours_too():
    scores, classes = torch.tensor([0.8, 0.2]), torch.tensor([0, 1])
    detector = fixed(instances=Instances((48, 64), scores=scores, pred_classes=classes))
    assert detector([image(0)])[0].scores.tolist() == pytest.approx([0.8])
