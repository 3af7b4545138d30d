"""Evaluation against the same instances as training, without late exceptions, and as pycocotools says."""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rev_det.data import RevCOCOEvaluator, register_coco_json

ROOT = Path(__file__).resolve().parents[2]


def feed(evaluator, content, results):
    """Give an evaluator results in COCO's format, as it keeps those of a model."""
    index_of = {key: index for index, key in enumerate(sorted(c["id"] for c in content["categories"]))}
    by_image = {image["id"]: [] for image in content["images"]}
    for result in results:
        by_image[result["image_id"]].append(result | {"category_id": index_of[result["category_id"]]})
    evaluator.reset()
    evaluator._predictions = [{"image_id": key, "instances": found} for key, found in by_image.items()]


def predict_perfectly(evaluator, content, skip=()):
    """Feed the ground truth, less the annotations ``skip``, as detections."""
    evaluator.reset()
    index_of = {3: 0, 7: 1}
    for image in content["images"]:
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        annotations = [a for a in annotations if a["id"] not in skip]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(annotations), image["height"], image["width"]), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances(
            (image["height"], image["width"]),
            pred_boxes=Boxes(boxes),
            scores=torch.ones(len(annotations)),
            pred_classes=torch.tensor([index_of[a["category_id"]] for a in annotations], dtype=torch.long),
            pred_masks=torch.from_numpy(masks),
        )
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])


def evaluate_perfect_predictions(evaluator, content, skip=()):
    """Feed the ground truth, less the annotations ``skip``, as detections; return AP by task."""
    predict_perfectly(evaluator, content, skip)
    return {task: result["AP"] for task, result in evaluator.evaluate().items()}


@pytest.fixture
def evaluator():
    def build(name, kind=RevCOCOEvaluator):
        return kind(name, tasks=("bbox", "segm"), distributed=False)

    return build


def test_sound_dataset_is_evaluated_as_by_detectron2(content, write, images, evaluator):
    register_coco_json("pets", write(content), images)
    skipped = {1}  # of two cats, one found: AP of cats is about a half
    ours = evaluate_perfect_predictions(evaluator("pets"), content, skipped)
    assert ours == evaluate_perfect_predictions(evaluator("pets", COCOEvaluator), content, skipped)
    assert 70 < ours["bbox"] < 80 and 70 < ours["segm"] < 80


@pytest.mark.parametrize(
    "change", [{"segmentation": [[1, 1]]}, {"segmentation": [[1, 1, 5, 5]]}, {"segmentation": []}]
)
def test_what_training_leaves_out_is_not_counted_as_missed(
    content, write, images, enlarge, evaluator, change
):
    content = enlarge(content, 100)
    sound = copy.deepcopy(content)
    content["annotations"][1].update(change)
    register_coco_json("pets", write(content), images)
    trained = sum(len(record["annotations"]) for record in DatasetCatalog.get("pets"))
    ours = evaluator("pets")
    assert len(ours._coco_api.anns) == trained == 99
    result = evaluate_perfect_predictions(ours, sound, skip={2})
    assert result["bbox"] == pytest.approx(100) and result["segm"] == pytest.approx(100)
    with pytest.raises(Exception, match="input type|incorrect type|out of range"):
        evaluate_perfect_predictions(evaluator("pets", COCOEvaluator), sound, skip={2})


def test_invalid_polygons_of_kept_instances_are_ignored(content, write, images, enlarge, evaluator):
    content = enlarge(content, 100)
    content["annotations"][1]["segmentation"].insert(0, [1, 1])
    register_coco_json("pets", write(content), images)
    result = evaluate_perfect_predictions(evaluator("pets"), content)
    assert result["bbox"] == pytest.approx(100) and result["segm"] == pytest.approx(100)


