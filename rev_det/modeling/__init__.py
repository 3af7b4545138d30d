"""The reversible core and, where Detectron2 is installed, the registered backbones."""

from importlib.util import find_spec

from .reversible import ReversibleSequence

__all__ = ["ReversibleSequence", "RevMViT", "RevViT"]

if find_spec("detectron2") is not None:
    from . import baselines, build
    from .rev_mvit import RevMViT
    from .rev_vit import RevViT

    __all__ += ["baselines", "build"]
else:

    def __getattr__(name: str):
        if name in ("RevMViT", "RevViT", "baselines", "build"):
            raise ImportError(
                f"rev_det.modeling.{name} needs Detectron2, which is not installed. In a checkout of rev_det "
                "`make setup` installs it; elsewhere see https://detectron2.readthedocs.io/tutorials/install.html"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
