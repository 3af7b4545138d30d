"""One optimizer step: forward, backward, clipping and update, in any precision and on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from .amp import Precision


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with mixed precision on CUDA and CPU, and clipping of true gradients.

    Its ``AMPTrainer`` demands CUDA, and Detectron2 clips inside ``optimizer.step``, where float16
    gradients are still multiplied by the loss scale.

    Args:
        model: maps a batch to a dictionary of scalar losses; on several processes, wrapped for them.
        data_loader: yields batches without end.
        optimizer: over the model's trainable parameters.
        precision: of forward and backward.
        clip_gradients: changes the gradients of the given parameters in place; None to leave them.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip_gradients: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.precision = precision
        self.clip_gradients = clip_gradients
        self.grad_scaler = precision.grad_scaler()

    def run_step(self) -> None:
        """Train on the next batch.

        Raises:
            FloatingPointError: on every process, when a loss of any of them is infinite or NaN. Parameters
                and optimizer are then as the previous step left them.
        """
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with self.precision.autocast():
            losses = self.model(data)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()

        require_finite(losses, self.iter)
        self._write_metrics(losses, data_time)

        if self.clip_gradients is not None:
            self.grad_scaler.unscale_(self.optimizer)
            self.clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # A disabled scaler has an empty state, which an enabled one refuses: AMP was switched on or off.
        if state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def require_finite(losses: Mapping[str, Tensor], iteration: int) -> None:
    """Stop every process when a loss is infinite or NaN on any of them.

    Detectron2's own check raises on the first process alone, and leaves the others waiting for it.

    Args:
        losses: scalars of this process, by name.
        iteration: for the message.

    Raises:
        FloatingPointError: naming the iteration and this process's losses.
    """
    bad = torch.stack([~torch.isfinite(loss.detach()).all() for loss in losses.values()]).any().float()
    if comm.get_world_size() > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    if bad.item():
        values = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
        raise FloatingPointError(
            f"a loss became infinite or NaN at iteration {iteration}, on process {comm.get_rank()} they are: "
            f"{values}; a lower SOLVER.BASE_LR or SOLVER.CLIP_GRADIENTS may help"
        )
