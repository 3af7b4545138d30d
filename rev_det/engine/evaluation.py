"""Evaluation that training does not notice, and with test-time augmentation."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, GeneralizedRCNNWithTTA
from torch import nn

from ..devices import device_settings
from .amp import Precision

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def evaluating(cfg: CfgNode, model: nn.Module) -> Iterator[None]:
    """Inference mode in the precision of training; afterwards all is as it was, for training to go on.

    Loading test images draws from the same random numbers as training: without this, a run would depend
    on how often it is evaluated. Detectron2 restores the model's mode, but sets all its parts to the same.

    Args:
        cfg: a config with rev_det's keys.
        model: to be evaluated inside the context.
    """
    modes = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(),
            device_settings(cfg),
            Precision.from_config(cfg).autocast(),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, training in modes.items():
            module.training = training


def check_test_augmentation(cfg: CfgNode) -> None:
    """Find before the training what would stop `evaluate_with_augmentation` after it.

    Raises:
        ValueError: Detectron2 has no test-time augmentation for this model.
    """
    kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if not (isinstance(kind, type) and issubclass(kind, GeneralizedRCNN)):
        obstacle = f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, and not 'GeneralizedRCNN'"
    elif cfg.MODEL.KEYPOINT_ON:
        obstacle = "MODEL.KEYPOINT_ON is True"
    elif cfg.MODEL.LOAD_PROPOSALS:
        obstacle = "MODEL.LOAD_PROPOSALS is True"
    else:
        return
    raise ValueError(f"no test-time augmentation: {obstacle}; set TEST.AUG.ENABLED to False")


def evaluate_with_augmentation(
    trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module
) -> dict[str, Any]:
    """Evaluate a model on several sizes of each image and their mirror images, merged (``TEST.AUG``).

    This is Detectron2's ``GeneralizedRCNNWithTTA``. Each size is made of the image itself: Detectron2's own
    command resizes images to ``INPUT.MIN_SIZE_TEST`` first, and then again.

    Args:
        trainer: whose ``test``, ``build_test_loader`` and ``build_evaluator`` are used.
        cfg: a config with rev_det's keys. Files are written as by ``test``, but below ``OUTPUT_DIR/TTA``.
        model: with the weights to evaluate.

    Returns:
        what ``test`` returns, with "_TTA" behind the names of the tasks (or datasets, if there are several).

    Raises:
        ValueError: see `check_test_augmentation`.
    """
    check_test_augmentation(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "TTA")
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.freeze()
    logger.info(
        "Test-time augmentation: short sides %s, longer side at most %d%s",
        ", ".join(map(str, cfg.TEST.AUG.MIN_SIZES)),
        cfg.TEST.AUG.MAX_SIZE,
        ", each also mirrored" if cfg.TEST.AUG.FLIP else "",
    )
    results = trainer.test(cfg, GeneralizedRCNNWithTTA(cfg, model))
    return {f"{name}_TTA": metrics for name, metrics in results.items()}
