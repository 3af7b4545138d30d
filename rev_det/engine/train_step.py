"""One optimizer step: forward, backward, clipping and update, in any precision and on any device."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import TrainLoader
from .amp import Precision
from .optimizer import GradientClipper, total_norm

# What Detectron2 and fvcore assert of boxes (Cascade R-CNN's, and those of IoU losses) that NaN fails.
_ASSERTED_FINITE = ("Box tensor contains infinite or NaN", "bad box:")


class NonFiniteError(FloatingPointError):
    """Training cannot go on because losses or gradients are infinite or NaN.

    Attributes:
        report: plain data, the same on every process: the iteration, and for each process the losses of its
            batches, their images, and the errors that the model raised instead of giving losses.
    """

    def __init__(self, message: str, report: dict[str, Any]):
        super().__init__(message)
        self.report = report


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with mixed precision on CUDA and CPU, accumulation and exact resuming.

    Its ``AMPTrainer`` demands CUDA, and Detectron2 clips inside ``optimizer.step``, where float16
    gradients are still multiplied by the loss scale.

    What a step draws at random follows from the seed of a `TrainLoader`, the iteration and the process alone:
    a run that is resumed draws what it would have drawn. With other loaders generators are left alone.

    Args:
        model: maps a batch to a dictionary of scalar losses; on several processes, wrapped for them.
        data_loader: yields batches without end.
        optimizer: over the model's trainable parameters.
        precision: of forward and backward.
        clip_gradients: changes the gradients of the given parameters in place and returns the norm they had.
        accumulate: batches of one step. The gradient is the mean over them.
        max_skipped_steps: float16 alone: how many steps in a row may overflow and be skipped.
        stop_requested: asked once in every step.

    Attributes:
        stopping: whether ``stop_requested`` said so on any of the processes, which all know it then.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip_gradients: GradientClipper = total_norm,
        *,
        accumulate: int = 1,
        max_skipped_steps: int = 20,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        super().__init__(model, data_loader, optimizer)
        self.precision = precision
        self.clip_gradients = clip_gradients
        self.accumulate = accumulate
        self.max_skipped_steps = max_skipped_steps
        self.grad_scaler = precision.grad_scaler()
        self.stopping = False
        self._stop_requested = stop_requested
        self._skipped = 0
        self._first = True
        # The loader's state after the last complete step: a step that fails has not been.
        self._position = self._loader_state()

    def run_step(self) -> None:
        """Train on the next batches.

        Raises:
            NonFiniteError: on every process, when a loss or gradient of any of them is infinite or NaN, or
                its model raises because of them; with float16 only after too many such steps in a row.
                Parameters and optimizer are then as the last good step left them.
        """
        self._seed_draws()
        self.optimizer.zero_grad()
        passes: list[_Pass] = []
        data_time = 0.0
        for index in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._synchronisation(last=index == self.accumulate - 1):
                passes.append(self._forward_backward(data))
            del data
        self._first = False
        self.after_backward()

        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = self.clip_gradients(parameters)
        if self._agree(passes, norm):
            self._write_metrics(_mean([one.losses for one in passes]), data_time)
            self._skipped = 0
            self.grad_scaler.step(self.optimizer)
        else:
            self._skip(passes, norm)
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled():
            get_event_storage().put_scalar("grad_scale", self.grad_scaler.get_scale(), smoothing_hint=False)
        self._position = self._loader_state()

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}
        return state if self._position is None else {**state, "data_loader": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # A disabled scaler has an empty state, which an enabled one refuses: AMP was switched on or off.
        if state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if self._position is not None and "data_loader" in state_dict:
            self.data_loader.load_state_dict(state_dict["data_loader"])
            self._position = self._loader_state()

    def _forward_backward(self, data: Any) -> _Pass:
        with self.precision.autocast(), _nan_for_non_finite_errors(self.model) as errors:
            losses = self.model(data)
            total = sum(losses.values()) / self.accumulate
        self.grad_scaler.scale(total).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        return _Pass(_image_names(data), losses, "".join(errors))

    def _synchronisation(self, last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients in the last backward pass of a step only."""
        model = self.model
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        # A static graph is recorded in the first step, which must not be without synchronisation.
        if model.static_graph and self._first:
            return contextlib.nullcontext()
        return model.no_sync()

    def _agree(self, passes: Sequence[_Pass], norm: Tensor) -> bool:
        """Whether all is finite on all processes; in the same breath they learn of requests to stop."""
        losses = [loss for one in passes for loss in one.losses.values()]
        finite = torch.stack([torch.isfinite(loss).all() for loss in losses]).all()
        bad = ~(finite & torch.isfinite(norm))
        flags = torch.stack([bad.float(), torch.tensor(float(self._stop_requested()), device=bad.device)])
        if comm.get_world_size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        is_bad, self.stopping = map(bool, flags.tolist())
        return not is_bad

    def _skip(self, passes: Sequence[_Pass], norm: Tensor) -> None:
        """Go on without this step where that may help, which is to say with float16 and not for ever."""
        self._skipped += 1
        if self.grad_scaler.is_enabled() and self._skipped <= self.max_skipped_steps:
            return
        own = {
            "losses": [{name: _plain(loss) for name, loss in one.losses.items()} for one in passes],
            "errors": [one.error for one in passes],
            "images": [one.images for one in passes],
            "gradient_norm": _plain(norm),
        }
        report = {
            "iteration": self.iter,
            "skipped_steps": self._skipped - 1,
            "processes": comm.all_gather(own),
        }
        raise NonFiniteError(_describe(report), report)

    def _seed_draws(self) -> None:
        if self._position is None:
            return
        key = (self._position["seed"], self.iter, comm.get_rank())
        words = np.random.SeedSequence(key).generate_state(4)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        random.seed(int(words[2]))
        np.random.seed(words[3])

    def _loader_state(self) -> dict[str, int] | None:
        return copy.copy(self.data_loader.state_dict()) if isinstance(self.data_loader, TrainLoader) else None


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass of a step.

    Attributes:
        images: names of the batch's.
        losses: by name, without their graph.
        error: with which the model ended its forward pass, for numbers that are not finite; else empty.
    """

    images: list[str]
    losses: dict[str, Tensor]
    error: str


@contextlib.contextmanager
def _nan_for_non_finite_errors(model: nn.Module) -> Iterator[list[str]]:
    """Have a model return a loss that is NaN where it would raise because numbers are not finite.

    Detectron2 raises in the middle of the forward pass of one process, for whose gradients the others would
    wait for ever. This acts inside DistributedDataParallel, and the loss depends on all parameters: their
    gradients become NaN on every process. (SyncBatchNorm behind what raises is not helped: there they wait.)

    Yields:
        the messages of what would have been raised.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    forward, own, messages = model.forward, vars(model).get("forward"), []

    def guarded(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        try:
            return forward(*args, **kwargs)
        except (FloatingPointError, AssertionError) as error:
            if not isinstance(error, FloatingPointError) and not str(error).startswith(_ASSERTED_FINITE):
                raise
            messages.append(str(error))
            return {"loss": math.nan * sum(p.sum() for p in model.parameters() if p.requires_grad)}

    model.forward = guarded
    try:
        yield messages
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _mean(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([batch[name] for batch in losses]).mean() for name in losses[0]}


def _plain(x: Tensor) -> float | str:
    """A scalar as JSON has it: "nan" and "inf" are no numbers there."""
    return x.item() if math.isfinite(x.item()) else str(x.item())


def _image_names(batch: Any) -> list[str]:
    """Files, or ids, of the images of a batch in Detectron2's format; of others nothing is known."""
    records = [record for record in batch if isinstance(record, Mapping)] if isinstance(batch, list) else []
    return [str(record.get("file_name", record.get("image_id", "unknown"))) for record in records]


def _describe(report: Mapping[str, Any]) -> str:
    """In one line which losses of which images are not finite, and what may help."""
    found = []
    for rank, process in enumerate(report["processes"]):
        keys = ("losses", "errors", "images")
        for losses, error, images in zip(*(process[key] for key in keys), strict=True):
            bad = [f"{name} is {value}" for name, value in losses.items() if isinstance(value, str)]
            bad = [f"the model raised {error!r}"] if error else bad
            if bad:
                found.append(f"{', '.join(bad)} for {', '.join(images) or 'a batch'} (process {rank})")
    if not found:
        images = [name for process in report["processes"] for batch in process["images"] for name in batch]
        found = [f"the losses are finite but not their gradient, for {', '.join(images) or 'a batch'}"]
    after = f" after {report['skipped_steps']} skipped steps" if report["skipped_steps"] else ""
    return (
        f"iteration {report['iteration']}{after}: {'; '.join(found)}. The parameters are those of the step "
        "before. A lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help"
    )
