"""Measuring on a device: times, out of memory, the largest batch; counted against measured on a GPU."""

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from rev_det.comparison.cases import Case, Counting, Measuring
from rev_det.comparison.models import CACHED, CHECKPOINT_KEPT, MODELS, REVERSIBLE_KEPT, build
from rev_det.memory.counting import count_step
from rev_det.memory.measure import (
    BackboneStep,
    largest_batch,
    measure,
    memory_limit,
    unless_out_of_memory,
)
from rev_det.modeling import ReversibleSequence, RevMViT

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@dataclass
class Clock:
    """A step whose runs take the given seconds; notes what is called."""

    durations: Any
    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def settle(self):
        self.calls.append("settle")

    def run(self):
        self.calls.append("run")
        self.now += next(self.durations)

    def release(self):
        self.calls.append("release")

    def progress(self):
        self.calls.append("progress")
        self.now += 100


def test_only_the_steps_after_the_warm_up_are_timed_and_progress_never(monkeypatch):
    clock = Clock(iter([10.0, 7.0, 1.0, 2.0, 3.0, 6.0]))
    monkeypatch.setattr("rev_det.memory.measure.time.perf_counter", lambda: clock.now)
    result = measure(clock, 6, CPU, 2, 4, clock.progress)
    step = ["run", "progress"]
    assert clock.calls == ["settle", *step * 2, "release", *step * 4]
    assert (result.warm_up, result.mean, result.median) == (217.0, 3.0, 2.5)
    assert result.low < result.median < result.high
    assert result.images_per_second == 2.0
    assert (result.peak, result.allocated) == (None, None)  # the CPU keeps no account
    for warm_up, steps in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            measure(clock, 1, CPU, warm_up, steps)


def test_a_backbone_step_starts_without_gradients():
    step = BackboneStep(nano(), 1, (32, 32), None)
    step.run()
    first = [p.grad.clone() for p in step.model.parameters()]
    step.run()
    assert all(torch.equal(p.grad, g) for p, g in zip(step.model.parameters(), first, strict=True))
    step.release()
    assert all(p.grad is None for p in step.model.parameters())


def test_a_backbone_step_sets_aside_what_adamw_would_keep():
    step = BackboneStep(nano(), 1, (32, 32), None)
    weights = sum(p.nbytes for p in step.model.parameters())
    assert sum(x.nbytes for x in step.optimizer_state) == 2 * weights


def nano(**arguments):
    torch.manual_seed(0)
    return RevMViT(
        embed_dim=16, depth=9, last_block_indexes=(0, 2, 6, 8), pretrain_img_size=64, **arguments
    ).train()


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


class Exhausting(nn.Module):
    """Runs out of memory at the given call."""

    def __init__(self, dim, call):
        super().__init__()
        self.linear, self.calls, self.call = nn.Linear(dim, dim), 0, call

    def forward(self, x):
        self.calls += 1
        if self.calls == self.call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And more words.")
        return self.linear(x)


@pytest.mark.parametrize("call", [1, 2])  # in the forward pass; when the backward pass rebuilds
def test_running_out_of_memory_inside_a_step_leaves_a_usable_process(call, caplog):
    block = nn.Module()
    block.F, block.G = Exhausting(8, 0), nn.Linear(8, 8)
    other = nn.Module()
    other.F, other.G = nn.Linear(8, 8), nn.Linear(8, 8)
    model = ReversibleSequence([block, other])
    x = torch.randn(2, 3, 8)

    def step():
        model.zero_grad()
        sum(y.square().sum() for y in model(x, x)).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = step()
    block.F.calls, block.F.call = 0, call
    model.zero_grad()
    before = live_tensors()
    assert unless_out_of_memory(step, "a batch of 2") is None
    assert "a batch of 2 does not fit: CUDA out of memory" in caplog.text
    assert "more words" not in caplog.text
    model.zero_grad()
    # Nothing of the failed step is held on to, and the next one gives what it gave before.
    assert live_tensors() <= before
    assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))


