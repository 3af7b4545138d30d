"""Parameter groups, optimizers and gradient clipping."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.layers.batch_norm import LayerNorm as ChannelsFirstLayerNorm
from detectron2.modeling import build_model
from torch import nn

from rev_det.engine import build_gradient_clipper, build_optimizer, check_param_groups, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 2))
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.group_norm = nn.GroupNorm(1, 2)
        self.pyramid_norm = ChannelsFirstLayerNorm(2)


@pytest.fixture
def cfg(nano_mvit, tiny_dataset):
    cfg = load_config(nano_mvit, ["DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()"], [tiny_dataset])
    cfg.defrost()
    return cfg


def weight_decay_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_norms_biases_and_position_embeddings_have_their_own_decay(cfg):
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.1, 0.02, 0.003
    model = Toy()
    assert weight_decay_by_name(model, build_optimizer(cfg, model)) == {
        "pos_embed": 0.0,
        "linear.weight": 0.1,
        "linear.bias": 0.003,
        "norm.weight": 0.02,
        "norm.bias": 0.003,
        "group_norm.weight": 0.02,
        "group_norm.bias": 0.003,
        "pyramid_norm.weight": 0.02,
        "pyramid_norm.bias": 0.003,
    }


def test_in_the_detectors_exactly_matrices_and_kernels_decay(nano_config, tiny_dataset):
    cfg = load_config(nano_config, ["DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()"], [tiny_dataset])
    model = build_model(cfg)
    decays = weight_decay_by_name(model, build_optimizer(cfg, model))
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        decaying = parameter.dim() > 1 and "pos_embed" not in name
        assert decays[name] == (cfg.SOLVER.WEIGHT_DECAY if decaying else 0.0), name


def test_frozen_parameters_are_in_no_group(cfg):
    model = Toy()
    model.linear.requires_grad_(False)
    model.pyramid_norm.requires_grad_(False)
    names = weight_decay_by_name(model, build_optimizer(cfg, model))
    assert not [name for name in names if name.startswith(("linear", "pyramid_norm"))]


def test_a_model_without_trainable_parameters_is_an_error(cfg):
    with pytest.raises(ValueError, match="no trainable parameter; check MODEL.REV.FREEZE_AT"):
        build_optimizer(cfg, Toy().requires_grad_(False))


def test_groups_that_miss_repeat_or_invent_parameters_are_errors():
    model = Toy()
    everything = list(model.parameters())
    check_param_groups(model, [{"params": everything}])
    with pytest.raises(ValueError, match="pos_embed: in no group"):
        check_param_groups(model, [{"params": everything[1:]}])
    with pytest.raises(ValueError, match="linear.weight: in more than one group"):
        check_param_groups(model, [{"params": everything}, {"params": [model.linear.weight]}])
    with pytest.raises(ValueError, match="unknown: not trainable parameters of this model"):
        check_param_groups(model, [{"params": [*everything, nn.Parameter(torch.ones(1))]}])


def test_adamw_and_sgd_take_their_keys(cfg):
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BETAS, cfg.SOLVER.MOMENTUM = 0.5, (0.8, 0.95), 0.7
    adamw = build_optimizer(cfg, Toy())
    assert type(adamw) is torch.optim.AdamW
    assert {(group["lr"], group["betas"]) for group in adamw.param_groups} == {(0.5, (0.8, 0.95))}
    cfg.SOLVER.OPTIMIZER = "SGD"
    sgd = build_optimizer(cfg, Toy())
    assert type(sgd) is torch.optim.SGD
    assert {(group["lr"], group["momentum"]) for group in sgd.param_groups} == {(0.5, 0.7)}


class OnCuda(nn.Parameter):
    """Says so. torch has fused optimizers for the CPU as well."""

    is_cuda = True


def toy(on_cuda: bool) -> Toy:
    model = Toy()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, OnCuda(parameter.detach()) if on_cuda else parameter)
    return model


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_on_cuda_alone_the_optimizer_is_fused(cfg, kind):
    cfg.SOLVER.OPTIMIZER = kind
    for on_cuda, expected in ((True, True), (False, None)):
        groups = build_optimizer(cfg, toy(on_cuda)).param_groups
        assert {(group["fused"], group["foreach"]) for group in groups} == {(expected, None)}


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("saved_on_cuda", [True, False])
def test_a_state_of_another_device_is_loaded_for_the_implementation_of_this_one(cfg, kind, saved_on_cuda):
    cfg.SOLVER.OPTIMIZER = kind
    cfg.SOLVER.BASE_LR = 0.25
    saved, resumed = (toy(on_cuda) for on_cuda in (saved_on_cuda, not saved_on_cuda))
    optimizers = [build_optimizer(cfg, model) for model in (saved, resumed)]
    state = take_step(saved, optimizers[0])
    chosen = [group["fused"] for group in optimizers[1].param_groups]
    optimizers[1].load_state_dict(state)
    assert [group["fused"] for group in optimizers[1].param_groups] == chosen
    resumed.load_state_dict(saved.state_dict())
    for model, optimizer in zip((saved, resumed), optimizers, strict=True):
        take_step(model, optimizer)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name).data, parameter.data)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (i + 1)).detach()
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.gpu
def test_a_step_of_the_optimizer_takes_no_copy_of_the_parameters(cfg):
    model = nn.Linear(1024, 4096, bias=False, device="cuda")
    optimizer = build_optimizer(cfg, model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * model.weight.nbytes


def clipped(cfg, clip_type: str) -> list[torch.Tensor]:
    """Gradients (3, 4) and (0.6, 0.8), norms 5 and 1, clipped to 1.5."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", True, "CLIP_TYPE", clip_type, "CLIP_VALUE", 1.5])
    build_gradient_clipper(cfg)(parameters)
    return [parameter.grad for parameter in parameters]


