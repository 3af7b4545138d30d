"""The named models, which published weight files hold: their sizes, where they are, loading them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import RevMViT, RevViT
from .geometry import NAMED_HEADS, NAMED_MODELS, read_geometry
from .layouts import Converted, convert
from .loading import apply_plan, read_source
from .plan import LoadMode, plan_load
from .report import LoadReport

_CLASSIFIER_HEAD = re.compile(r"(?:.*\.)?head\.(?:projection|fc)\.(weight|bias)")  # PySlowFast, mmpretrain
_ADDRESS = "https://dl.fbaipublicfiles.com/pyslowfast/rev/"


@dataclass(frozen=True)
class Published:
    """A weight file of the paper's authors.

    Attributes:
        url: where it is.
        top1: accuracy on ImageNet's validation images, in per cent, by the authors' model table.
        remark: what else they say about it.
    """

    url: str
    top1: float
    remark: str = ""


# https://github.com/facebookresearch/SlowFast/tree/main/projects/rev
PUBLISHED = {
    "rev_vit_s": Published(f"{_ADDRESS}REV_VIT_S.pyth", 79.9),
    "rev_vit_b": Published(f"{_ADDRESS}REV_VIT_B.pyth", 81.8),
    "rev_mvit_b": Published(f"{_ADDRESS}REV_MVIT_B.pyth", 82.9, "the paper says 82.5"),
}


@dataclass(frozen=True)
class NamedWeights:
    """A named model with the weights of a file.

    Attributes:
        model: its name, as "rev_vit_s".
        backbone: in eval mode; a Rev-MViT returns all scales.
        head: the ImageNet classifier's, if the file holds one.
        report: of the loading.
    """

    model: str
    backbone: RevViT | RevMViT
    head: nn.Linear | None
    report: LoadReport


def build_named_model(name: str) -> RevViT | RevMViT:
    """A freshly initialised backbone of a named size, for 224 x 224 images.

    Args:
        name: "rev_vit_s", "rev_vit_b", "rev_vit_l", "rev_vit_h" or "rev_mvit_b".

    Raises:
        ValueError: there is no model of that name.
    """
    if name not in NAMED_MODELS:
        raise ValueError(f"there is no model {name!r}; the named ones are {', '.join(NAMED_MODELS)}")
    family, width, last_block_indexes, patch_kernel = NAMED_MODELS[name]
    common = {"embed_dim": width, "depth": last_block_indexes[-1] + 1, "num_heads": NAMED_HEADS[name]}
    if family == "rev_vit":
        return RevViT(patch_size=patch_kernel[0], **common)
    return RevMViT(patch_kernel=patch_kernel, last_block_indexes=last_block_indexes, **common)


def load_named_model(source: str | os.PathLike | Mapping[str, Any], model: str | None = None) -> NamedWeights:
    """Build the named model that a file is for, and load it strictly, with its classifier's head.

    Args:
        source: as `load_pretrained`'s.
        model: name of the model; None for the one that the file fits.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: there is no model of that name, the file fits none, or as `load_pretrained`.
    """
    container, name = read_source(source)
    converted = convert(container, name)
    fits = read_geometry(converted.backbone)
    if model is None and fits.model is None:
        raise ValueError(
            f"{name} holds a {fits}, which is none of the named models ({', '.join(NAMED_MODELS)}). "
            "Weights of other sizes are loaded into a config of that size (MODEL.WEIGHTS)"
        )
    backbone = build_named_model(model or fits.model).eval()
    head, head_keys = _read_head(converted, name)
    others = {key: value for key, value in converted.dropped.items() if key not in head_keys}
    plan = plan_load(backbone, replace(converted, dropped=others), name, LoadMode())
    if head is not None:
        _check_head(head, list(backbone.output_shape().values())[-1].channels, name)
        plan.report.notes.append(f"the classifier of {head.out_features} classes was put back")
    apply_plan(backbone, plan)
    return NamedWeights(model or fits.model, backbone, head, plan.report)


def _read_head(converted: Converted, name: str) -> tuple[nn.Linear | None, list[str]]:
    """The classifier's head, with float32 values, and its keys; None if there is none."""
    found: dict[str, Tensor] = {}
    keys = []
    for key, value in converted.dropped.items():
        if match := _CLASSIFIER_HEAD.fullmatch(key):
            found[match.group(1)] = torch.as_tensor(value).float()
            keys.append(key)
    if not keys:
        return None, []
    shapes = {kind: tuple(value.shape) for kind, value in found.items()}
    weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
    if len(weight) != 2 or bias != weight[:1] or 0 in weight:
        raise ValueError(
            f"{name}: the classifier's head is not whole: expected a weight of shape (classes, channels) and "
            f"a bias of shape (classes,), found {', '.join(f'{k} {v}' for k, v in shapes.items())}"
        )
    head = nn.utils.skip_init(nn.Linear, weight[1], weight[0])
    head.load_state_dict(found)
    return head.eval(), keys


def _check_head(head: nn.Linear, channels: int, name: str) -> None:
    if head.in_features != channels:
        raise ValueError(
            f"{name}: the classifier's head is for {head.in_features} channels, but the model's last feature "
            f"map has {channels}"
        )
    if not all(torch.isfinite(value).all() for value in head.state_dict().values()):
        raise ValueError(
            f"{name}: the classifier's head holds NaN or infinite values. The file is damaged, or the "
            "training it comes from had diverged"
        )
