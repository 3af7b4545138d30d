"""Reversible backbones under DistributedDataParallel: the gradients of one process, in every mode."""

import itertools
import tempfile
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.modeling import SwinTransformer, ViT
from small_backbones import NANO, images
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from rev_det import low_memory
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
# Detectron2's own, of few channels, whose blocks are computed again.
LESS_MEMORY = {
    ViT: {
        "img_size": 64,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "use_rel_pos": True,
        "window_size": 3,
        "window_block_indexes": (0,),
    },
    SwinTransformer: {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "out_indices": (0, 1)},
}
STEPS = 2  # a static graph is recorded in the first


class Case(NamedTuple):
    cls: type
    mode: str = "plain"
    freeze_at: int = 0
    accumulate: int = 1  # micro-batches of each process
    drop_path_rate: float = 0.0
    bfloat16: bool = False

    def model(self):
        torch.manual_seed(0)
        if self.cls in LESS_MEMORY:
            return low_memory(self.cls(**LESS_MEMORY[self.cls], drop_path_rate=self.drop_path_rate)).train()
        return self.cls(**NANO[self.cls], freeze_at=self.freeze_at, drop_path_rate=self.drop_path_rate)

    def images(self):
        return images(WORLD * self.accumulate, 64, 64, torch.float32)

    def loss(self, model, batch, seed):
        """A mean over images, so that micro-batches and processes average to the whole batch."""
        torch.manual_seed(seed)  # of drop path
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
            outputs = model(batch)
        # Weighted, because a mere mean of squares hardly depends on anything before the outputs' LayerNorm.
        weights = [torch.linspace(-1, 1, y[0].numel()).view_as(y[0]) for y in outputs.values()]
        return sum((y.float().sin() * w).mean() for y, w in zip(outputs.values(), weights, strict=True))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_gradients(case):
    """Of the whole batch; image by image where the draws or the rounding are those of single images."""
    model, batch = case.model(), case.images()
    parts = batch.split(1) if case.drop_path_rate or case.bfloat16 else [batch]
    for i, part in enumerate(parts):
        (case.loss(model, part, seed=i) / len(parts)).backward()
    return gradients(model)


def distributed_gradients(case, rank):
    model = DistributedDataParallel(case.model(), **MODES[case.mode])
    if case.mode in HOOKS:
        model.register_comm_hook(None, HOOKS[case.mode])
    batch = case.images()
    for step in range(STEPS):
        model.zero_grad()
        for i in range(case.accumulate):
            # A static graph asserts that its first step is synchronised throughout.
            last = i == case.accumulate - 1
            synchronise = last or (case.mode == "static_graph" and step == 0)
            image = i * WORLD + rank
            with nullcontext() if synchronise else model.no_sync():
                (case.loss(model, batch[image][None], seed=image) / case.accumulate).backward()
    return gradients(model.module)


def worker(rank, store, cases, failures):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for case in cases:
        expected, actual = expected_gradients(case), distributed_gradients(case, rank)
        tolerance = 1e-2 if case.mode in HOOKS else 1e-5
        # Some are zero but for rounding (a constant added to all keys): measured against the largest.
        floor = 1e-3 * max(float(grad.norm()) for grad in expected.values())
        worst = max(
            float((actual[name] - grad).norm() / max(float(grad.norm()), floor))
            for name, grad in expected.items()
        )
        if actual.keys() != expected.keys() or not worst <= tolerance:
            failures.put((case.cls.__name__, *case[1:], worst))
    dist.barrier()
    dist.destroy_process_group()


def failures_of(cases):
    failures = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (f"{folder}/store", cases, failures), nprocs=WORLD)
    found = []
    while not failures.empty():
        found.append(failures.get())
    return found


def test_drop_path_gives_the_gradients_of_one_process():
    modes = ("plain", "find_unused_parameters")
    assert not failures_of([Case(RevMViT, mode, drop_path_rate=0.4) for mode in modes])


@pytest.mark.slow
@pytest.mark.parametrize("drop_path_rate, bfloat16", [(0.0, False), (0.4, True)])
def test_every_mode_gives_the_gradients_of_one_process(drop_path_rate, bfloat16):
    """Modes x frozen stem and block x accumulation: relative error 1e-5, 1e-2 with compressed gradients."""
    cases = itertools.product((RevViT, RevMViT), MODES, (0, 2), (1, 2))
    assert not failures_of([Case(*case, drop_path_rate, bfloat16) for case in cases])


@pytest.mark.slow
def test_detectron2s_own_backbones_with_less_memory_give_the_gradients_of_one_process():
    assert not failures_of([Case(*case) for case in itertools.product(LESS_MEMORY, MODES, (0,), (1, 2))])


def test_the_gradients_of_one_process_differ_between_the_cases():
    """What the tests above compare with is not trivially equal."""
    for cls in (RevViT, RevMViT):
        cases = [Case(cls, "plain", *case) for case in itertools.product((0, 2), (1, 2))]
        all_gradients = [expected_gradients(case) for case in cases]
        assert len({len(grads) for grads in all_gradients}) == 2
        assert all(grad.abs().max() > 0 for grads in all_gradients for grad in grads.values())
        plain, dropped, low = (
            torch.cat([grad.flatten() for grad in expected_gradients(Case(cls, **options)).values()])
            for options in ({}, {"drop_path_rate": 0.4}, {"bfloat16": True})
        )
        assert (dropped - plain).norm() > 1e-2 * plain.norm(), "drop path did nothing"
        assert 1e-4 * plain.norm() < (low - plain).norm() < 1e-1 * plain.norm()
