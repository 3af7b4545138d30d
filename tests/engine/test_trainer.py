"""Training, evaluation and resuming, through the same function as the command."""

import json
import logging
import os
import re
from signal import SIGTERM, getsignal

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import CallbackHook
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from rev_det.engine import Trainer, argument_parser, load_config, main, run


def parsed(arguments: list[str]):
    args = argument_parser().parse_args(arguments)
    return load_config(args.config_file, args.opts, args.dataset), args


def test_two_steps_evaluation_and_files_of_both_nano_configs(tiny_run, nano_config, tmp_path):
    output = tmp_path / "output"
    assert main(tiny_run(nano_config)) == 0
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    (record,) = [record for record in records if "total_loss" in record]
    assert record["iteration"] == 1
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc", "lr"} <= set(record)
    for task in ("bbox", "segm"):
        assert 0 <= records[-1][f"{task}/AP"] <= 100
    for name in ("model_final.pth", "curves.png", "predictions.png", "config.yaml", "log.txt"):
        assert (output / name).stat().st_size > 0
    log = output / "log.txt"
    *_, last = log.read_text().splitlines()
    assert re.search(
        r"bbox/AP \d+\.\d, segm/AP \d+\.\d; in .*/output: model_final.pth, pred.*, summary.json; "
        r"next: rev-det predict IMAGES --run .*/output$",
        last,
    )
    # Of two runs in one process, as here, the second also goes on with the log of the first.
    files = {path: path.read_bytes() for path in output.iterdir() if path.is_file() and path != log}
    # The same weights give the same AP when they are loaded again.
    cfg, args = parsed(
        tiny_run(nano_config, "MODEL.WEIGHTS", str(output / "model_final.pth"), options=("--eval-only",))
    )
    results = run(cfg, args)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(records[-1][f"{task}/AP"], nan_ok=True)
    # Of the run nothing has changed; the evaluation has files of its own.
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file() and path != log} == files
    assert "model_final.pth" not in files[output / "config.yaml"].decode()
    assert "model_final.pth" in (output / "inference/config.yaml").read_text()
    assert "bbox" in (output / "inference/log.txt").read_text()


def test_training_and_evaluation_in_bfloat16_on_the_cpu(tiny_run, nano_config, monkeypatch):
    cfg, _ = parsed(tiny_run(nano_config, "SOLVER.AMP.ENABLED", "True"))
    trainer = Trainer(cfg)
    types = []
    predictor = trainer.model.roi_heads.box_predictor
    predictor.cls_score.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with EventStorage():
        trainer.run_step()
    Trainer.test(cfg, trainer.model)
    assert set(types) == {torch.bfloat16}
    assert len(types) == 1 + 4


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_attends_with_one_choice_of_kernels_and_leaves_torchs_own(tiny_run, nano_mvit, allowed):
    cfg, _ = parsed(tiny_run(nano_mvit, "MODEL.REV.CUDNN_ATTENTION", str(allowed)))
    trainer, seen = Trainer(cfg), {}

    def note(when):
        return lambda *_: seen.setdefault(when, set()).add(torch.backends.cuda.cudnn_sdp_enabled())

    attention = trainer.model.backbone.bottom_up.blocks[0].F
    attention.register_forward_hook(lambda *_: note("training" if trainer.model.training else "test")())
    next(attention.parameters()).register_hook(note("backward"))
    trainer.train()
    assert seen == dict.fromkeys(("training", "backward", "test"), {allowed})
    assert torch.backends.cuda.cudnn_sdp_enabled()
    seen.clear()
    Trainer.test(cfg, trainer.model)
    assert seen == {"test": {allowed}}