def test_missing_area_and_iscrowd_are_filled_in(content, write, images, evaluator):
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    del content["annotations"][0]["segmentation"]
    triangle = content["annotations"][1]
    triangle["segmentation"] = [[20, 20, 30, 20, 20, 30]]
    register_coco_json("pets", write(content), images)
    ours = evaluator("pets")
    assert [a["iscrowd"] for a in ours._coco_api.loadAnns([1, 2, 3, 4])] == [0] * 4
    areas = [a["area"] for a in ours._coco_api.loadAnns([1, 2, 3, 4])]
    assert areas[0] == areas[2] == areas[3] == 100
    assert 40 <= areas[1] <= 60  # the triangle's mask, not its box
    boxes_only = RevCOCOEvaluator("pets", tasks=("bbox",), distributed=False)
    assert evaluate_perfect_predictions(boxes_only, content)["bbox"] == pytest.approx(100)


def test_other_datasets_are_evaluated_from_their_file(content, write, images, evaluator):
    content["annotations"][0]["bbox"] = [5, 5, 0, 10]
    register_coco_instances("theirs", {}, write(content), images)
    DatasetCatalog.get("theirs")
    assert MetadataCatalog.get("theirs").thing_classes == ["cat", "dog"]
    assert len(evaluator("theirs")._coco_api.anns) == 4


@pytest.fixture(scope="session")
def benchmark():
    """The benchmark's script, whose drawn sets and detections serve here as well."""
    pytest.importorskip("faster_coco_eval")
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "coco_evaluation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_equal_metrics(name, content, results):
    """Evaluate with faster-coco-eval and with pycocotools: all metrics, those of each class included."""
    metrics = {}
    for fast in (True, False):
        evaluator = RevCOCOEvaluator(name, distributed=False, use_fast_impl=fast)
        feed(evaluator, content, results)
        assert (evaluator._implementation is COCOeval) is not fast
        metrics[fast] = evaluator.evaluate()
    for task in ("bbox", "segm"):
        assert metrics[True][task] == pytest.approx(metrics[False][task], abs=1e-6, rel=0, nan_ok=True)
        # Neither nothing found nor everything: numbers that an error would change.
        assert 2 < metrics[True][task]["AP"] < 98
    return metrics[True]


def test_fast_metrics_equal_pycocotools_on_drawn_detections(benchmark, write):
    rng = np.random.default_rng(1)
    content = benchmark.draw_dataset(60, rng)
    assert any(annotation["iscrowd"] for annotation in content["annotations"])
    register_coco_instances("drawn", {}, write(content), "")
    DatasetCatalog.get("drawn")
    metrics = require_equal_metrics("drawn", content, benchmark.draw_detections(content, rng))
    assert sum(key.startswith("AP-") for key in metrics["segm"]) == benchmark.NUM_CLASSES


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda key: 2**53 + key,
        lambda key: 2**64 + key,
        lambda key: -5 * key,
        lambda key: (key - 6) * 2**54,
    ],
)
def test_any_ids_give_the_metrics_of_small_ones(benchmark, write, tmp_path, change, fast):
    rng = np.random.default_rng(3)
    content = benchmark.draw_dataset(12, rng)
    results = benchmark.draw_detections(content, rng)
    # Of equal scores, those of images in front count first: a change that reverses images would change AP.
    for index, result in enumerate(results):
        result["score"] += 1e-6 * index
    metrics = []
    for name in ("small", "other"):
        register_coco_instances(name, {}, write(content, f"{name}.json"), "")
        DatasetCatalog.get(name)
        output = str(tmp_path / name)
        evaluator = RevCOCOEvaluator(name, distributed=False, use_fast_impl=fast, output_dir=output)
        metrics.append([])
        for images in ([image["id"] for image in content["images"][:6]], None):
            feed(evaluator, content, results)
            metrics[-1].append(evaluator.evaluate(images))
        # What is written has the ids of the file.
        written = json.loads((tmp_path / name / "coco_instances_results.json").read_text())
        assert {r["image_id"] for r in written} == {r["image_id"] for r in results}
        assert {r["category_id"] for r in written} <= {c["id"] for c in content["categories"]}
        for item in (*content["images"], *content["categories"], *content["annotations"], *results):
            item.update({key: change(item[key]) for key in ("id", "image_id", "category_id") if key in item})
    for small, other in zip(*metrics, strict=True):
        for task in ("bbox", "segm"):
            aps = [sorted((k, v) for k, v in m[task].items() if "AP-" not in k) for m in (small, other)]
            assert dict(aps[0]) == pytest.approx(dict(aps[1]), abs=1e-9, rel=0)
            assert 2 < small[task]["AP"] < 98
    # Of half of the images, and of all.
    assert metrics[0][0]["bbox"]["AP"] != metrics[0][1]["bbox"]["AP"]


