"""Training and evaluation of any Detectron2 detector, with rev_det's optimizer, precision and data."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from ..checkpoint import RevCheckpointer
from ..data import RevCOCOEvaluator, TrainLoader, build_test_loader, build_train_loader
from ..devices import device_settings
from ..files import DISK_ERRORS, UnwritableError, write_json
from ..stopping import StopRequest
from .amp import Precision
from .build import build_detector
from .evaluation import evaluate_with_augmentation, evaluating
from .hooks import Progress, Summary, show_predictions
from .inversion import InversionCheck
from .metrics import MetricsWriter
from .optimizer import build_gradient_clipper, build_optimizer
from .processes import under_torchrun
from .saving import EvaluateSaved, SaveState, StopWhenAsked, unwritable
from .train_step import NonFiniteError, TrainStep

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Values of SOLVER.DDP.COMPRESSION, and the hooks that do it.
COMPRESSION = {
    "none": None,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
}


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for one process or many, on CUDA or the CPU, in any precision.

    Its constructor fails with several processes on the CPU and has no room for another checkpointer or
    training step, so this one builds the same parts itself. Hooks, schedules and ``build_*`` are Detectron2's
    unless overridden here.

    Args:
        cfg: a config with rev_det's keys whose datasets are registered, as ``load_config`` returns it.

    Raises:
        ValueError: a part of the config cannot be built.
    """

    def __init__(self, cfg: CfgNode):
        # Past DefaultTrainer.__init__, on purpose: see above.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        precision = Precision.from_config(cfg)
        logger.info("Training in %s", precision)

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        if not isinstance(data_loader, TrainLoader):
            logger.warning(
                "build_train_loader returned a %s: a resumed run will begin its data anew, and each batch of "
                "all processes must hold SOLVER.IMS_PER_BATCH / SOLVER.ACCUMULATE = %d images",
                type(data_loader).__name__,
                cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE,
            )
        model = wrap_model(model, cfg)
        self.stop_request = StopRequest(second_ends=not under_torchrun())
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            precision,
            build_gradient_clipper(cfg),
            accumulate=cfg.SOLVER.ACCUMULATE,
            max_skipped_steps=cfg.SOLVER.AMP.MAX_SKIPPED_STEPS,
            stop_requested=self.stop_request,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RevCheckpointer.of_run(cfg, model, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def stopping(self) -> bool:
        """Whether a process was asked to stop: the state is saved, and all end after this iteration."""
        return self._trainer.stopping

    @property
    def stop_signal(self) -> int:
        """The signal that asked for it, if it was sent to this process."""
        return self.stop_request.number or signal.SIGTERM

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint in ``OUTPUT_DIR`` and all that belongs to it, or else ``MODEL.WEIGHTS``.

        Args:
            resume: prefer the last checkpoint, if there is one.

        Raises:
            ValueError: the processes have found different checkpoints.
        """
        if not resume and self.checkpointer.has_checkpoint():
            logger.warning(
                "OUTPUT_DIR, %s, holds checkpoints of an earlier run; without --resume this run starts anew, "
                "and they are what --resume would continue until this run has saved one of its own",
                self.cfg.OUTPUT_DIR,
            )
        super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise ValueError(
                f"the processes would resume at iterations {', '.join(map(str, starts))}: OUTPUT_DIR, "
                f"{self.cfg.OUTPUT_DIR}, must be the same folder on all machines, on a disk that they share"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        configured = self._learning_rates()
        # Torch takes over whatever the groups hold, and fails in the first step.
        group = state_dict["_trainer"]["optimizer"]["param_groups"][0]
        if ("betas" in group) != ("betas" in self.optimizer.defaults):
            raise ValueError(f"SOLVER.OPTIMIZER is {self.cfg.SOLVER.OPTIMIZER!r}, and was another")
        super().load_state_dict(state_dict)
        if (restored := self._learning_rates()) != configured:
            logger.warning(
                "The learning rates of the run that is resumed, at most %g, are kept, and not those of this "
                "config, at most %g: for these start a new run, with its weights as MODEL.WEIGHTS",
                max(restored),
                max(configured),
            )

    def _learning_rates(self) -> list[float]:
        """Of each group of parameters, before the schedule changes them."""
        return [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]

    def train(self) -> Any:
        """Train from ``start_iter`` to ``max_iter``.

        Returns:
            as ``DefaultTrainer.train``.

        Raises:
            Interrupted: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) came; the state is saved, to be resumed.
            KeyboardInterrupt: a second SIGINT came.
            NonFiniteError: a loss or gradient is infinite or NaN; the state before it is saved, and what led
                to it is described in ``non_finite.json``.
            OSError: something cannot be written, for instance because the disk is full.
        """
        # Hooks of a subclass may be others: who cannot stop in order must not be deaf to being stopped.
        can_stop = any(isinstance(hook, StopWhenAsked) for hook in self._hooks)
        os.makedirs(self.cfg.OUTPUT_DIR, exist_ok=True)
        try:
            with (
                self.stop_request.listening() if can_stop else contextlib.nullcontext(),
                device_settings(self.cfg),
            ):
                return super().train()
        except UnwritableError as error:
            raise unwritable(error, self.checkpointer) from error
        except OSError as error:
            # What Detectron2 and tensorboard write has no name in the error.
            if error.errno not in DISK_ERRORS:
                raise
            named = f"a file in {self.cfg.OUTPUT_DIR} cannot be written: {error}"
            raise unwritable(OSError(named), self.checkpointer) from error

    def after_train(self) -> None:
        # Of a run that is resumed at its end, Detectron2 counts an iteration more than there were.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def run_step(self) -> None:
        try:
            super().run_step()
        except NonFiniteError as error:
            files = self._save_last_good(error)
            raise NonFiniteError(f"{error}. {files}", error.report) from error

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, of which saving and evaluating are this project's; summary and pictures when
        everything else is done."""
        cfg = self.cfg
        saving = SaveState(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP)
        evaluation = EvaluateSaved(
            cfg.TEST.EVAL_PERIOD, self._evaluate_for_hook, saving, cfg.TEST.BEST_METRIC
        )
        replaced = (hooks.PeriodicCheckpointer, hooks.EvalHook)
        defaults = [h for h in super().build_hooks() if h is not None and not isinstance(h, replaced)]
        writers = [hook for hook in defaults if isinstance(hook, hooks.PeriodicWriter)]
        return [
            *(hook for hook in defaults if hook not in writers),
            Progress(),
            InversionCheck(cfg.MODEL.REV.INVERSION_PERIOD, cfg.MODEL.REV.INVERSION_THRESHOLD),
            saving,
            StopWhenAsked(),
            evaluation,
            *writers,
            Summary(evaluation),
        ]

    def build_writers(self) -> list[EventWriter]:
        """As Detectron2: the progress line, ``metrics.json`` and tensorboard, none of which writes yet."""
        folder = self.cfg.OUTPUT_DIR
        metrics = MetricsWriter(os.path.join(folder, "metrics.json"))
        return [CommonMetricPrinter(self.max_iter), metrics, TensorboardXWriter(folder)]

    def _evaluate_for_hook(self) -> dict[str, Any]:
        # DefaultTrainer compares these with TEST.EXPECTED_RESULTS after training.
        self._last_eval_results = self.test(self.cfg, self.model)
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            show_predictions(self)
        return self._last_eval_results

    def _save_last_good(self, error: NonFiniteError) -> str:
        """Save what is known of a failed step, and the state before it; say where."""
        report = os.path.join(self.cfg.OUTPUT_DIR, "non_finite.json")
        failed = self.iter
        self.iter -= 1
        try:
            if comm.is_main_process():
                write_json(report, error.report)
            self.checkpointer.save("model_last_good", iteration=self.iter)
        except OSError as problem:
            return f"The state before it: {unwritable(problem, self.checkpointer)}"
        finally:
            self.iter = failed
            # The first to end takes the others with it, which must not be the one that writes.
            comm.synchronize()
        return f"Losses and images of the step are in {report}; --resume repeats it from model_last_good.pth"

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_detector(cfg)
        # As Detectron2's trainer does: its logger shows it in log.txt, and not on the console.
        logging.getLogger("detectron2").info("Model:\n%s", model)
        logger.info("The model has %.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Batches of a single forward: ``IMS_PER_BATCH`` images are ``ACCUMULATE`` of them."""
        return build_train_loader(cfg, total_batch_size=cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO's box and mask AP; predictions are kept below ``OUTPUT_DIR/inference``."""
        return RevCOCOEvaluator(
            dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        )

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate a model on ``DATASETS.TEST``, in the precision it is trained in.

        Args:
            cfg: a config with rev_det's keys.
            model: with the weights to evaluate.
            evaluators: one per dataset; None for those of ``build_evaluator``.

        Returns:
            metrics by task (by dataset and task, if there are several datasets); AP from 0 to 100. Empty
            on all processes but the first.
        """
        with evaluating(cfg, model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """`test`, and if ``TEST.AUG.ENABLED`` also with test-time augmentation (tasks end in "_TTA")."""
        results = cls.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(evaluate_with_augmentation(cls, cfg, model))
        return results


def wrap_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """The model itself in a single process, else in ``DistributedDataParallel`` as ``SOLVER.DDP`` says.

    Args:
        model: on the device of this process.
        cfg: as ``load_config`` returns it.
    """
    ddp = cfg.SOLVER.DDP
    on_cpu = next(model.parameters()).device.type == "cpu"
    # Detectron2 names a device unless told not to, and the CPU must not be named.
    device_ids = {"device_ids": None} if on_cpu else {}
    wrapped = create_ddp_model(
        model,
        broadcast_buffers=False,
        find_unused_parameters=ddp.FIND_UNUSED_PARAMETERS,
        static_graph=ddp.STATIC_GRAPH,
        **device_ids,
    )
    hook = COMPRESSION[ddp.COMPRESSION]
    if hook is not None and wrapped is not model:
        wrapped.register_comm_hook(state=None, hook=hook)
    return wrapped
