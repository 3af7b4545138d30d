"""Reversible backbones under DistributedDataParallel: the gradients of one process, in every mode."""

import itertools
import tempfile
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_backbones import NANO, images
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from rev_det.modeling import RevMViT, RevViT

WORLD = 2
MODES = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "fp16_hook": {},
    "bf16_hook": {},
}
HOOKS = {"fp16_hook": default_hooks.fp16_compress_hook, "bf16_hook": default_hooks.bf16_compress_hook}
STEPS = 2  # a static graph is recorded in the first


def model_of(cls, freeze_at):
    torch.manual_seed(0)
    return cls(**NANO[cls], freeze_at=freeze_at)


def image_loss(outputs):
    """A mean over images, so that micro-batches and processes average to the whole batch."""
    return sum(y.square().mean() for y in outputs.values())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_gradients(cls, freeze_at, accumulate):
    model = model_of(cls, freeze_at)
    image_loss(model(images(WORLD * accumulate, 64, 64, torch.float32))).backward()
    return gradients(model)


def worker(rank, store, failures):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for cls, mode, freeze_at, accumulate in itertools.product((RevViT, RevMViT), MODES, (0, 2), (1, 2)):
        expected = expected_gradients(cls, freeze_at, accumulate)
        model = DistributedDataParallel(model_of(cls, freeze_at), **MODES[mode])
        if mode in HOOKS:
            model.register_comm_hook(None, HOOKS[mode])
        batch = images(WORLD * accumulate, 64, 64, torch.float32)
        for step in range(STEPS):
            model.zero_grad()
            for i in range(accumulate):
                # A static graph asserts that its first step is synchronised throughout.
                synchronise = i == accumulate - 1 or (mode == "static_graph" and step == 0)
                with nullcontext() if synchronise else model.no_sync():
                    (image_loss(model(batch[i * WORLD + rank][None])) / accumulate).backward()
        actual = gradients(model.module)
        tolerance = 1e-2 if mode in HOOKS else 1e-5
        # Some are zero but for rounding (a constant added to all keys): measured against the largest.
        floor = 1e-3 * max(float(grad.norm()) for grad in expected.values())
        worst = max(
            float((actual[name] - grad).norm() / max(float(grad.norm()), floor))
            for name, grad in expected.items()
        )
        if actual.keys() != expected.keys() or worst > tolerance:
            failures.put((cls.__name__, mode, freeze_at, accumulate, worst))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_mode_gives_the_gradients_of_one_process():
    """Modes x frozen stem and block x accumulation: relative error 1e-5, 1e-2 with compressed gradients."""
    failures = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (f"{folder}/store", failures), nprocs=WORLD)
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found


def test_the_gradients_of_one_process_differ_between_the_cases():
    """What the test above compares with is not trivially equal."""
    all_cases = [
        expected_gradients(cls, freeze_at, accumulate)
        for cls, freeze_at, accumulate in itertools.product((RevViT, RevMViT), (0, 2), (1, 2))
    ]
    assert len({len(case) for case in all_cases}) == 4
    assert all(grad.abs().max() > 0 for case in all_cases for grad in case.values())