@pytest.mark.parametrize(
    "text, is_memory",
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("wrong shape", False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(text, is_memory, caplog):
    def fail():
        raise RuntimeError(text)

    if is_memory:
        assert unless_out_of_memory(fail, "8 images") is None
        assert f"8 images does not fit: {text}" in caplog.text
    else:
        with pytest.raises(RuntimeError, match=text):
            unless_out_of_memory(fail, "8 images")
    assert unless_out_of_memory(lambda: 5, "it") == 5


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 1000])
@pytest.mark.parametrize("guess", [-5, 1, 2, 99, 100, 101, 5000])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    tried = []

    def fits(batch):
        assert batch >= 1
        tried.append(batch)
        return batch <= limit

    assert largest_batch(fits, guess) == limit
    assert len(tried) == len(set(tried)), "a batch was tried twice"
    if guess == limit:
        assert len(tried) == 2


def test_an_endless_search_is_given_up():
    with pytest.raises(ValueError, match="no end is in sight; give a --memory-limit"):
        largest_batch(lambda batch: True)


def test_memory_limits_need_a_gpu():
    with pytest.raises(ValueError, match="--memory-limit is enforced on CUDA devices"):
        with memory_limit(CPU, 10**9):
            pass
    with memory_limit(CPU, None):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("training", [CACHED, CHECKPOINT_KEPT, REVERSIBLE_KEPT])
@pytest.mark.parametrize(
    "name, size, batch", [("rev_mvit_b", (800, 1344), 2), ("rev_vit_b", (1024, 1024), 2)]
)
def test_counted_memory_is_what_a_gpu_allocates(name, size, batch, training):
    counted = count_step(build(MODELS[name], training), lambda: torch.empty(batch, 3, *size))
    step = BackboneStep(build(MODELS[name], training, device="cuda"), batch, size, torch.bfloat16)
    measured = measure(step, batch, CUDA, 2, 2)
    # Without cuDNN the allocator reaches 1.01 times the count (docs/memory.md): the rest is left to the
    # workspaces of its convolutions.
    assert measured.peak == pytest.approx(counted.peak, rel=0.1)
    assert measured.allocated == pytest.approx(counted.total, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [CACHED, REVERSIBLE_KEPT])
def test_running_out_of_gpu_memory_leaves_a_usable_process(training, caplog):
    model = build(MODELS["rev_vit_s"], training, device="cuda")
    small = BackboneStep(model, 1, (224, 224), torch.bfloat16)
    small.run()
    expected = [p.grad.clone() for p in model.parameters()]
    small.release()
    allocated = torch.cuda.memory_allocated()
    # Reversible, the forward pass fits and the backward pass does not.
    meta = build(MODELS["rev_vit_s"], training)
    kept = count_step(meta, lambda: torch.empty(512, 3, 224, 224), dtype=None)
    limit = allocated + kept.optimizer_state + kept.inputs + (kept.kept + kept.peak) // 2
    with memory_limit(CUDA, limit):
        assert (
            unless_out_of_memory(lambda: BackboneStep(model, 512, (224, 224), None).run(), "512 images")
            is None
        )
        assert "512 images does not fit: CUDA out of memory" in caplog.text
        small.release()
        assert torch.cuda.memory_allocated() <= allocated
        small.run()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [CACHED, REVERSIBLE_KEPT])
def test_the_largest_batch_under_a_limit_on_a_gpu_is_about_the_counted_one(training):
    case = Case("it", MODELS["rev_vit_s"], training, 1, (224, 224), "fp32")
    limit = 2 * 2**30
    found = Measuring(CUDA, 1, 1, limit).largest_batch(case, limit)
    assert found == pytest.approx(Counting().largest_batch(case, limit), rel=0.15)
    # The limit is gone again.
    torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
