"""The generated set: reproducible, valid COCO, with everything in it that real data have."""

import json
import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import rev_det.data.shapes as shapes_module
from rev_det.data import generate_shapes
from rev_det.data.annotations import check_coco_json


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The default validation set."""
    return generate_shapes(str(tmp_path_factory.mktemp("shapes")), "val")


@pytest.fixture(scope="module")
def coco(shapes):
    return COCO(shapes[0])


def read_all(json_file, image_root):
    with open(json_file, "rb") as file:
        annotations = file.read()
    names = sorted(os.listdir(image_root))
    return annotations, np.stack([cv2.imread(os.path.join(image_root, name)) for name in names])


def test_same_arguments_give_the_same_set(tmp_path):
    first, second, other_seed, other_split = (
        read_all(*generate_shapes(str(tmp_path / folder), split, num_images=6, seed=seed))
        for folder, split, seed in (("a", "train", 3), ("b", "train", 3), ("c", "train", 4), ("d", "val", 3))
    )
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])
    for other in (other_seed, other_split):
        assert first[0] != other[0]
        assert not np.array_equal(first[1], other[1])


def test_set_is_valid_and_complete_coco(shapes, coco):
    summary = check_coco_json("shapes", *shapes)
    assert summary.classes == ("circle", "square", "triangle") and summary.category_ids == (1, 2, 3)
    assert summary.num_images == 80 and not summary.dropped
    assert summary.num_masks == summary.num_instances
    assert set(coco.dataset) == {"info", "licenses", "images", "annotations", "categories"}
    for section in ("images", "annotations", "categories"):
        assert [r["id"] for r in coco.dataset[section]] == list(range(1, len(coco.dataset[section]) + 1))
    for annotation in coco.dataset["annotations"]:
        assert {"area", "bbox", "segmentation", "iscrowd"} <= annotation.keys()


def test_every_kind_of_mask_class_and_size_occurs(coco):
    annotations = coco.dataset["annotations"]
    polygons = [a["segmentation"] for a in annotations if isinstance(a["segmentation"], list)]
    assert len(polygons) > 0.7 * len(annotations)
    assert any(len(parts) > 1 for parts in polygons)
    assert sum(isinstance(a["segmentation"], dict) for a in annotations) >= 5
    counts = np.bincount([a["category_id"] for a in annotations], minlength=4)[1:]
    assert counts.min() > 0.2 * len(annotations)
    areas = np.array([a["area"] for a in annotations])
    assert (areas < 32**2).sum() > 20 and (areas > 32**2).sum() > 20 and areas.max() > 6000


def test_masks_boxes_and_areas_agree(coco):
    for annotation in coco.dataset["annotations"]:
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, width, height = annotation["bbox"]
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # Polygons are true to half a pixel, which may cost one at a pointed corner.
        assert np.abs(found - [x, y, x + width, y + height]).max() <= 1
        assert int(mask.sum()) == pytest.approx(annotation["area"], rel=0.05)


def test_masks_hold_visible_pixels_only(coco):
    """No pixel belongs to two instances, beyond the rounding along polygons."""
    overlapping = total = 0
    for image_id in coco.imgs:
        masks = [coco.annToMask(a).astype(int) for a in coco.imgToAnns[image_id]]
        overlapping += (sum(masks) > 1).sum()
        total += (sum(masks) > 0).sum()
    assert overlapping < 0.005 * total


def test_masks_lie_on_the_shapes(shapes, coco):
    """Inside a mask the picture is brightly coloured, the background around it is not."""
    inside, outside = [], []
    for image_id, image in coco.imgs.items():
        pixels = cv2.imread(os.path.join(shapes[1], image["file_name"]))
        saturation = np.ptp(pixels.astype(int), axis=2)
        masks = sum(coco.annToMask(a).astype(np.uint8) for a in coco.imgToAnns[image_id]) > 0
        kernel = np.ones((3, 3), np.uint8)
        inside.append(np.median(saturation[cv2.erode(masks.astype(np.uint8), kernel) > 0]))
        outside.append(np.median(saturation[cv2.dilate(masks.astype(np.uint8), kernel) == 0]))
    assert min(inside) > 100 > 70 > max(outside)


def test_existing_set_is_kept_and_one_of_other_arguments_replaced(tmp_path):
    root = str(tmp_path)
    json_file, _ = generate_shapes(root, "train", num_images=2)
    before = os.stat(json_file).st_ino
    generate_shapes(root, "train", num_images=2)
    assert os.stat(json_file).st_ino == before
    json_file, image_root = generate_shapes(root, "train", num_images=3, size=64)
    assert len(os.listdir(image_root)) == 3
    with open(json_file, encoding="utf-8") as file:
        assert json.load(file)["images"][0]["width"] == 64


def test_folder_of_other_origin_is_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="rev_det did not generate it"):
        generate_shapes(str(tmp_path), "train", num_images=2)
    assert os.listdir(tmp_path / "train") == ["mine.txt"]


def test_failure_leaves_nothing_half_written_and_leftovers_do_not_matter(tmp_path, monkeypatch):
    (tmp_path / "train.partial" / "images").mkdir(parents=True)
    (tmp_path / "train.partial" / "images" / "stale.jpg").write_bytes(b"")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes_module, "_annotation", full_disk)
    with pytest.raises(ValueError, match=r"cannot write .*train: .*No space left.*DETECTRON2_DATASETS"):
        generate_shapes(str(tmp_path), "train", num_images=2)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    monkeypatch.undo()
    _, image_root = generate_shapes(str(tmp_path), "train", num_images=2)
    assert sorted(os.listdir(image_root)) == ["000001.jpg", "000002.jpg"]


@pytest.mark.parametrize("arguments", [{"num_images": 0}, {"size": 32}, {"seed": -1}])
def test_arguments_out_of_range(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be at least 1, 64 and 0"):
        generate_shapes(str(tmp_path), "train", **{"num_images": 1, **arguments})
    assert not os.listdir(tmp_path)


# Without the packages around shapes.py: importing them takes longer than drawing.
GENERATE = """
import importlib, json, os, sys, time, types
data = os.path.dirname(sys.argv[1])
for name, folder in (("rev_det", os.path.dirname(data)), ("rev_det.data", data)):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
shapes = importlib.import_module("rev_det.data.shapes")
root = sys.argv[2]
open(os.path.join(root, f"ready{os.getpid()}"), "w").close()
while not os.path.exists(os.path.join(root, "go")):
    time.sleep(0.001)
json_file, image_root = shapes.generate_shapes(root, "train", num_images=30)
with open(json_file) as file:
    assert len(json.load(file)["images"]) == len(os.listdir(image_root)) == 30
print(os.stat(json_file).st_ino)
"""


def test_concurrent_processes_share_one_complete_set(tmp_path):
    command = [sys.executable, "-c", GENERATE, shapes_module.__file__, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    inodes = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(inodes) == 1
    assert {name for name in os.listdir(tmp_path) if name.startswith("train")} == {"train", "train.lock"}
