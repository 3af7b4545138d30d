"""Evaluation leaves no trace in training; test-time augmentation is of the images themselves."""

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch import nn

from rev_det.data import annotations, generate_shapes
from rev_det.engine import Trainer, argument_parser, load_config, main
from rev_det.engine.evaluation import check_test_augmentation, evaluate_with_augmentation, evaluating

TTA = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "False")


@pytest.fixture
def tiny_config(tiny_run, nano_mvit):
    def build(*opts):
        # Untrained models would find a hundred instances in each image.
        args = argument_parser().parse_args(tiny_run(nano_mvit, "TEST.DETECTIONS_PER_IMAGE", "20", *opts))
        return load_config(args.config_file, args.opts, args.dataset)

    return build


def trained(cfg):
    """A finished run: its model, and for each step the losses."""
    seed_all_rng(5)
    trainer = Trainer(cfg)
    trainer.train()
    histories = trainer.storage.histories()
    losses = {name: history.values() for name, history in histories.items() if "loss" in name}
    return trainer, losses, len(histories["bbox/AP"].values()) if "bbox/AP" in histories else 0


def test_a_run_that_is_evaluated_on_the_way_trains_bit_for_bit_as_one_that_is_not(tiny_config, tmp_path):
    # Whatever evaluation could disturb: drop path and sampling draw random numbers, batch norm keeps
    # statistics, and parameters are frozen.
    settings = (
        *("SOLVER.MAX_ITER", "3", "MODEL.REV_MVIT.DROP_PATH_RATE", "0.3", "MODEL.FPN.NORM", "BN"),
        *("MODEL.REV.FREEZE_AT", "1", "OUTPUT_DIR"),
    )
    with_it, losses, evaluations = trained(
        tiny_config(*settings, str(tmp_path / "with"), "TEST.EVAL_PERIOD", "1")
    )
    assert evaluations == 3
    without, expected, evaluations = trained(
        tiny_config(*settings, str(tmp_path / "without"), "DATASETS.TEST", "()")
    )
    assert evaluations == 0
    assert losses == expected and len(expected["total_loss"]) == 3
    state = without.model.state_dict()
    assert any("running_mean" in name for name in state)
    for name, value in with_it.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    frozen = {name for name, parameter in with_it.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, parameter in without.model.named_parameters() if not parameter.requires_grad
    }
    assert frozen


@pytest.mark.parametrize("error", [None, ValueError])
def test_modes_and_random_numbers_are_restored_also_after_an_error(tiny_config, error):
    cfg = tiny_config("SOLVER.AMP.ENABLED", "True")
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with contextlib.suppress(ValueError), evaluating(cfg, model):
        model.eval()
        random.random(), np.random.rand(), torch.rand(1)
        outputs = model(torch.ones(4, 2))
        assert outputs.is_inference() and outputs.dtype == torch.bfloat16
        if error:
            raise error
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not torch.is_inference_mode_enabled()


def test_the_model_is_left_in_its_parts_modes_by_test_with_and_without_augmentation(tiny_config):
    cfg = tiny_config(*TTA)
    model = Trainer.build_model(cfg)
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    Trainer.test(cfg, model)
    assert [module.training for module in model.modules()] == modes
    evaluate_with_augmentation(Trainer, cfg, model)
    assert [module.training for module in model.modules()] == modes


def detections(folder):
    found = json.loads((folder / "tiny/coco_instances_results.json").read_text())
    return sorted(found, key=lambda item: (item["image_id"], -item["score"]))


def test_augmentation_by_the_image_itself_changes_nothing(tiny_config, tmp_path):
    torch.manual_seed(0)
    cfg = tiny_config(*TTA)
    model = Trainer.build_model(cfg)
    plain = Trainer.test(cfg, model)
    augmented = evaluate_with_augmentation(Trainer, cfg, model)
    assert set(augmented) == {"bbox_TTA", "segm_TTA"}
    for task in ("bbox", "segm"):
        assert augmented[f"{task}_TTA"] == pytest.approx(plain[task], abs=1e-3, nan_ok=True)
    expected, found = (detections(tmp_path / "output" / part) for part in ("inference", "TTA/inference"))
    assert len(found) == len(expected) >= 20
    for one, other in zip(expected, found, strict=True):
        assert one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    # The images are those of the files, whatever size is used without augmentation.
    cfg = tiny_config(*TTA, "INPUT.MIN_SIZE_TEST", "32")
    evaluate_with_augmentation(Trainer, cfg, model)
    assert detections(tmp_path / "output/TTA/inference") == found
    # Results of tests without augmentation are kept.
    assert detections(tmp_path / "output/inference") == expected


