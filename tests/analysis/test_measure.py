"""Measuring on a device: times, out of memory, the largest batch; counted against measured on a GPU."""

import gc

import pytest
import torch
from torch import nn

from rev_det.analysis.cases import Case, Counting, Measuring
from rev_det.analysis.counting import count_backbone
from rev_det.analysis.measure import (
    BackboneStep,
    largest_batch,
    measure,
    memory_limit,
    unless_out_of_memory,
)
from rev_det.analysis.peers import CACHED, CHECKPOINT_KEPT, MODELS, REVERSIBLE_KEPT, build
from rev_det.modeling import ReversibleSequence, RevMViT

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_only_the_steps_after_the_warm_up_are_timed():
    calls = []
    result = measure(
        run=lambda: calls.append("run"),
        release=lambda: calls.append("release"),
        batch=3,
        device=CPU,
        warm_up=2,
        steps=5,
        prepare=lambda: calls.append("prepare"),
        progress=lambda: calls.append("progress"),
    )
    step = ["run", "progress"]
    assert calls == ["prepare", *step * 2, "release", *step * 5]
    assert result.steps == 5
    assert 0 < result.low <= result.median <= result.high
    assert result.images_per_second == pytest.approx(3 / result.mean)
    assert (result.peak, result.allocated) == (None, None)  # the CPU keeps no account


def test_seconds_are_those_of_the_timed_steps(monkeypatch):
    now = 0.0
    durations = iter([10.0, 7.0, 1.0, 2.0, 3.0, 6.0])
    monkeypatch.setattr("rev_det.analysis.measure.time.perf_counter", lambda: now)

    def run():
        nonlocal now
        now += next(durations)

    result = measure(run, lambda: None, 6, CPU, warm_up=2, steps=4)
    assert (result.warm_up, result.mean, result.median) == (17.0, 3.0, 2.5)
    assert result.images_per_second == 2.0


@pytest.mark.parametrize("warm_up, steps", [(0, 5), (5, 0)])
def test_numbers_of_steps_are_checked(warm_up, steps):
    with pytest.raises(ValueError, match="must be at least 1"):
        measure(lambda: None, lambda: None, 1, CPU, warm_up, steps)


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


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shape"):
        unless_out_of_memory(lambda: (_ for _ in ()).throw(RuntimeError("wrong shape")), "it")
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


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it"]
)
def test_a_librarys_lack_of_memory_is_recognised(text, caplog):
    def fail():
        raise RuntimeError(text)

    assert unless_out_of_memory(fail, "8 images") is None
    assert f"8 images does not fit: {text}" in caplog.text


def test_other_errors_are_not_mistaken_for_lack_of_memory():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        unless_out_of_memory(fail, "8 images")


def test_progress_is_not_timed(monkeypatch):
    now = 0.0
    monkeypatch.setattr("rev_det.analysis.measure.time.perf_counter", lambda: now)

    def advance(seconds):
        nonlocal now
        now += seconds

    result = measure(lambda: advance(1.0), lambda: None, 1, CPU, 1, 2, progress=lambda: advance(5.0))
    assert (result.median, result.mean) == (1.0, 1.0)


def test_memory_limits_need_a_gpu():
    with pytest.raises(ValueError, match="--memory-limit is enforced on CUDA devices"):
        with memory_limit(CPU, 10**9):
            pass
    with memory_limit(CPU, None):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [CACHED, CHECKPOINT_KEPT, REVERSIBLE_KEPT], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "name, size, batch", [("rev_mvit_b", (800, 1344), 2), ("rev_vit_b", (1024, 1024), 2)]
)
def test_counted_memory_is_what_a_gpu_allocates(name, size, batch, scheme):
    counted = count_backbone(build(MODELS[name], scheme), batch, size)
    step = BackboneStep(build(MODELS[name], scheme, device="cuda"), batch, size, torch.bfloat16)
    measured = measure(step.run, step.release, batch, CUDA, warm_up=2, steps=2)
    # Without cuDNN the allocator reaches 1.01 times the count (docs/memory.md): the rest is left to the
    # workspaces of its convolutions.
    assert measured.peak == pytest.approx(counted.peak, rel=0.1)
    assert measured.allocated == pytest.approx(counted.total, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [CACHED, REVERSIBLE_KEPT], ids=lambda s: s.name)
def test_running_out_of_gpu_memory_leaves_a_usable_process(scheme, caplog):
    model = build(MODELS["rev_vit_s"], scheme, device="cuda")
    small = BackboneStep(model, 1, (224, 224), torch.bfloat16)
    small.run()
    expected = [p.grad.clone() for p in model.parameters()]
    small.release()
    allocated = torch.cuda.memory_allocated()
    # Reversible, the forward pass fits and the backward pass does not.
    kept = count_backbone(build(MODELS["rev_vit_s"], scheme), 512, (224, 224), None)
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
@pytest.mark.parametrize("scheme", [CACHED, REVERSIBLE_KEPT], ids=lambda s: s.name)
def test_the_largest_batch_under_a_limit_on_a_gpu_is_about_the_counted_one(scheme):
    case = Case("it", MODELS["rev_vit_s"], scheme, 1, (224, 224), "fp32")
    limit = 2 * 2**30
    found = Measuring(CUDA, 1, 1, limit).largest_batch(case, limit)
    assert found == pytest.approx(Counting().largest_batch(case, limit), rel=0.15)
    # The limit is gone again.
    torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda")