def test_full_model_clipping_scales_all_gradients_by_one_factor(cfg):
    first, second = clipped(cfg, "full_model")
    factor = 1.5 / 26**0.5
    torch.testing.assert_close(first, factor * torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(second, factor * torch.tensor([0.6, 0.8]))


def test_norm_and_value_clipping_are_detectron2s(cfg):
    first, second = clipped(cfg, "norm")
    torch.testing.assert_close(first, torch.tensor([0.9, 1.2]))
    torch.testing.assert_close(second, torch.tensor([0.6, 0.8]))
    first, second = clipped(cfg, "value")
    torch.testing.assert_close(first, torch.tensor([1.5, 1.5]))
    torch.testing.assert_close(second, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("clip_type", ["off", "full_model", "norm", "value"])
def test_clippers_return_the_norm_that_all_gradients_had_together(cfg, clip_type):
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED = clip_type != "off"
    clip.CLIP_TYPE, clip.CLIP_VALUE = (clip_type, 1.0) if clip.ENABLED else (clip.CLIP_TYPE, 1.0)
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 0.0]), torch.tensor([1.5])
    assert build_gradient_clipper(cfg)(parameters).item() == pytest.approx(2.5)
    largest = max(p.grad.abs().max().item() for p in parameters[:2])
    assert largest == pytest.approx({"off": 2.0, "full_model": 0.8, "norm": 1.0, "value": 1.0}[clip_type])


@pytest.mark.parametrize("family", ["mvit", "vit"])
def test_layer_decay_lowers_the_rate_from_block_to_block(family, tiny_dataset):
    config = str(CONFIGS / f"Quickstart/mask_rcnn_rev_{family}_nano_fpn.yaml")
    opts = ["DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]
    cfg = load_config(config, [*opts, "SOLVER.LAYER_DECAY", "0.5", "SOLVER.BASE_LR", "1.0"], [tiny_dataset])
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    depth = (cfg.MODEL.REV_MVIT if family == "mvit" else cfg.MODEL.REV_VIT).DEPTH
    seen = set()
    for name, rate in rates.items():
        if ".blocks." in name:
            block = int(name.partition(".blocks.")[2].partition(".")[0])
            seen.add(block)
            # The last block is one step below the heads.
            assert rate == pytest.approx(0.5 ** (depth - block)), name
        elif "pos_embed" in name or "patch_embed" in name:
            assert rate == pytest.approx(0.5 ** (depth + 1)), name
        elif not name.startswith("backbone"):
            assert rate == 1.0, name
    assert seen == set(range(depth))
