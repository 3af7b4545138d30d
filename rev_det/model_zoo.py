"""The configs that come with rev_det, by name, and the models they describe; after Detectron2's model zoo."""

from __future__ import annotations

import builtins
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import RevCheckpointer
from .config_files import read_config_file, why_no_file
from .engine import build_detector

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn

__all__ = ["get", "get_config", "get_config_file", "list"]


def list() -> builtins.list[str]:
    """The names of all models, such as ``COCO-Detection/mask_rcnn_rev_mvit_b_fpn_3x.yaml``, sorted."""
    root = _config_root()
    return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.yaml"))


def find_config_file(name: str) -> str:
    """The path of the config that a command line means.

    Args:
        name: path of a YAML file, or name of a model; a file that is there comes first.

    Raises:
        FileNotFoundError: there is neither such a file nor such a model; the message has similar names.
    """
    if os.path.isfile(name):
        return name
    try:
        return get_config_file(name)
    except ValueError as error:
        raise FileNotFoundError(f"--config-file {name} {why_no_file(name)}, and {error}") from error


def get_config_file(name: str) -> str:
    """The path of a config file.

    Args:
        name: one of `list`; its folder and extension may be left out.

    Returns:
        an absolute path, in the installed package or in the checkout.

    Raises:
        ValueError: there is no such model; the message names those that are called similarly.
    """
    names = list()
    found = [full for full in names if name in _spellings(full)]
    if not found:
        spellings = sorted({spelling for full in names for spelling in _spellings(full)})
        with_it = [Path(full).stem for full in names if name and name.lower() in full.lower()]
        close = difflib.get_close_matches(name, spellings, n=3) or with_it[:3]
        every = ", ".join(Path(full).stem for full in names)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {every}"
        raise ValueError(f"there is no model {name!r} in rev_det's zoo; {hint}")
    return str(_config_root() / found[0])


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of a model.

    Args:
        name: as for `get_config_file`.
        trained: must be False, as no trained detectors are published. ``MODEL.WEIGHTS`` names the ImageNet
            weights of the backbone, or is empty where none are published.

    Returns:
        a config with rev_det's keys, not frozen.

    Raises:
        ValueError: there is no such model, or ``trained``.
    """
    path = get_config_file(name)
    if trained:
        raise ValueError(
            f"no trained weights are published for {name}; train it, or give the weights you have: "
            f"get({name!r}, weights='model_final.pth')"
        )
    return read_config_file(path)


def get(
    name: str, weights: str | os.PathLike | None = None, device: str | torch.device | None = None
) -> nn.Module:
    """Build a detector.

    Args:
        name: as for `get_config_file`.
        weights: None leaves all weights random; "imagenet" loads the published ones of the backbone; else
            path or URL of a file that `rev_det.checkpoint.load_pretrained` takes: of a backbone or detector.
        device: None for CUDA if there is a GPU, else the CPU.

    Returns:
        the model in training mode, as Detectron2's ``model_zoo.get`` returns it, with `float32_boxes`.

    Raises:
        FileNotFoundError: the weights do not exist, or cannot be downloaded.
        ValueError: there is no such model, there are no published weights for it, or weights do not fit it.
    """
    cfg = get_config(name)
    if weights == "imagenet":
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            raise ValueError(
                f"no ImageNet weights are published for {name}; weights=None starts from nothing"
            )
    cfg.MODEL.DEVICE = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_detector(cfg)
    if weights is not None:
        RevCheckpointer(model).load(os.fspath(weights), checkpointables=[])
    return model


def _config_root() -> Path:
    """In an installed package configs/ is inside it, in a checkout beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _spellings(name: str) -> set[str]:
    stem = Path(name).stem
    return {name, name.removesuffix(".yaml"), stem, f"{stem}.yaml"}
