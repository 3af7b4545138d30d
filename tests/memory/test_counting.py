"""The counter against cases worked out by hand, and against runs on real tensors."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint

from rev_det.memory.counting import (
    GRADIENTS,
    INPUTS,
    OPTIMIZER,
    OUTPUTS,
    WEIGHTS,
    WORKING,
    Counter,
    count_step,
)
from rev_det.memory.measure import BackboneStep
from rev_det.memory.skipping import SkipArithmetic
from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.reversible import ACTIVATIONS

NANO = {
    RevViT: {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "pretrain_img_size": 64},
    RevMViT: {"embed_dim": 16, "depth": 9, "last_block_indexes": (0, 2, 6, 8), "pretrain_img_size": 64},
}
FAMILIES = pytest.mark.parametrize("cls", [RevViT, RevMViT])
KB = 1024


def counter():
    return Counter(nn.Identity())


def test_bytes_rise_with_a_storage_and_fall_when_it_dies():
    with counter() as c:
        x = torch.empty(256)  # 1 KB
        assert c.current == KB
        y = torch.empty(512, dtype=torch.float64)  # 4 KB
        assert (c.current, c.peak) == (5 * KB, 5 * KB)
        del x
        assert (c.current, c.peak) == (4 * KB, 5 * KB)
        del y
        assert (c.current, c.peak) == (0, 5 * KB)


def test_views_and_in_place_operations_take_nothing():
    with counter() as c:
        x = torch.zeros(256)
        y = x.view(16, 16)[2:].t()
        y.add_(1).relu_()
        del x
        assert c.current == c.peak == KB  # y still holds the storage


def test_what_only_the_autograd_graph_holds_is_counted_until_it_lets_go():
    x = torch.zeros(256, requires_grad=True)
    with counter() as c:
        y = (x * 2).sin()  # sin keeps its input
        assert c.current == 2 * KB
        y.sum().backward()
        assert c.current == 2 * KB  # y and x.grad


def test_what_is_dropped_at_once_makes_a_peak_all_the_same():
    x = torch.zeros(256)
    with counter() as c:
        y = (x + 1) + 1
        assert (c.current, c.peak) == (KB, 2 * KB)
    assert y.shape == (256,)


class TwoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 20, bias=False)
        self.second = nn.Linear(20, 5, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


def count_two_linear(model=None):
    return count_step(model or TwoLinear(), lambda: torch.empty(4, 10), torch.sum, dtype=None)


def test_a_training_step_worked_out_by_hand():
    count = count_two_linear()
    # In multiplications and additions: 4 x 10 x 20 and 4 x 20 x 5; backward both weights, and one input.
    assert count.forward.flops == 2 * (800 + 400)
    assert count.flops == 2 * (800 + 400) + 2 * (400 + 400 + 800)
    assert count.weights == 4 * (200 + 100)
    assert count.inputs == 4 * 40
    # Two averages of the weights, and a step number for each of the two.
    assert count.optimizer_state == 2 * count.weights + 2 * 4
    # Between the passes: relu's result (which relu and the second layer share), the loss and its gradient of
    # 1. A sum does without its input.
    assert count.kept == 4 * (80 + 1 + 1)
    # At the last product: both weights' gradients, that of the first layer's result, the loss and its
    # gradient; relu's result is gone.
    assert count.peak == 4 * (100 + 200 + 80 + 1 + 1)
    assert count.total == count.peak + count.weights + count.optimizer_state + count.inputs
    assert (count.step.operation, count.step.shape) == ("aten.mm.default", (20, 10))
    before = {WEIGHTS: 4 * 300, OPTIMIZER: count.optimizer_state}
    common = {GRADIENTS: 4 * 300, OUTPUTS: 0}
    ours = {"backbone: kept for backward": 8, "backbone: working memory": 320}
    assert count.split() == before | common | ours
    # The gradient of the first layer's result is made by the second, the loss and its gradient by neither.
    parts = {"heads: kept for backward": 8, "heads: working memory": 320}
    ours = {"backbone: kept for backward": 0, "backbone: working memory": 0}
    assert count.split("first") == before | common | ours | parts
    modules = {a.shape: (a.module, a.phase) for a in count.at_peak}
    assert modules[20, 10] == ("first", "backward")
    assert modules[5, 20] == ("second", "backward")
    assert modules[()][0] == ""


def test_any_model_loss_and_optimizer_are_counted():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 20, bias=False)

        def forward(self, x, y):
            return {"one": self.linear(x), "other": [self.linear(y)]}

    def inputs():
        return torch.empty(4, 10), torch.empty(8, 10)

    count = count_step(Siamese(), inputs, optimizer=lambda p: torch.optim.SGD(p, 0.1), dtype=None)
    assert count.inputs == 4 * (40 + 80)
    assert count.flops == 2 * (2 * (800 + 1600))  # forward, and the gradients of the weight
    assert count.optimizer_state == 0
    half = count_step(Siamese(), inputs, lambda y: y["one"].square().sum(), dtype=None)
    assert half.flops == 2 * (800 + 1600 + 800)
    # The square keeps it until the gradient of the weight is there.
    assert half.split()[OUTPUTS] == 4 * 80


def test_what_the_forward_pass_lets_go_of_is_working_memory():
    class Wasteful(nn.Module):
        def forward(self, x):
            torch.cat([x] * 8)  # that nobody keeps
            return x * x

    x = torch.zeros(256, requires_grad=True)
    model = Wasteful()
    with Counter(model, inputs=[x]) as c:
        c.outputs([y := model(x)])
        y.sum().backward()
        count = c.result()
    assert count.step.operation == "aten.cat.default"
    assert [(a.nbytes, a.kind) for a in count.at_peak] == [(8 * KB, WORKING)]


def test_nothing_holds_the_model_when_the_count_is_done():
    def count():
        model = nn.Linear(4, 4)
        with Counter(model) as c:
            model(torch.zeros(2, 4)).sum().backward()
            c.result()
        return weakref.ref(model), weakref.ref(c)

    references = count()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_modules_are_told_apart_when_they_are_recomputed():
    class Recomputed(TwoLinear):
        def forward(self, x):
            # torch stops this recomputation with an exception, inside the second layer.
            return checkpoint(super().forward, x, use_reentrant=False)

    count = count_two_linear(Recomputed())
    gradients = {a.shape: a.module for a in count.at_peak if a.kind == GRADIENTS}
    assert gradients == {(20, 10): "first", (5, 20): "second"}
    # The first product is made twice, the second one not.
    assert count.flops == count_two_linear().flops + 2 * 800


def test_gradients_of_the_step_before_count_until_they_are_dropped():
    model = nn.Linear(16, 16, bias=False)  # 1 KB
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 16)).sum().backward()
    optimizer.step()
    with Counter(model, optimizer) as c:
        assert c.current == KB
        optimizer.zero_grad()
        assert c.current == 0
        model(torch.zeros(1, 16)).sum().backward()
        optimizer.step()
        count = c.result()
    assert count.weights == KB
    # Two averages of the weight's size, and the step's number.
    assert count.optimizer_state == 2 * KB + 4
    assert {a.kind for a in count.at_peak}.isdisjoint({WEIGHTS, OPTIMIZER, INPUTS})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@FAMILIES
def test_fake_tensors_are_counted_as_real_ones(cls, activations, dtype):
    model = cls(**NANO[cls], activations=activations)
    fake = count_step(model, lambda: torch.empty(2, 3, 64, 96), dtype=dtype)
    step = BackboneStep(cls(**NANO[cls], activations=activations), 2, (64, 96), dtype)
    step.run()
    step.release()
    with Counter(step.model, inputs=[step.images]) as c:
        step.run()
        real = c.result()
    assert fake.flops == real.flops
    assert fake.forward.flops == real.forward.flops
    assert (fake.weights, fake.inputs) == (real.weights, real.inputs)
    # Fake results can have other strides, which cost or save a copy, and fake statistics of a LayerNorm are
    # in bfloat16. Largest difference seen: 1.4 %, with "cached".
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


@FAMILIES
def test_skipping_arithmetic_leaves_the_count_unchanged(cls, monkeypatch):
    monkeypatch.setattr("rev_det.memory.skipping._LARGE", 1)
    counts = []
    for skip in (False, True):
        step = BackboneStep(cls(**NANO[cls]), 2, (64, 96), torch.bfloat16)
        with SkipArithmetic(step.model) if skip else nullcontext(), Counter(step.model) as c:
            step.run()
            counts.append(c.result())
    real, skipped = counts
    assert skipped.flops == real.flops
    if Version(torch.__version__) < Version("2.11"):
        # Of these, 2.6 to 2.9 were tried: in the backward pass of RevMViT the CPU takes a buffer more.
        assert skipped.peak == pytest.approx(real.peak, rel=0.03)
        return
    assert skipped.peak == real.peak
    assert skipped.split() == real.split()


def test_skipped_arithmetic_gives_zeros_of_the_same_form():
    x = torch.randn(3, 300, 200).transpose(1, 2)
    weight = torch.randn(50, 300)
    expected = nn.functional.linear(x, weight)
    with SkipArithmetic(nn.Identity()):
        y = nn.functional.linear(x, weight)
        small = torch.randn(2, 2) @ torch.ones(2, 2)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert not y.any() and not small.any()
    assert torch.equal(nn.functional.linear(x, weight), expected)


def test_attention_is_counted_on_the_cpu_too():
    q, k = torch.zeros(2, 3, 10, 8, requires_grad=True), torch.zeros(2, 3, 7, 8, requires_grad=True)
    with counter() as c:
        y = nn.functional.scaled_dot_product_attention(q, k, k)
        assert c.cost.flops == 2 * 2 * (2 * 3 * 10 * 7 * 8)
        y.sum().backward()
    # Backward: the scores again, and two products each for queries and keys, and values and scores.
    assert c.cost.flops == (2 + 5) * 2 * (2 * 3 * 10 * 7 * 8)