@pytest.mark.parametrize("amp", ["False", "True"])
def test_augmentation_runs_every_size_and_its_mirror_image(tiny_config, amp):
    sizes = ("TEST.AUG.MIN_SIZES", "(32, 96)", "TEST.AUG.FLIP", "True", "SOLVER.AMP.ENABLED", amp)
    cfg = tiny_config(*TTA, *sizes)
    model = Trainer.build_model(cfg)
    images, dtypes = [], set()
    preprocess = model.preprocess_image
    model.preprocess_image = lambda batch: images.extend(item["image"] for item in batch) or preprocess(batch)
    predictor = model.roi_heads.box_predictor.cls_score
    predictor.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    evaluate_with_augmentation(Trainer, cfg, model)
    # For each of the four images, boxes are found in all four versions, then masks for what was merged.
    assert [image.shape[-1] for image in images] == [32, 32, 96, 96] * 2 * 4
    for plain, mirrored in zip(images[::2], images[1::2], strict=True):
        assert torch.equal(plain.flip(-1), mirrored)
    assert dtypes == {torch.bfloat16 if amp == "True" else torch.float32}


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")
def test_augmentation_of_a_model_that_finds_nothing(tiny_config):
    cfg = tiny_config(*TTA, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    results = evaluate_with_augmentation(Trainer, cfg, Trainer.build_model(cfg))
    assert np.isnan(results["bbox_TTA"]["AP"])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), "MODEL.META_ARCHITECTURE is 'RetinaNet'"),
        (("MODEL.KEYPOINT_ON", "True"), "MODEL.KEYPOINT_ON is True"),
        (
            ("MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('detectron2://x.pkl',)"),
            "MODEL.LOAD_PROPOSALS is True",
        ),
    ],
)
def test_models_without_augmentation_are_refused_by_the_key(tiny_config, opts, message):
    cfg = tiny_config(*TTA, *opts)
    with pytest.raises(ValueError, match=f"{message}.*set TEST.AUG.ENABLED to False"):
        check_test_augmentation(cfg)
    check_test_augmentation(tiny_config(*TTA))


def test_metrics_and_results_files_have_the_ap_of_each_class(tiny_run, nano_mvit, tmp_path):
    assert main(tiny_run(nano_mvit, "SOLVER.MAX_ITER", "1", "TEST.DETECTIONS_PER_IMAGE", "20")) == 0
    last = json.loads((tmp_path / "output/metrics.json").read_text().splitlines()[-1])
    results = json.loads((tmp_path / "output/inference/tiny/results.json").read_text())
    assert len(results["per_class"]) > 1
    for name, row in results["per_class"].items():
        for task in ("bbox", "segm"):
            value = last[f"{task}/AP-{name}"]
            assert row[task] == (None if np.isnan(value) else value)
    assert results["metrics"]["bbox"]["AP"] == last["bbox/AP"]
    assert sum(row["instances"] for row in results["per_class"].values()) > 0


@pytest.fixture
def extreme(tmp_path):
    """A --dataset "extreme" of three images of shapes, a narrow one and one of too many pixels."""
    annotations, images = generate_shapes(str(tmp_path / "data"), "train", num_images=3, size=64)
    content = json.loads(Path(annotations).read_text())
    for key, size in ((100, (900, 2)), (101, (300, 200))):
        Image.new("RGB", size).save(f"{images}/{key}.png")
        content["images"].append({"id": key, "file_name": f"{key}.png", "width": size[0], "height": size[1]})
        box = {"bbox": [0, 0, 2, 2], "segmentation": [[0, 0, 2, 0, 2, 2]], "area": 2, "iscrowd": 0}
        content["annotations"].append(box | {"id": key, "image_id": key, "category_id": 1})
    Path(annotations).write_text(json.dumps(content))
    yield f"extreme={annotations}:{images}"
    DatasetCatalog.pop("extreme", None)
    MetadataCatalog.pop("extreme", None)


@pytest.mark.parametrize("augmentation", [(), TTA])
def test_extreme_images_are_left_out_of_an_evaluation_by_name(
    extreme, nano_mvit, tiny_run, tmp_path, capsys, monkeypatch, augmentation
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 200 - 1)
    monkeypatch.setattr(annotations, "_EXTREME_SIDE", 250)
    opts = ("INPUT.MAX_SIZE_TEST", "128", "TEST.DETECTIONS_PER_IMAGE", "20", *augmentation)
    opts += ("MODEL.REV.STRICT_WEIGHTS", "False", "DATASETS.TRAIN", "()", "DATASETS.TEST", "('extreme',)")
    words = tiny_run(nano_mvit, *opts, options=("--eval-only",))
    words[words.index("--dataset") + 1] = extreme
    assert main(words) == 1
    first, narrow, large = capsys.readouterr().err.splitlines()[-3:]
    assert first == "2 test images were left out, and count as without detections:"
    assert "100.png: it has 900 x 2 pixels; reduced to 128, nothing is left of its shorter side" in narrow
    assert "101.png: it has 300 x 200 pixels, more than 0 million pixels" in large
    results = json.loads((tmp_path / "output/inference/extreme/coco_instances_results.json").read_text())
    assert len({result["image_id"] for result in results}) == 3


def test_extreme_images_are_no_training_data(extreme, nano_mvit, tiny_run, tmp_path, capsys):
    names = ("DATASETS.TRAIN", "('extreme',)", "DATASETS.TEST", "()")
    words = tiny_run(nano_mvit, "INPUT.MAX_SIZE_TRAIN", "128", *names)
    words[words.index("--dataset") + 1] = extreme
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "dataset 'extreme': " in error and "100.png cannot be trained on: it has 900 x 2 pixels" in error
    assert not (tmp_path / "output").exists()
