"""Training and evaluation: the trainer, its optimizer and precision, and the command around it."""

from .amp import Precision
from .build import build_detector
from .launch import main, run
from .optimizer import build_gradient_clipper, build_optimizer, check_param_groups, param_groups
from .pictures import draw_curves, draw_predictions
from .setup import argument_parser, check_run, load_config
from .train_step import TrainStep
from .trainer import Trainer

__all__ = [
    "Precision",
    "TrainStep",
    "Trainer",
    "argument_parser",
    "build_detector",
    "build_gradient_clipper",
    "build_optimizer",
    "check_param_groups",
    "check_run",
    "draw_curves",
    "draw_predictions",
    "load_config",
    "main",
    "param_groups",
    "run",
]
