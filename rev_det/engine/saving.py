"""When a run saves its state, which files it keeps, and evaluation between saving and going on."""

from __future__ import annotations

import contextlib
import glob
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..files import whole_file
from ..stopping import Interrupted

if TYPE_CHECKING:
    from ..checkpoint import RevCheckpointer

logger = logging.getLogger(__name__)

_PERIODIC = re.compile(r"model_(\d{7})\.pth")
FINAL, BEST = "model_final", "model_best"


class SaveState(HookBase):
    """Saves the state of a run periodically, at its end, and when it is asked to stop.

    Files are named as Detectron2 names them: ``model_0004999.pth`` after 5000 iterations, and at the end
    ``model_final.pth``. To be registered on all processes; the first one writes.

    Args:
        period: iterations from one checkpoint to the next.
        keep: how many periodic checkpoints to keep; 0 for all.
    """

    def __init__(self, period: int, keep: int = 0):
        self._period = period
        self._keep = keep
        self._saved: tuple[int, str] | None = None  # iteration and file of the last checkpoint

    def before_train(self) -> None:
        trainer = self.trainer
        if not comm.is_main_process():
            return
        # A process that was killed while it wrote leaves this behind.
        for path in glob.glob(os.path.join(glob.escape(self._folder), ".part-*")):
            os.unlink(path)
        if trainer.start_iter >= trainer.max_iter and trainer.checkpointer.has_checkpoint():
            last = trainer.checkpointer.get_checkpoint_file()
            logger.log(
                logging.WARNING if trainer.start_iter > trainer.max_iter else logging.INFO,
                "%s is at iteration %d, SOLVER.MAX_ITER is %d: nothing is left to train",
                last,
                trainer.start_iter,
                trainer.max_iter,
            )
            # Under a longer schedule it was not the end, and not saved as such.
            _link_or_copy(last, self.final_file)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or done % self._period == 0 or self.trainer.stopping:
            self.save()

    def save(self) -> str:
        """Save the state after the present iteration, unless that is done.

        Returns:
            the file.
        """
        iteration = self.trainer.iter
        if self._saved is None or self._saved[0] != iteration:
            name = FINAL if iteration + 1 >= self.trainer.max_iter else f"model_{iteration:07d}"
            self.trainer.checkpointer.save(name, iteration=iteration)
            self._saved = iteration, os.path.join(self._folder, f"{name}.pth")
            if comm.is_main_process() and self._keep:
                self._remove_old()
        return self._saved[1]

    @property
    def final_file(self) -> str:
        """The file of the state at the end of training."""
        return os.path.join(self._folder, f"{FINAL}.pth")

    @property
    def _folder(self) -> str:
        return self.trainer.checkpointer.save_dir

    def _remove_old(self) -> None:
        found = sorted(name for name in os.listdir(self._folder) if _PERIODIC.fullmatch(name))
        # Later ones belong to an earlier run in the same folder, which is not ours to tidy.
        own = [name for name in found if int(_PERIODIC.fullmatch(name)[1]) <= self.trainer.iter]
        for name in own[: -self._keep]:
            os.unlink(os.path.join(self._folder, name))


class StopWhenAsked(HookBase):
    """Ends a run that was asked to stop; to be registered behind `SaveState`, which has saved it then."""

    def after_step(self) -> None:
        if self.trainer.stopping and self.trainer.iter + 1 < self.trainer.max_iter:
            # The processes end together: the first to end would take the others with it.
            comm.synchronize()
            raise Interrupted(self.trainer.stop_signal)


class EvaluateSaved(EvalHook):
    """Detectron2's evaluation, before which the state is saved: being killed in it costs nothing.

    A run that is resumed where an evaluation was due evaluates first. The checkpoint whose result is the best
    so far is kept as ``model_best.pth``.

    Args:
        period: iterations from one evaluation to the next; 0 for the end of training alone.
        function: returns metrics by task; on processes but the first it may return nothing.
        saving: the hook that saves, registered before this one.
        best_metric: name of the metric that decides, "task/metric", greater is better; with several datasets
            that of the first of them.
    """

    __qualname__ = "Evaluation"  # Detectron2 keeps the state of a hook under this name

    def __init__(self, period: int, function: Any, saving: SaveState, best_metric: str):
        self._saving = saving
        self._best_metric = best_metric
        self._missing_metric_told = False
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}

        def remember() -> Any:
            results = function()
            self.latest = {name: float(v) for name, v in flatten_results_dict(results or {}).items()}
            return results

        super().__init__(period, remember)

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if 0 < start < self.trainer.max_iter and self._period > 0 and start % self._period == 0:
            logger.info("Evaluating the state after iteration %d before going on", start - 1)
            # Its metrics belong to the iteration they would have come from.
            self.trainer.storage.iter = start - 1
            self._evaluate(self.trainer.checkpointer.get_checkpoint_file(), start - 1)
            self.trainer.storage.iter = start

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done < self.trainer.max_iter:
            self._evaluate(self._saving.save(), self.trainer.iter)

    def after_train(self) -> None:
        # Also called when training failed or was interrupted.
        if self.trainer.iter >= self.trainer.max_iter:
            self._evaluate(self._saving.final_file, self.trainer.max_iter - 1)
        # It holds the trainer, which holds this hook.
        del self._func

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best} if self.best else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = dict(state["best"])

    def _evaluate(self, checkpoint: str, iteration: int) -> None:
        """Evaluate the state after an iteration, which is saved in the file ``checkpoint``."""
        self.latest = {}
        # Who is asked to stop ends here, and the others with it: the first process must have saved.
        comm.synchronize()
        with self.trainer.stop_request.ending_at_once():
            self._do_eval()
        if not comm.is_main_process():
            return
        names = [name for name in self.latest if f"/{name}".endswith(f"/{self._best_metric}")]
        if self.latest and not names and not self._missing_metric_told:
            self._missing_metric_told = True
            logger.warning(
                "TEST.BEST_METRIC is %r, which the evaluation did not give, so that none is kept as the best "
                "checkpoint; there are %s",
                self._best_metric,
                ", ".join(name for name in self.latest if "/AP-" not in name),
            )
        if names and self.latest[names[0]] > self.best.get("value", -math.inf):
            self.best = {"value": self.latest[names[0]], "iteration": iteration}
            path = os.path.join(os.path.dirname(checkpoint), f"{BEST}.pth")
            if checkpoint != path:
                _link_or_copy(checkpoint, path)
            logger.info(
                "%s %.3f is the best so far, its checkpoint is kept as %s", names[0], self.best["value"], path
            )


def unwritable(error: OSError, checkpointer: RevCheckpointer) -> OSError:
    """What could not be written, and which state is left."""
    last = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else "none"
    return OSError(f"{error}; the last checkpoint is {last}. Make room and go on with --resume")


def _link_or_copy(source: str, path: str) -> None:
    """Give a file another name, in one step; as a copy where the file system has no links."""
    # A resumed run evaluates once more. Between two names of one file a rename would do nothing.
    if os.path.exists(path) and os.path.samefile(source, path):
        return
    with whole_file(path) as part:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
