"""The inversion check during training."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from rev_det.engine import Trainer, argument_parser, load_config
from rev_det.engine.inversion import InversionCheck, block_errors, reversible_backbone
from rev_det.engine.model_config import read_config
from rev_det.modeling import RevMViT, RevViT


def make_trainer(arguments: list[str]) -> Trainer:
    args = argument_parser().parse_args(arguments)
    seed_all_rng(4)
    return Trainer(load_config(args.config_file, args.opts, args.dataset))


def run(trainer: Trainer, iterations: int) -> EventStorage:
    # The other hooks count on a whole run.
    trainer._hooks = [hook for hook in trainer._hooks if isinstance(hook, InversionCheck)]
    with EventStorage() as trainer.storage:
        for trainer.iter in range(iterations):
            trainer.storage.iter = trainer.iter
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
    return trainer.storage


@pytest.mark.parametrize("dtype, bound", [("", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize("activations", ["reversible", "cached"])
def test_rebuilt_inputs_are_as_near_as_the_precision_allows(tiny_run, nano_config, dtype, bound, activations):
    opts = ["MODEL.REV.INVERSION_PERIOD", "2", "MODEL.REV.ACTIVATIONS", activations]
    opts += ["SOLVER.AMP.ENABLED", str(bool(dtype)), "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "9"]
    opts += ["MODEL.REV_MVIT.DROP_PATH_RATE", "0.3", "MODEL.REV_VIT.DROP_PATH_RATE", "0.3"]
    storage = run(make_trainer(tiny_run(nano_config, *opts)), 4)
    names = [name for name in storage.histories() if name.startswith("inversion_error/")]
    runs = ["0-0", "2-2", "4-6", "8-8"] if "mvit" in nano_config else ["0-3"]
    assert names == [f"inversion_error/blocks.{run}" for run in runs]
    for name in names:
        values = storage.history(name).values()
        assert [i for _, i in values] == [1, 3]
        assert all(0 <= error < bound for error, _ in values)


def test_the_error_is_the_relative_norm_of_what_is_rebuilt_wrongly(tiny_run, nano_mvit):
    trainer = make_trainer(tiny_run(nano_mvit, "DATASETS.TEST", "()"))
    (check,) = [hook for hook in trainer._hooks if isinstance(hook, InversionCheck)]
    backbone = trainer.model.backbone.bottom_up
    # With G = F = 0 a run returns its input, and what is added to the output comes out of the inversion.
    for block in backbone.blocks[4:7]:
        for branch in (block.F, block.G):
            branch.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    seen = []
    backbone.observer = seen.append
    backbone(torch.rand(1, 3, 64, 64))
    run = seen[2]
    check._observe(replace(run, y=(run.y[0] * 1.01, run.y[1])))
    assert check._errors["blocks.4-6"].item() == pytest.approx(0.01 / 2**0.5, rel=1e-3)


def test_a_large_error_is_warned_of_with_its_blocks(tiny_run, nano_mvit, caplog):
    opts = ("DATASETS.TEST", "()", "MODEL.REV.INVERSION_PERIOD", "2", "MODEL.REV.INVERSION_THRESHOLD", "1e-9")
    trainer = make_trainer(tiny_run(nano_mvit, *opts))
    with caplog.at_level(logging.WARNING, "rev_det"):
        run(trainer, 1)
        assert "rebuilt" not in caplog.text
        run(trainer, 2)
    assert "the input of blocks.4-6 of the backbone was rebuilt" in caplog.text
    assert "rev-det analyze CONFIG --inversion" in caplog.text


def test_a_check_changes_neither_losses_nor_gradients(tiny_run, nano_mvit, tmp_path):
    states = []
    for period in ("0", "1"):
        opts = ("DATASETS.TEST", "()", "MODEL.REV.INVERSION_PERIOD", period, "SEED", "4")
        trainer = make_trainer(tiny_run(nano_mvit, *opts))
        run(trainer, 2)
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


NANO = {
    RevViT: {"patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2, "pretrain_img_size": 64},
    RevMViT: {"embed_dim": 16, "depth": 9, "last_block_indexes": (0, 2, 6, 8), "pretrain_img_size": 64},
}


@pytest.mark.parametrize("family", [RevViT, RevMViT])
def test_inversion_is_exact_up_to_the_precision_of_the_streams(family):
    torch.manual_seed(0)
    model = family(**NANO[family], drop_path_rate=0.4)
    for p in model.parameters():  # larger than at the start, as in the course of training
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    images = torch.randn(1, 3, 64, 64)
    exact, rough = block_errors(model, images), block_errors(model, images, torch.bfloat16)
    double = block_errors(model.double(), images.double())
    assert model.training and model.observer is None
    largest = [max(error for run in runs for error in run.values()) for runs in (exact, rough, double)]
    assert 1e-9 < largest[0] < 1e-4 and largest[1] < 0.01 and largest[2] < 1e-13
    blocks = [[int(name.removeprefix("blocks.")) for name in run] for run in exact]
    assert blocks == ([[0], [2], [4, 5, 6], [8]] if family is RevMViT else [list(range(12))])
    if family is RevViT:
        # Errors grow from the end of the run to its start.
        assert exact[0]["blocks.0"] > exact[0]["blocks.11"]


def test_the_block_that_is_inverted_wrongly_is_seen():
    model = RevViT(**NANO[RevViT])
    calls = []

    def different_when_inverted(module, inputs, result):
        calls.append(1)
        # Before come the run itself, and the run again for the streams between the blocks.
        return result if len(calls) <= 2 else result + 1.0

    model.blocks[5].G.register_forward_hook(different_when_inverted)
    errors = list(block_errors(model, torch.randn(1, 3, 64, 64))[0].values())
    assert min(errors[:6]) > 0.1 and max(errors[6:]) < 1e-5


def test_only_reversible_backbones_are_inverted(nano_mvit):
    assert isinstance(reversible_backbone(read_config(nano_mvit, [])), RevMViT)
    resnet = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", "['res4']"]
    resnet += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]", "MODEL.RESNETS.OUT_FEATURES", "['res4']"]
    resnet += ["MODEL.RPN.IN_FEATURES", "['p4']", "MODEL.ROI_HEADS.IN_FEATURES", "['p4']"]
    with pytest.raises(ValueError, match="build_resnet_fpn_backbone is not reversible"):
        reversible_backbone(read_config(nano_mvit, resnet))


def test_the_error_is_in_metrics_and_summary(tiny_run, nano_mvit, tmp_path):
    trainer = make_trainer(tiny_run(nano_mvit, "DATASETS.TEST", "()", "MODEL.REV.INVERSION_PERIOD", "2"))
    trainer.resume_or_load()
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    errors = [v for record in records for name, v in record.items() if name.startswith("inversion_error/")]
    summary = json.loads((tmp_path / "output/summary.json").read_text())
    assert len(errors) == 4
    assert summary["largest_inversion_error"] == max(errors)
    assert summary["iterations"] == 2 and summary["images_per_step"] == 2
    assert len(summary["peak_memory_mib_by_process"]) == 1


@pytest.mark.parametrize("error, text", [(float("inf"), "inf"), (float("nan"), "nan")])
def test_a_run_that_cannot_be_inverted_has_a_summary_in_strict_json(
    tiny_run, nano_mvit, tmp_path, monkeypatch, error, text
):
    monkeypatch.setattr(
        "rev_det.engine.inversion.invert_blocks", lambda blocks, x1, x2, *args, **kwargs: (x1 * error, x2)
    )
    trainer = make_trainer(tiny_run(nano_mvit, "DATASETS.TEST", "()", "MODEL.REV.INVERSION_PERIOD", "1"))
    trainer.resume_or_load()
    trainer.train()
    content = (tmp_path / "output/summary.json").read_text()
    assert json.loads(content, parse_constant=pytest.fail)["largest_inversion_error"] == text