@pytest.mark.parametrize("file", ["instances_val", "instances_val_person", "instances_val_super12"])
def test_fast_metrics_equal_pycocotools_on_real_images(benchmark, shared, file):
    folder = shared / "data" / "coco_free_448"
    if not folder.is_dir():
        pytest.skip("no coco_free_448")
    path = folder / f"{file}.json"
    content = json.loads(path.read_text())
    register_coco_json("real", str(path), str(folder / "images"))
    require_equal_metrics("real", content, benchmark.draw_detections(content, np.random.default_rng(2)))


@pytest.fixture
def named_in_the_log(content, write, images, caplog):
    """What the only line about it says computed the metrics of an evaluator with the given options."""
    register_coco_json("pets", write(content), images)

    def evaluate(**options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            evaluate_perfect_predictions(RevCOCOEvaluator("pets", distributed=False, **options), content)
        lines = [text for text in caplog.messages if text.startswith("COCO's metrics of 'pets' by ")]
        assert len(lines) == 1
        assert not any("not built" in text for text in caplog.messages)
        return lines[0].partition(" by ")[2]

    return evaluate


def test_the_fastest_implementation_there_is_computes_and_is_logged(named_in_the_log, monkeypatch, caplog):
    version = pytest.importorskip("faster_coco_eval").__version__
    # As where Detectron2's extension is not built.
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)
    assert named_in_the_log() == f"faster-coco-eval {version}"
    # pycocotools' table for boxes and for masks, among the lines that the run's log keeps.
    ours = [record.message for record in caplog.records if record.name.startswith("rev_det")]
    assert sum("Average Precision" in text for text in ours) == 12

    assert named_in_the_log(use_fast_impl=False) == "pycocotools"
    assert named_in_the_log(max_dets_per_image=300) == "pycocotools"

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faster_coco_eval", None)
        assert "pip install faster-coco-eval" in named_in_the_log()

    used = []

    class Built(COCOeval):
        def evaluate(self):
            used.append(self.params.iouType)
            super().evaluate()

    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", Built)
    assert named_in_the_log() == "Detectron2's extension"
    assert used == ["bbox", "segm"]


