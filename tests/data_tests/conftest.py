"""A small valid COCO-format dataset to break in one place at a time, and clean catalogs around each test."""

import copy
import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from rev_det.data.check import check_data

NUM_IMAGES, HEIGHT, WIDTH = 2, 40, 60


@pytest.fixture(autouse=True)
def restored_catalogs():
    """Forget what a test registered."""
    datasets, metadata = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    yield
    for catalog, before in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
        for name in set(catalog.list()) - before:
            catalog.remove(name)


def box_annotation(annotation_id, image_id, category_id, x, y, side=10):
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, side, side],
        "area": side * side,
        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
        "iscrowd": 0,
    }


@pytest.fixture
def content():
    """Two images with two squares each; category ids neither contiguous nor in order."""
    return {
        "info": {},
        "images": [
            {"id": 10 + index, "file_name": f"{index}.png", "height": HEIGHT, "width": WIDTH}
            for index in range(NUM_IMAGES)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            box_annotation(1, 10, 3, 2, 2),
            box_annotation(2, 10, 7, 20, 20),
            box_annotation(3, 11, 3, 5, 25),
            box_annotation(4, 11, 7, 45, 4),
        ],
    }


@pytest.fixture
def images(tmp_path):
    """A folder with the images of ``content``."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    for index in range(NUM_IMAGES):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return str(folder)


@pytest.fixture
def write(tmp_path):
    """Write a dataset dictionary to a file and return its path."""

    def write_json(content, name="annotations.json"):
        path = tmp_path / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    return write_json


@pytest.fixture
def enlarge():
    """Add instances until there are ``count``: then one of a hundred may be degenerate."""

    def enlarged(content, count):
        content = copy.deepcopy(content)
        for key in range(len(content["annotations"]) + 1, count + 1):
            content["annotations"].append(box_annotation(key, 10 + key % NUM_IMAGES, 3, key % 30, key % 20))
        return content

    return enlarged


@pytest.fixture
def good(content, images):
    """Two images of different content, two instances each."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(os.path.join(images, "1.png"))
    return content


@pytest.fixture
def check(write, images):
    """What `data check` finds."""

    def run(content, name="pets", **options):
        return check_data(name, write(content, f"{name}.json"), images, **options)

    return run
