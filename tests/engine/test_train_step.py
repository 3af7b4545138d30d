"""One optimizer step."""

import copy
import functools
import json
import re

import pytest
import torch
from detectron2.layers import ciou_loss
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss
from torch import nn
from torch.nn.utils import clip_grad_norm_

from rev_det.engine import Precision, TrainStep
from rev_det.engine.optimizer import total_norm
from rev_det.engine.train_step import NonFiniteError


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
    return clip_grad_norm_(parameters, 0.5)


FLOAT32 = Precision("cpu")


def make_step(
    model: nn.Module, precision: Precision = FLOAT32, clip=clip_to_half, batches=(BATCH,) * 3, **options
) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainStep(model, batches, optimizer, precision, clip, **options)


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
        FloatingPointError, match=r"iteration 0: loss_b is (nan|inf) for a batch \(process 0\)"
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


@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_accumulated_batches_make_the_step_of_the_big_batch(scale):
    big, small = TwoLosses(), TwoLosses()
    # Without clipping and with plain descent, which both would hide that a gradient has the wrong length.
    parts = [BATCH[:1], BATCH[1:]] * 3
    steps = [make_step(big, clip=total_norm)]
    steps.append(make_step(small, clip=total_norm, batches=parts, accumulate=2))
    for step in steps:
        if scale:
            step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for group in step.optimizer.param_groups:
            group["lr"] = 0.01
    one, two = (run(step, iterations=3) for step in steps)
    assert_same(big, small)
    for name in ("loss_a", "loss_b", "total_loss"):
        assert one.history(name).latest() == pytest.approx(two.history(name).latest())


class NoGradient(nn.Module):
    """A finite loss with a gradient that is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.sqrt().sum()}


@pytest.mark.parametrize("clip", [clip_to_half, total_norm])
def test_a_gradient_that_is_not_finite_stops_before_the_update(clip):
    model = NoGradient()
    with pytest.raises(NonFiniteError, match="the losses are finite but not their gradient"):
        run(make_step(model, clip=clip))
    assert model.weight.item() == 0


def infinite_at(*iterations: int, of: int) -> list[torch.Tensor]:
    return [BATCH * float("inf") if i in iterations else BATCH for i in range(of)]


def test_with_a_loss_scale_steps_that_overflow_are_skipped():
    model = TwoLosses()
    expected = by_hand(by_hand(model))
    step = make_step(model, batches=infinite_at(1, of=3))
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    storage = run(step, iterations=3)
    assert_same(model, expected)
    assert storage.history("grad_scale").latest() == 2.0**11
    assert [i for _, i in storage.history("total_loss").values()] == [0, 2]


def test_with_a_loss_scale_too_many_skipped_steps_in_a_row_stop():
    step = make_step(TwoLosses(), batches=infinite_at(0, 2, 3, 4, of=5), max_skipped_steps=2)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with pytest.raises(NonFiniteError, match="iteration 4 after 2 skipped steps: loss_a is (inf|nan)"):
        run(step, iterations=5)
    assert step.iter == 4


class OfRecords(TwoLosses):
    """`TwoLosses` of a batch in Detectron2's format."""

    def forward(self, records: list[dict]) -> dict[str, torch.Tensor]:
        return super().forward(torch.stack([record["image"] for record in records]))


def test_what_failed_is_told_with_its_images():
    good, bad = BATCH[0], BATCH[1] * float("nan")
    batches = [
        [{"image": good, "file_name": "a.jpg"}, {"image": good, "file_name": "b.jpg"}],
        [{"image": good, "file_name": "c.jpg"}, {"image": bad, "file_name": "d.jpg"}],
    ]
    with pytest.raises(NonFiniteError) as caught:
        run(make_step(OfRecords(), batches=batches, accumulate=2))
    assert "iteration 0: loss_a is nan, loss_b is nan for c.jpg, d.jpg (process 0)" in str(caught.value)
    assert "a.jpg" not in str(caught.value)
    (process,) = caught.value.report["processes"]
    assert process["images"] == [["a.jpg", "b.jpg"], ["c.jpg", "d.jpg"]]
    assert [losses["loss_a"] == "nan" for losses in process["losses"]] == [False, True]
    assert json.loads(json.dumps(caught.value.report)).keys() == caught.value.report.keys()


class WithBoxes(TwoLosses):
    """Hands boxes that are not finite to what Cascade R-CNN does with them, or an IoU loss."""

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.use(self.linear(x).expand(-1, 4) * float("nan"))
        return super().forward(x)


@pytest.mark.parametrize(
    "use, said",
    [
        (lambda boxes: Boxes(boxes.detach()).clip((8, 8)), "Box tensor contains infinite or NaN!"),
        (lambda boxes: giou_loss(boxes, torch.ones(2, 4)), "bad box: x1 larger than x2"),
        (lambda boxes: ciou_loss(boxes, torch.ones(2, 4)), "bad box: x1 larger than x2"),
    ],
)
def test_what_detectron2_asserts_of_boxes_is_a_step_that_is_not_finite(use, said):
    told = f"iteration 0: the model raised {said!r} for a batch"
    with pytest.raises(NonFiniteError, match=re.escape(told)):
        run(make_step(WithBoxes(use)))
    step = make_step(WithBoxes(use), max_skipped_steps=1)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with pytest.raises(NonFiniteError, match="iteration 1 after 1 skipped steps"):
        run(step, iterations=2)
    assert step.grad_scaler.get_scale() == 2.0**11


def test_other_errors_of_a_model_are_left_alone():
    def use(boxes):
        raise AssertionError("Instance annotations are missing in training!")

    model = WithBoxes(use)
    model.forward = forward = functools.partial(WithBoxes.forward, model)  # as torch.compile leaves one
    with pytest.raises(AssertionError, match="^Instance annotations"):
        run(make_step(model))
    assert model.forward is forward


@pytest.mark.parametrize("clip", [clip_to_half, total_norm])
def test_a_fused_optimizer_takes_the_step_of_an_ordinary_one_under_a_loss_scale(clip):
    ordinary, fused = TwoLosses(), TwoLosses()
    steps = [make_step(model, clip=clip, batches=infinite_at(1, of=4)) for model in (ordinary, fused)]
    for step in steps:
        is_fused = step.model is fused or None
        step.optimizer = torch.optim.AdamW(step.model.parameters(), lr=0.1, fused=is_fused)
        # torch's scaler hands its scale to a fused optimizer, which must not divide by it once more.
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        run(step, iterations=4)
        assert step.grad_scaler.get_scale() == 2.0**11
    assert_same(ordinary, fused)
    assert {int(state["step"]) for state in steps[1].optimizer.state.values()} == {3}


def test_a_request_to_stop_is_known_after_the_step():
    step = make_step(TwoLosses())
    run(step)
    assert not step.stopping
    step = make_step(TwoLosses(), stop_requested=lambda: True)
    run(step)
    assert step.stopping
