"""Training and evaluation: the trainer, its optimizer and precision, and the command around it."""

from importlib import import_module

# Names by the module that has them, imported when one is asked for: who reads a run's files needs no trainer.
_MODULES = {
    "amp": ("Precision",),
    "build": ("build_detector",),
    "checks": ("check_run",),
    "launch": ("main", "run"),
    "optimizer": ("build_gradient_clipper", "build_optimizer", "check_param_groups", "param_groups"),
    "pictures": ("draw_curves", "draw_predictions"),
    "setup": ("argument_parser", "load_config"),
    "train_step": ("TrainStep",),
    "trainer": ("Trainer",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
