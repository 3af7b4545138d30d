"""Training and evaluation of any Detectron2 detector, with rev_det's optimizer, precision and data."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from ..checkpoint import RevCheckpointer
from ..data import RevCOCOEvaluator, RevDatasetMapper
from .amp import Precision
from .evaluation import evaluate_with_augmentation, evaluating
from .hooks import PeakMemory, RunPictures
from .optimizer import build_gradient_clipper, build_optimizer
from .train_step import TrainStep

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


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
        model = wrap_model(model)
        self._trainer = TrainStep(model, data_loader, optimizer, precision, build_gradient_clipper(cfg))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RevCheckpointer(
            model, cfg.OUTPUT_DIR, strict_weights=cfg.MODEL.REV.STRICT_WEIGHTS, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks; peak memory in its progress line; the pictures when everything else is done."""
        hooks = [PeakMemory(), *super().build_hooks()]
        if comm.is_main_process():
            hooks.append(RunPictures())
        return hooks

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=RevDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=RevDatasetMapper(cfg, is_train=False))

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


def wrap_model(model: nn.Module) -> nn.Module:
    """The model itself in a single process, else in ``DistributedDataParallel``.

    Args:
        model: on the device of this process.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    # Detectron2 names a device unless told not to, and the CPU must not be named.
    device_ids = {"device_ids": None} if on_cpu else {}
    return create_ddp_model(model, broadcast_buffers=False, **device_ids)
