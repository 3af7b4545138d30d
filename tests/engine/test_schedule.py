"""Schedules rescaled to another batch size."""

import logging

import pytest
from detectron2.config import get_cfg

from rev_det import add_rev_det_config
from rev_det.engine import load_config
from rev_det.engine.schedule import rescale_schedule, warn_of_long_warmup


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 64, 16
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1.6e-4, 1000, (750, 901)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 50, 100, 200
    return cfg


@pytest.mark.parametrize("scaling, rate", [("sqrt", 0.8e-4), ("linear", 0.4e-4), ("none", 1.6e-4)])
def test_a_quarter_of_the_batch_takes_four_times_the_iterations(cfg, scaling, rate):
    cfg.SOLVER.LR_SCALING = scaling
    rescale_schedule(cfg)
    solver = cfg.SOLVER
    assert solver.BASE_LR == pytest.approx(rate)
    assert (solver.MAX_ITER, tuple(solver.STEPS), solver.WARMUP_ITERS) == (4000, (3000, 3604), 200)
    assert cfg.TEST.EVAL_PERIOD == 800
    # What an interruption may cost is a matter of time.
    assert solver.CHECKPOINT_PERIOD == 100


def test_a_rescaled_config_is_not_rescaled_again(cfg):
    rescale_schedule(cfg)
    assert rescale_schedule(cfg) == {}
    assert cfg.SOLVER.MAX_ITER == 4000


def test_every_change_is_told_and_keys_of_the_command_line_stay(cfg, caplog):
    with caplog.at_level(logging.INFO, "rev_det"):
        changes = rescale_schedule(cfg, fixed=["SOLVER.BASE_LR", "SOLVER.STEPS"])
    assert cfg.SOLVER.BASE_LR == 1.6e-4 and tuple(cfg.SOLVER.STEPS) == (750, 901)
    assert changes["SOLVER.MAX_ITER"] == (1000, 4000)
    assert set(changes) == {"SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD"}
    assert all(f"{key} {old} -> {new}" in caplog.text for key, (old, new) in changes.items())


def test_without_a_reference_and_at_the_reference_nothing_changes(cfg):
    before = cfg.SOLVER.MAX_ITER
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    assert rescale_schedule(cfg) == {}
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
    assert rescale_schedule(cfg) == {}
    assert cfg.SOLVER.MAX_ITER == before


def test_never_stays_never_and_short_schedules_keep_an_iteration(cfg):
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.WARMUP_ITERS = 6400, 3
    before = cfg.clone()
    # For Detectron2, whatever is below 1.
    for never in (0, -1):
        cfg = before.clone()
        cfg.TEST.EVAL_PERIOD = never
        rescale_schedule(cfg)
        assert (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.WARMUP_ITERS) == (never, 1)


def test_the_rate_at_the_end_follows_the_rate_at_the_beginning(cfg):
    cfg.SOLVER.BASE_LR_END = 1.6e-5
    rescale_schedule(cfg)
    assert cfg.SOLVER.BASE_LR_END / cfg.SOLVER.BASE_LR == pytest.approx(0.1)


def test_a_config_that_a_run_has_written_gives_the_same_run(nano_mvit, tiny_dataset, tmp_path):
    opts = ["DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]
    recipe = nano_mvit.replace("_fpn.yaml", "_fpn_3x.yaml")
    rescaled = ["SOLVER.IMS_PER_BATCH", "16", "SOLVER.STEPS", "(50,)"]
    first = load_config(recipe, [*opts, *rescaled], [tiny_dataset])
    assert first.SOLVER.MAX_ITER == 240 and first.SOLVER.STEPS == (50,)
    written = tmp_path / "config.yaml"
    written.write_text(first.dump())
    # Also with the batch size named once more, and as the basis of another one.
    for again in ([], ["SOLVER.IMS_PER_BATCH", "16"]):
        assert load_config(str(written), again).SOLVER == first.SOLVER
    assert load_config(str(written), ["SOLVER.IMS_PER_BATCH", "32"]).SOLVER.MAX_ITER == 120


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.LR_SCALING", "cubic", "LR_SCALING is 'cubic'; allowed are 'sqrt', 'linear', 'none'"),
        ("SOLVER.REFERENCE_IMS_PER_BATCH", -1, "REFERENCE_IMS_PER_BATCH must be .* got -1"),
        ("SOLVER.IMS_PER_BATCH", 0, "IMS_PER_BATCH must be .* got 0"),
        ("SOLVER.REFERENCE_WORLD_SIZE", 8, "both would rescale the schedule"),
    ],
)
def test_what_cannot_be_rescaled_is_named(cfg, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        rescale_schedule(cfg)


def test_the_command_line_of_the_coco_recipe(nano_mvit, tiny_dataset):
    recipe = nano_mvit.replace("Quickstart/mask_rcnn_rev_mvit_nano", "COCO-Detection/mask_rcnn_rev_mvit_b")
    recipe = recipe.replace("_fpn.yaml", "_fpn_3x.yaml")
    opts = ["DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "16"]
    cfg = load_config(recipe, [*opts, "SOLVER.WARMUP_ITERS", "7", "MODEL.DEVICE", "cpu"], [tiny_dataset])
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.8e-4)
    assert (cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)) == (4 * 65962, (4 * 49472, 4 * 60465))
    assert cfg.SOLVER.WARMUP_ITERS == 7


def test_with_iterations_of_ones_own_only_the_rate_follows_the_batch(cfg):
    changes = rescale_schedule(cfg, fixed=["SOLVER.MAX_ITER"])
    assert {"SOLVER.BASE_LR"} <= set(changes) <= {"SOLVER.BASE_LR", "SOLVER.BASE_LR_END"}


@pytest.mark.parametrize(
    "scheduler, warmup, way_out",
    [
        ("WarmupMultiStepLR", 749, None),
        ("WarmupMultiStepLR", 750, 75),
        ("WarmupCosineLR", 0, None),
        ("WarmupCosineLR", 499, None),
        ("WarmupCosineLR", 500, 50),
        ("WarmupCosineLR", 5000, 50),
    ],
)
def test_a_warmup_that_lasts_until_the_rate_has_fallen_is_warned_of(cfg, caplog, scheduler, warmup, way_out):
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS = scheduler, warmup
    warn_of_long_warmup(cfg)
    assert (f"WARMUP_ITERS is {warmup}, " in caplog.text) == bool(way_out)
    assert caplog.text.endswith(f"such as SOLVER.WARMUP_ITERS {way_out}\n" if way_out else "")