def test_resuming_restores_weights_optimizer_schedule_and_iteration(tiny_run, nano_mvit, tmp_path):
    schedule = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(1,)")
    schedule += ("SOLVER.BASE_LR", "0.001", "DATASETS.TEST", "()")
    cfg, args = parsed(tiny_run(nano_mvit, *schedule))
    run(cfg, args)
    saved = torch.load(tmp_path / "output/model_final.pth", weights_only=False)

    cfg, _ = parsed(tiny_run(nano_mvit, *schedule, "SOLVER.MAX_ITER", "4", "MODEL.WEIGHTS", "ignored.pth"))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0001, 0.0001])
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    moments = [state["exp_avg_sq"] for state in trainer.optimizer.state.values()]
    stored = saved["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert all(torch.equal(a, b["exp_avg_sq"]) for a, b in zip(moments, stored, strict=True))
    trainer.train()
    assert torch.load(tmp_path / "output/model_final.pth", weights_only=False)["iteration"] == 3


class OfDetectron2(Trainer):
    """A user's trainer whose parts are Detectron2's own."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, total_batch_size=cfg.SOLVER.IMS_PER_BATCH)

    def build_hooks(self):
        return DefaultTrainer.build_hooks(self)


def test_a_trainer_with_hooks_and_data_of_detectron2_trains_evaluates_and_resumes(
    tiny_run, nano_mvit, tmp_path, caplog
):
    # PreciseBN, for which Detectron2 builds a second loader.
    opts = ("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "1", "MODEL.FPN.NORM", "BN")
    cfg, _ = parsed(tiny_run(nano_mvit, *opts))
    trainer = OfDetectron2(cfg)
    assert "build_train_loader returned a " in caplog.text
    handlers = []
    trainer.register_hooks([CallbackHook(after_step=lambda _: handlers.append(getsignal(SIGTERM)))])
    trainer.train()
    # Without this project's hook that saves and stops, a signal does what it always does.
    assert handlers == [getsignal(SIGTERM)] * 2
    assert "bbox/AP" in (tmp_path / "output/metrics.json").read_text()
    cfg, _ = parsed(tiny_run(nano_mvit, *opts, "SOLVER.MAX_ITER", "3"))
    resumed = OfDetectron2(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert torch.load(tmp_path / "output/model_final.pth", weights_only=True)["iteration"] == 2


def test_writers_of_a_subclass_need_not_write_metrics_json(tiny_run, nano_mvit, tmp_path):
    class Quiet(Trainer):
        def build_writers(self):
            return []

    cfg, _ = parsed(tiny_run(nano_mvit, "DATASETS.TEST", "()"))
    Quiet(cfg).train()
    assert json.loads((tmp_path / "output/summary.json").read_text())["last_losses"] == {}
    assert not (tmp_path / "output/curves.png").exists()


def test_without_resume_a_run_starts_anew_in_the_same_folder(tiny_run, nano_mvit, tmp_path):
    arguments = tiny_run(nano_mvit, "DATASETS.TEST", "()")
    assert main(arguments) == 0
    assert main(arguments) == 0
    records = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 1]


def test_the_same_seed_gives_the_same_losses(tiny_run, nano_mvit, tmp_path):
    losses = []
    for name in "ab":
        assert (
            main(tiny_run(nano_mvit, "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / name), "SEED", "3"))
            == 0
        )
        record = json.loads((tmp_path / name / "metrics.json").read_text().splitlines()[-1])
        losses.append(record["total_loss"])
    assert losses[0] == losses[1]


def test_a_proposal_network_trains_is_evaluated_and_has_no_picture(tiny_run, nano_mvit, tmp_path, caplog):
    opts = ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.MASK_ON", "False")
    assert main(tiny_run(nano_mvit, *opts)) == 0
    assert "box_proposals/AR@100" in json.loads((tmp_path / "output/summary.json").read_text())["metrics"]
    assert not (tmp_path / "output/predictions.png").exists()


@pytest.mark.parametrize(
    "damage, opts, message",
    [
        (True, (), "model_final.pth is damaged or truncated"),
        (False, ("SOLVER.OPTIMIZER", "SGD"), "cannot be resumed from: .*SOLVER.OPTIMIZER is 'SGD', and was"),
        (
            False,
            ("SOLVER.LAYER_DECAY", "0.7"),
            "cannot be resumed from: .*different number of parameter group",
        ),
        (False, ("MODEL.ROI_BOX_HEAD.FC_DIM", "64"), "FC_DIM|box_head"),
    ],
)
def test_a_run_that_cannot_be_resumed_changes_nothing(
    tiny_run, nano_mvit, tmp_path, capsys, damage, opts, message
):
    output, settings = tmp_path / "output", ("DATASETS.TEST", "()", "SOLVER.BASE_LR", "0.001")
    assert main(tiny_run(nano_mvit, *settings)) == 0
    if damage:
        os.truncate(output / "model_final.pth", 1000)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    # As in another process.
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "rev_det"):
        logging.getLogger(name).handlers.clear()
    words = tiny_run(nano_mvit, *settings, "SOLVER.MAX_ITER", "4", *opts, options=("--resume",))
    assert main(words) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.M)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
