"""One optimizer step."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.utils import clip_grad_norm_

from rev_det.engine import Precision, TrainStep


class TwoLosses(nn.Module):
    """Maps a batch (B, 3) to two losses; the second is multiplied by ``scale``."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"loss_a": y.square().mean(), "loss_b": self.scale * y.abs().mean()}


BATCH = torch.tensor([[1.0, 2.0, 3.0], [3.0, -1.0, 5.0]])


def clip_to_half(parameters):
    clip_grad_norm_(parameters, 0.5)


FLOAT32 = Precision("cpu")


def make_step(model: nn.Module, precision: Precision = FLOAT32, clip=clip_to_half) -> TrainStep:
    return TrainStep(model, [BATCH] * 3, torch.optim.SGD(model.parameters(), lr=0.1), precision, clip)


def run(step: TrainStep, iterations: int = 1) -> EventStorage:
    with EventStorage() as storage:
        for step.iter in range(iterations):
            step.run_step()
    return storage


def by_hand(model: nn.Module) -> nn.Module:
    """One clipped step of gradient descent, without any of the trainer's parts."""
    model = copy.deepcopy(model)
    sum(model(BATCH).values()).backward()
    clip_to_half(list(model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_step_is_clipped_gradient_descent_on_the_sum_of_losses():
    model = TwoLosses()
    expected = by_hand(model)
    storage = run(make_step(model))
    assert_same(model, expected)
    losses = [storage.history(name).latest() for name in ("loss_a", "loss_b", "total_loss")]
    assert losses[0] + losses[1] == pytest.approx(losses[2])


def test_a_loss_scale_changes_neither_the_step_nor_the_clipping():
    model = TwoLosses()
    expected = by_hand(model)
    step = make_step(model)
    # The same scaler that float16 gets on CUDA; torch's works on the CPU as well.
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    run(step)
    assert_same(model, expected)


def test_without_a_clipper_gradients_are_left_alone():
    model = TwoLosses()
    start = copy.deepcopy(model)
    run(make_step(model, clip=None))
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert moved.sqrt() > 0.1 * 0.5 * 2


def test_forward_runs_in_the_chosen_precision_and_parameters_stay_float32():
    model, seen = TwoLosses(), []
    model.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run(make_step(model, Precision("cpu", torch.bfloat16)))
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    model = TwoLosses(scale=value)
    start = copy.deepcopy(model)
    with pytest.raises(
        FloatingPointError, match="iteration 0, on process 0 they are: loss_a .*, loss_b (nan|inf)"
    ):
        run(make_step(model))
    assert_same(model, start)


def test_the_state_of_optimizer_and_loss_scale_is_restored():
    first = make_step(TwoLosses())
    first.optimizer = torch.optim.AdamW(first.model.parameters(), lr=0.1)
    first.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
    run(first)
    state = copy.deepcopy(first.state_dict())
    second = make_step(copy.deepcopy(first.model))
    second.optimizer = torch.optim.AdamW(second.model.parameters(), lr=0.1)
    second.grad_scaler = torch.amp.GradScaler("cpu")
    second.load_state_dict(state)
    assert second.grad_scaler.get_scale() == 2.0**13
    # The second moments are part of what the next step does.
    run(first)
    run(second)
    assert_same(first.model, second.model)


def test_a_run_without_a_loss_scale_can_go_on_with_one():
    state = make_step(TwoLosses()).state_dict()
    step = make_step(TwoLosses())
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    step.load_state_dict(state)
    assert step.grad_scaler.get_scale() == 2.0**12
