"""A small generated dataset."""

from pathlib import Path

import pytest

from rev_det.data import generate_shapes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="session")
def nano_mvit() -> str:
    return str(CONFIGS / "Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml")


@pytest.fixture(scope="session", params=["mvit", "vit"])
def nano_config(request) -> str:
    """Both nano configs, one after the other."""
    return str(CONFIGS / f"Quickstart/mask_rcnn_rev_{request.param}_nano_fpn.yaml")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> str:
    """The value of --dataset for four 64 px images, as a set called "tiny"."""
    root = tmp_path_factory.mktemp("shapes")
    annotations, images = generate_shapes(str(root), "train", num_images=4, size=64)
    return f"tiny={annotations}:{images}"


@pytest.fixture
def tiny_run(tiny_dataset, tmp_path):
    """Arguments of a two-iteration run on the tiny set, by config; results go to tmp_path/output."""

    def arguments(config: str, *opts: str, options: tuple[str, ...] = ()) -> list[str]:
        settings = {
            "MODEL.DEVICE": "cpu",
            "DATASETS.TRAIN": "('tiny',)",
            "DATASETS.TEST": "('tiny',)",
            "INPUT.MIN_SIZE_TRAIN": "(64,)",
            "INPUT.MIN_SIZE_TEST": "64",
            "SOLVER.IMS_PER_BATCH": "2",
            "SOLVER.MAX_ITER": "2",
            "SOLVER.STEPS": "()",
            "SOLVER.WARMUP_ITERS": "0",
            "TEST.EVAL_PERIOD": "0",
            "OUTPUT_DIR": str(tmp_path / "output"),
        }
        settings.update(zip(opts[::2], opts[1::2], strict=True))
        words = [word for pair in settings.items() for word in pair]
        return ["--config-file", config, "--dataset", tiny_dataset, *options, *words]

    return arguments
