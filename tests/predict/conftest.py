"""The folder of a training run: a detector of a few channels with random weights, and its data."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from nano_detector import CATEGORY_IDS, CLASSES, HEIGHT, WIDTH, nano_config

from rev_det.checkpoint import RevCheckpointer


@pytest.fixture(scope="session")
def dataset_json(tmp_path_factory) -> str:
    """Three classes, with ids that are not their indices, in another order; and two images."""
    path = tmp_path_factory.mktemp("data") / "annotations.json"
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASSES, strict=True)]
    images = [
        {"id": 41, "file_name": "0.png", "height": HEIGHT, "width": WIDTH},
        {"id": 40, "file_name": "sub/1.png", "height": HEIGHT, "width": WIDTH},
    ]
    path.write_text(json.dumps({"categories": categories[::-1], "images": images, "annotations": []}))
    return str(path)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Write a run's folder for a config."""

    def make(cfg) -> Path:
        folder = tmp_path_factory.mktemp("run")
        torch.manual_seed(0)
        RevCheckpointer(build_model(cfg), str(folder)).save("model_final")
        (folder / "config.yaml").write_text(cfg.dump())
        return folder

    return make


@pytest.fixture(scope="session")
def nano_run(make_run, dataset_json) -> Path:
    return make_run(nano_config(dataset_json))