def test_detectron2_keeps_its_own_implementation(content, write, images, evaluator, monkeypatch):
    register_coco_json("pets", write(content), images)
    before = coco_evaluation.COCOeval_opt
    evaluate_perfect_predictions(evaluator("pets"), content)
    assert coco_evaluation.COCOeval_opt is before
    broken = evaluator("pets")
    monkeypatch.setattr(broken, "_implementation", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_perfect_predictions(broken, content)
    assert coco_evaluation.COCOeval_opt is before


def test_results_files_hold_metrics_classes_and_detections(content, write, images, tmp_path):
    content["annotations"].append(copy.deepcopy(content["annotations"][0]) | {"id": 5, "iscrowd": 1})
    content["categories"].append({"id": 9, "name": "zèbre"})
    register_coco_json("pets", write(content), images)
    evaluator = RevCOCOEvaluator("pets", distributed=False, output_dir=str(tmp_path / "pets"))
    predict_perfectly(evaluator, content, skip={1, 5})
    results = evaluator.evaluate()

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    text = (tmp_path / "pets/results.json").read_text(encoding="utf-8")
    saved = json.loads(text, parse_constant=refuse)
    assert saved["dataset"] == "pets" and saved["implementation"] == evaluator._implementation_name
    assert list(saved["per_class"]) == ["cat", "dog", "zèbre"]
    assert saved["per_class"]["zèbre"] == {"instances": 0, "bbox": None, "segm": None}
    assert saved["per_class"]["cat"]["instances"] == 2  # a crowd is not one
    for task in ("bbox", "segm"):
        assert saved["metrics"][task].keys() == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
        assert saved["metrics"][task]["AP"] == results[task]["AP"]
        assert saved["metrics"][task]["APl"] is None
        for name in ("cat", "dog"):
            assert saved["per_class"][name][task] == results[task][f"AP-{name}"]
    assert sorted(path.name for path in (tmp_path / "pets").iterdir()) == [
        "coco_instances_results.json",
        "instances_predictions.pth",
        "results.json",
    ]
    # The detections are what COCO's own tools read, and give the same AP there.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(write(content))
        found = truth.loadRes(str(tmp_path / "pets/coco_instances_results.json"))
        official = COCOeval(truth, found, "bbox")
        official.evaluate()
        official.accumulate()
        official.summarize()
    assert 100 * official.stats[0] == pytest.approx(saved["metrics"]["bbox"]["AP"])


def test_of_a_single_class_the_results_file_has_its_ap(content, write, images, tmp_path):
    content["categories"] = [{"id": 3, "name": "cat"}]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
    register_coco_json("cats", write(content), images)
    evaluator = RevCOCOEvaluator("cats", distributed=False, output_dir=str(tmp_path / "cats"))
    result = evaluate_perfect_predictions(evaluator, content, skip={1})
    saved = json.loads((tmp_path / "cats/results.json").read_text())
    assert saved["per_class"] == {"cat": {"instances": 2} | result}
    assert 0 < result["bbox"] < 100


def test_a_set_registered_with_other_classes_than_its_file_has_no_results_by_class(
    content, write, images, tmp_path
):
    register_coco_instances("theirs", {}, write(content), images)
    MetadataCatalog.get("theirs").set(thing_classes=["pet"], thing_dataset_id_to_contiguous_id={3: 0, 7: 1})
    evaluator = RevCOCOEvaluator("theirs", distributed=False, output_dir=str(tmp_path / "theirs"))
    result = evaluate_perfect_predictions(evaluator, content, skip={1})
    saved = json.loads((tmp_path / "theirs/results.json").read_text())
    assert saved["metrics"]["bbox"]["AP"] == result["bbox"] and saved["per_class"] == {}


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")
def test_without_any_detection_the_results_file_has_nulls(content, write, images, tmp_path):
    register_coco_json("pets", write(content), images)
    evaluator = RevCOCOEvaluator("pets", distributed=False, output_dir=str(tmp_path / "pets"))
    feed(evaluator, content, [])
    evaluator.evaluate()
    saved = json.loads((tmp_path / "pets/results.json").read_text())
    assert set(saved["metrics"]["bbox"].values()) == {None}
    assert saved["per_class"]["dog"] == {"instances": 2, "bbox": None}


def test_sets_without_annotations_are_predicted_on_and_not_evaluated(
    content, write, images, tmp_path, caplog
):
    info = {key: content[key] for key in ("images", "categories")}
    register_coco_instances("test_dev", {}, write(info), images)
    MetadataCatalog.get("test_dev").set(thing_dataset_id_to_contiguous_id={3: 0, 7: 1})
    evaluator = RevCOCOEvaluator("test_dev", distributed=False, output_dir=str(tmp_path / "out"))
    assert evaluate_perfect_predictions(evaluator, content) == {}
    assert len(json.loads((tmp_path / "out/coco_instances_results.json").read_text())) == 4
    assert not (tmp_path / "out/results.json").exists()
