"""The optimizer, its parameter groups, and gradient clipping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from detectron2.layers.batch_norm import LayerNorm as ChannelsFirstLayerNorm
from detectron2.modeling.backbone import get_vit_lr_decay_rate
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import reduce_param_groups
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from ..rules import check_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode

GradientClipper = Callable[[Sequence[nn.Parameter]], Tensor]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``SOLVER`` describes, over every trainable parameter of a model.

    Norms decay by ``SOLVER.WEIGHT_DECAY_NORM``, biases by ``SOLVER.WEIGHT_DECAY_BIAS``, position
    embeddings (parameters called ``pos_embed``) not at all, everything else by ``SOLVER.WEIGHT_DECAY``.

    Args:
        cfg: a config with rev_det's keys.
        model: the model to train.

    Raises:
        ValueError: the optimizer is unknown, or nothing in the model is trainable.
    """
    solver = cfg.SOLVER
    check_config(cfg, "SOLVER.OPTIMIZER")
    groups = param_groups(cfg, model)
    check_param_groups(model, groups)
    # What torch takes on CUDA by itself makes a copy of all parameters in every step.
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    shared = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "fused": on_cuda or None}
    if solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(groups, betas=tuple(solver.BETAS), **shared)
    else:
        optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **shared)
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    return optimizer


def _keep_implementation(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, of any device, for the implementation that was chosen for this one.

    torch takes such choices from the state, and puts its tensors where they want them.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(own) == len(saved):  # if not, torch says so
        choices = ({key: group[key] for key in ("fused", "foreach")} for group in own)
        state["param_groups"] = [{**group, **choice} for group, choice in zip(saved, choices, strict=True)]
    return state


def param_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with a learning rate and a weight decay each, as few as possible.

    Args:
        cfg: a config with rev_det's keys.
        model: the model to train.
    """
    check_config(cfg, "SOLVER.LAYER_DECAY")
    solver, decay = cfg.SOLVER, cfg.SOLVER.LAYER_DECAY
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        lr_factor_func=None if decay == 1 else layer_rates(model, decay),
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    # The norm of ViTDet's pyramid is a class of its own, which Detectron2's list of norms leaves out.
    pyramid_norms = [
        module.weight
        for module in model.modules()
        if isinstance(module, ChannelsFirstLayerNorm) and module.weight.requires_grad
    ]
    if not pyramid_norms:
        return groups
    # Of a parameter's entries the last one counts.
    return reduce_param_groups([*groups, {"params": pyramid_norms, "weight_decay": solver.WEIGHT_DECAY_NORM}])


def layer_rates(model: nn.Module, decay: float) -> Callable[[str], float]:
    """Factors of the learning rate that fall from the last block of the backbone to its first (ViTDet).

    Args:
        model: a detector with a RevViT or RevMViT, or another backbone that has ``blocks``.
        decay: ratio of the rate of a block to that of the next one; embeddings are the layer below the first.

    Returns:
        the factor by name of parameter, 1 outside the backbone.

    Raises:
        ValueError: the backbone has no ``blocks``.
    """
    found = [
        module.blocks
        for module in model.modules()
        if isinstance(getattr(module, "blocks", None), nn.ModuleList)
    ]
    if not found:
        raise ValueError("SOLVER.LAYER_DECAY is set, but the backbone has no blocks; set it to 1.0")
    return partial(get_vit_lr_decay_rate, lr_decay_rate=decay, num_layers=max(map(len, found)))


def check_param_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Require every trainable parameter of a model in exactly one group, and nothing else in any.

    Args:
        model: the model to train.
        groups: parameter groups as ``torch.optim`` takes them.

    Raises:
        ValueError: naming the parameters that are missing, repeated or not trainable.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter; check MODEL.REV.FREEZE_AT and your own freezing"
        )
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    problems = {
        "in no group": trainable - set(counts),
        "in more than one group": {key for key, count in counts.items() if count > 1},
        "not trainable parameters of this model": set(counts) - trainable,
    }
    for problem, keys in problems.items():
        if keys:
            found = ", ".join(sorted(names.get(key, "unknown") for key in keys))
            raise ValueError(
                f"optimizer groups must hold each trainable parameter once, but {found}: {problem}"
            )


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """What ``SOLVER.CLIP_GRADIENTS`` does to the (unscaled) gradients of a step.

    "full_model" scales all gradients together to a norm of at most ``CLIP_VALUE``. Detectron2's "norm"
    does that to each parameter alone, and its "value" clamps every element.

    Args:
        cfg: a Detectron2 config.

    Returns:
        a function that changes the gradients of parameters in place and returns the norm, a scalar tensor,
        that all of them together had before.

    Raises:
        ValueError: ``CLIP_TYPE`` is unknown.
    """
    check_config(cfg, "SOLVER.CLIP_GRADIENTS.")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    value, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
    if not clip.ENABLED:
        return total_norm
    if clip.CLIP_TYPE == "full_model":
        return lambda parameters: clip_grad_norm_(parameters, value, norm_type)

    def clip_parts(parameters: Sequence[nn.Parameter]) -> Tensor:
        total = total_norm(parameters)
        if clip.CLIP_TYPE == "value":
            clip_grad_value_(parameters, value)
        else:
            for parameter in parameters:
                clip_grad_norm_(parameter, value, norm_type)
        return total

    return clip_parts


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, which are left as they are."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])
