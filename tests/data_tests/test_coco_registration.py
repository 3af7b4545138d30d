"""Datasets by name and path: the command-line form, Detectron2's catalogs, and agreement with training."""

import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from rev_det.data import parse_dataset_argument, register_coco_json
from rev_det.data.coco import registered_summary

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="needs the shared COCO images")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("of=a/train.json:a/images", ("of", "a/train.json", "a/images")),
        ("of=a:b/train.json:images", ("of", "a:b/train.json", "images")),
        ("of=a=b.json:images=1", ("of", "a=b.json", "images=1")),
        (" of = a.json : images ", ("of", "a.json", "images")),
    ],
)
def test_dataset_argument_is_split_at_first_equals_and_last_colon(text, parts):
    assert parse_dataset_argument(text) == parts


@pytest.mark.parametrize(
    "text", ["", "of", "of=a.json", "of=:images", "of=a.json:", "=a.json:images", "a.json:b"]
)
def test_malformed_dataset_argument_shows_the_form(text):
    with pytest.raises(ValueError, match="expected NAME=JSON:IMAGES"):
        parse_dataset_argument(text)


def test_registered_dataset_loads_with_contiguous_classes(content, write, images):
    json_file = write(content)
    register_coco_json("pets", json_file, images)
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert (metadata.json_file, metadata.image_root) == (json_file, images)
    assert metadata.evaluator_type == "coco"
    records = DatasetCatalog.get("pets")
    assert [record["image_id"] for record in records] == [10, 11]
    assert records[1]["file_name"] == os.path.join(images, "1.png")
    assert [a["category_id"] for record in records for a in record["annotations"]] == [0, 1, 0, 1]
    assert records[0]["annotations"][0] == {
        "iscrowd": 0,
        "bbox": [2, 2, 10, 10],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]],
    }


def test_registering_again_is_allowed_with_the_same_paths_only(content, write, images, tmp_path, monkeypatch):
    json_file = write(content)
    register_coco_json("pets", json_file, images)
    monkeypatch.chdir(tmp_path)
    register_coco_json("pets", "annotations.json", "images")
    with pytest.raises(ValueError, match=r"'pets' is already registered with .*other\.json"):
        register_coco_json("pets", write(content, "other.json"), images)


def test_names_of_detectron2_are_refused(content, write, images):
    with pytest.raises(ValueError, match="'coco_2017_val' is already registered by Detectron2"):
        register_coco_json("coco_2017_val", write(content), images)


@pytest.mark.parametrize("name", ["", "a/b", ".", ".."])
def test_names_that_are_no_file_names_are_refused(content, write, images, name):
    with pytest.raises(ValueError, match="must be a plain name"):
        register_coco_json(name, write(content), images)


def test_invalid_dataset_is_not_registered(content, write, images):
    content["annotations"][0]["category_id"] = 99
    with pytest.raises(ValueError, match="category_id"):
        register_coco_json("pets", write(content), images)
    assert "pets" not in DatasetCatalog and "pets" not in MetadataCatalog
    assert registered_summary("pets") is None


def test_training_sees_exactly_the_instances_that_were_counted(content, write, images, enlarge):
    content = enlarge(content, 400)
    annotations = content["annotations"]
    annotations[0]["segmentation"] = [[1, 1, 5, 5]]  # Detectron2 drops this one,
    annotations[1]["bbox"] = [5, 5, 0, 10]  # but reads this one,
    annotations[2]["segmentation"] = []  # and this one, which then fails in training
    annotations[3]["segmentation"].append([3, 3])
    register_coco_json("pets", write(content), images)
    loaded = [a for record in DatasetCatalog.get("pets") for a in record["annotations"]]
    assert registered_summary("pets").dropped == {1, 2, 3}
    assert len(loaded) == registered_summary("pets").num_instances == 397
    assert all(len(a["segmentation"]) == 1 and a["bbox"][2] > 0 for a in loaded)


@needs_shared
@pytest.mark.parametrize(
    ("folder", "file", "num_images", "num_instances", "num_classes"),
    [
        ("coco_overfit12", "instances_train_used", 12, 35, 20),
        ("coco_free_448", "instances_train", 91, 829, 80),
        ("coco_free_448", "instances_val", 64, 560, 80),
        ("coco_free_448", "instances_train_super12", 91, 829, 12),
        ("coco_free_448", "instances_val_person", 32, 150, 1),
    ],
)
def test_real_coco_loads_whole(folder, file, num_images, num_instances, num_classes):
    json_file = os.path.join(SHARED, folder, f"{file}.json")
    register_coco_json("real", json_file, os.path.join(SHARED, folder, "images"))
    summary = registered_summary("real")
    assert len(summary.classes) == num_classes and not summary.dropped and summary.num_rle == 0
    records = DatasetCatalog.get("real")
    loaded = [a for record in records for a in record["annotations"]]
    assert (len(records), len(loaded)) == (num_images, num_instances)
    assert {a["category_id"] for a in loaded} <= set(range(num_classes))
