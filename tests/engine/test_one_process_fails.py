"""Where the model of one process raises because numbers are not finite, no other process waits for it."""

import datetime
import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rev_det.engine import Precision, Trainer, TrainStep, load_config
from rev_det.engine.train_step import NonFiniteError

SAID = "Predicted boxes or scores contain Inf/NaN. Training has diverged."
MODES = ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True})


class Fragile(nn.Module):
    """Raises, as Detectron2 does, in the middle of its forward pass; a second layer comes after that."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, batch):
        x = self.first(torch.stack([record["image"] for record in batch]))
        if not x.isfinite().all():
            raise FloatingPointError(SAID)
        return {"loss": self.second(x).square().mean()}


def batches(rank: int, bad: tuple[int, ...], number: int = 8) -> list[list[dict]]:
    """Of one image each, the same on both processes, except that the second has broken ones at ``bad``."""
    images = torch.randn(number, 3, generator=torch.Generator().manual_seed(1))
    broken = [float("nan") if rank == 1 and i in bad else 0.0 for i in range(number)]
    return [[{"image": images[i] + broken[i], "file_name": f"{i}.jpg"}] for i in range(number)]


def make_step(model: nn.Module, loader: list, scaled: bool, accumulate: int) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, loader, optimizer, Precision("cpu"), accumulate=accumulate)
    if scaled:  # as float16 has it
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    return step


def train(step: TrainStep, iterations: int) -> None:
    with EventStorage():
        for step.iter in range(iterations):
            step.run_step()


def skips_the_step(rank: int, mode: dict, accumulate: int, bad: int) -> None:
    """A broken batch costs its step, on both processes, and no other; ``bad`` is its index among all."""
    iterations, lost = 3, bad // accumulate
    loader = batches(rank, (bad,))
    step = make_step(DistributedDataParallel(Fragile(), **mode), loader, True, accumulate)
    train(step, iterations)
    expected = Fragile()
    good = [b for i, b in enumerate(batches(0, ())) if i // accumulate != lost]
    train(make_step(expected, good, True, accumulate), iterations - 1)
    for p, q in zip(step.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert step.grad_scaler.get_scale() == 2.0**7
    assert "forward" not in vars(step.model.module)


def raises_on_both(rank: int, mode: dict, accumulate: int) -> None:
    step = make_step(DistributedDataParallel(Fragile(), **mode), batches(rank, (3,)), False, accumulate)
    with pytest.raises(NonFiniteError) as caught:
        train(step, 4)
    told = f"iteration {3 // accumulate}: the model raised {SAID!r} for 3.jpg (process 1)."
    assert str(caught.value).startswith(told)
    good, bad = caught.value.report["processes"]
    assert good["errors"] == [""] * accumulate and SAID in bad["errors"]
    assert good["gradient_norm"] == bad["gradient_norm"] == "nan"


class Broken(Trainer):
    """On the second process the pixels of iteration 2 are not finite."""

    def run_step(self):
        def ruin(model, inputs):
            for record in inputs[0]:
                record["image"] = record["image"] * float("nan")

        if self.iter == 2 and comm.get_rank() == 1:
            self.model.module.register_forward_pre_hook(ruin)
        super().run_step()


def leaves_report_and_last_good_state(rank: int, arguments: tuple) -> None:
    config, opts, dataset, folder = arguments
    trainer = Broken(load_config(config, opts, [dataset], num_gpus=2))
    trainer.resume_or_load(resume=False)
    with pytest.raises(NonFiniteError, match="iteration 2: the model raised .*model_last_good.pth"):
        trainer.train()
    report = json.loads(Path(folder, "non_finite.json").read_text())
    assert report["processes"][0]["errors"] == [""]
    assert report["processes"][1]["errors"] == [SAID]
    assert len(report["processes"][1]["images"][0]) == 2
    saved = torch.load(Path(folder, "model_last_good.pth"), weights_only=True)
    assert saved["iteration"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def worker(rank: int, store: str, checks: list[tuple]) -> None:
    torch.set_num_threads(1)
    # Who waits for ever fails.
    timeout = datetime.timedelta(seconds=60)
    init = {"init_method": f"file://{store}", "timeout": timeout}
    dist.init_process_group("gloo", rank=rank, world_size=2, **init)
    comm.create_local_process_group(2)
    for check, *arguments in checks:
        check(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def on_two_processes(checks: list[tuple]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (f"{folder}/store", checks), nprocs=2)


def test_the_step_is_skipped_or_ends_the_run_on_both_processes_in_every_mode():
    # In the first step, in a later one, and in the first, a middle and the last of the batches of a step.
    skipped = [(mode, 1, bad) for mode in MODES for bad in (0, 1)]
    skipped += [(mode, 2, bad) for mode in MODES for bad in (2, 3)]
    checks = [(skips_the_step, *case) for case in skipped]
    checks += [(raises_on_both, mode, accumulate) for mode in MODES for accumulate in (1, 2)]
    on_two_processes(checks)


def test_detectron2s_own_error_leaves_report_and_last_good_state(nano_mvit, tiny_dataset, tmp_path):
    keys = {
        "MODEL.DEVICE": "cpu",
        "DATASETS.TRAIN": "('tiny',)",
        "DATASETS.TEST": "()",
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "SOLVER.IMS_PER_BATCH": "4",
        "SOLVER.MAX_ITER": "4",
        "SOLVER.STEPS": "()",
        "SOLVER.WARMUP_ITERS": "0",
        "DATALOADER.NUM_WORKERS": "0",
        "OUTPUT_DIR": str(tmp_path),
    }
    opts = [word for pair in keys.items() for word in pair]
    arguments = (nano_mvit, opts, tiny_dataset, str(tmp_path))
    on_two_processes([(leaves_report_and_last_good_state, arguments)])
