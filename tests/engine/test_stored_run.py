"""A run that an earlier version was stopped in goes on, and is evaluated, as that version would have done it.

Weights, AdamW's state and the sampler's position are in ``tests/data/stored_run``, of rev_det 0.1.0.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from rev_det.engine import main

STORED = Path(__file__).resolve().parents[1] / "data" / "stored_run"
EXPECTED = json.loads((STORED / "expected.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a copy, in which the config's relative paths hold."""
    folder = tmp_path / "run"
    shutil.copytree(STORED, folder)
    monkeypatch.chdir(folder)
    forget_the_data()  # other tests' have the same name
    yield folder
    forget_the_data()


def forget_the_data():
    if "tiny" in DatasetCatalog:
        DatasetCatalog.remove("tiny")
        MetadataCatalog.remove("tiny")


def test_it_is_evaluated_as_it_was(run):
    weights = "output/model_0000021.pth"
    assert main(["--config-file", "output/config.yaml", "--eval-only", "MODEL.WEIGHTS", weights]) == 0
    metrics = json.loads((run / "output/inference/tiny/results.json").read_text())["metrics"]
    found = {f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()}
    for name, value in EXPECTED["evaluated"].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_it_is_resumed_as_it_would_have_gone_on(run):
    assert main(["--config-file", "output/config.yaml", "--resume", "SOLVER.MAX_ITER", "30"]) == 0
    lines = [json.loads(line) for line in (run / "output/metrics.json").read_text().splitlines()]
    found = next(line for line in lines if line.get("iteration") == 29)
    for name, value in EXPECTED["resumed_to_iteration_30"].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    state = torch.load(run / "output/model_final.pth", weights_only=True)["model"]
    norm = torch.cat([value.double().flatten() for value in state.values()]).norm()
    assert float(norm) == pytest.approx(EXPECTED["norm_of_all_weights"], rel=1e-5)
