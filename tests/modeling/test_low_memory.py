"""Detectron2's own detectors with less memory: the same weights, outputs and gradients."""

import copy
import io
import logging
import pickle

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import mvit, swin, vit
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.utils.events import EventStorage
from small_backbones import set_small_sizes
from test_any_detector import DETECTORS, changed_config, nano_defaults, training_input
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map

from rev_det import low_memory, model_zoo
from rev_det.engine import build_detector
from rev_det.modeling import layers, low_memory_forms
from rev_det.modeling.build import RevFPN


def plain_vit(**options):
    settings = {"img_size": 128, "embed_dim": 32, "depth": 3, "num_heads": 4, "drop_path_rate": 0.3}
    blocks = {"window_size": 3, "window_block_indexes": (0, 2), "residual_block_indexes": (1,)}
    return vit.ViT(**settings | blocks | {"use_rel_pos": True} | options)


def multiscale_vit(**options):
    settings = {"img_size": 128, "embed_dim": 16, "depth": 6, "last_block_indexes": (0, 2, 3, 5)}
    return mvit.MViT(**settings | {"adaptive_window_size": 8, "drop_path_rate": 0.3} | options)


def swin_transformer(**options):
    settings = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "out_indices": (0, 1)}
    return swin.SwinTransformer(**settings | {"drop_path_rate": 0.3} | options)


# Sizes that are no multiples of windows; MViT's stock code allows no others than of its own.
BACKBONES = {
    "ViT": (plain_vit, (96, 160)),
    "ViT without relative positions": (lambda: plain_vit(use_rel_pos=False, qkv_bias=False), (80, 64)),
    "MViT": (multiscale_vit, (128, 192)),
    "MViT without windows": (
        lambda: multiscale_vit(adaptive_window_size=0, residual_pooling=False),
        (96, 160),
    ),
    "Swin": (swin_transformer, (100, 150)),
    "Swin with positions": (lambda: swin_transformer(ape=True, pretrain_img_size=64), (64, 64)),
}


def made(name, dtype=torch.float64):
    """A backbone all of whose weights do something, and images."""
    make, size = BACKBONES[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model, torch.randn(2, 3, *size, dtype=dtype)


def step(model, images, amp=False):
    """Outputs and gradients of a seeded step."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, amp):
        outputs = list(model.train()(images).values())
    loss = sum(y.float().sin().sum() if amp else y.sin().sum() for y in outputs)
    return outputs, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_close(actual, expected, tolerance=1e-10):
    """Relative to each tensor's largest value; gradients that are zero in theory, to the largest of all."""
    actual, expected = ([x.detach() for x in tensors if x.numel()] for tensors in (actual, expected))
    largest = max((float(x.abs().max()) for x in expected), default=0.0)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).abs().max()) <= tolerance * max(float(e.abs().max()), 1e-6 * largest)


@pytest.mark.parametrize("values", [2**26, 2**10], ids=["whole", "parts"])
@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_outputs_and_gradients_are_stock(name, keep_attention, values, monkeypatch):
    monkeypatch.setattr(layers, "PART_VALUES", values)
    monkeypatch.setattr(low_memory_forms, "KEPT_FROM_KEYS", 1)
    stock, images = made(name)
    model = low_memory(copy.deepcopy(stock), keep_attention)
    assert model.low_memory.changed and not model.low_memory.left
    assert list(model.state_dict()) == list(stock.state_dict())
    for actual, expected in zip(step(model, images), step(stock, images), strict=True):
        assert_close(actual, expected)
    with torch.no_grad():
        assert_close(list(model.eval()(images).values()), list(stock.eval()(images).values()))


@pytest.mark.parametrize("name", ["ViT", "MViT", "Swin"])
def test_mixed_precision_is_as_close_to_float32_as_stock_is(name):
    stock, images = made(name, torch.float32)
    exact = torch.cat([grad.flatten() for grad in step(stock, images)[1]])
    errors = []
    for model in (stock, low_memory(copy.deepcopy(stock))):
        grads = torch.cat([grad.flatten() for grad in step(model, images, amp=True)[1]])
        errors.append(float((grads - exact).norm() / exact.norm()))
    assert 1e-4 < errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("name", ["ViT", "MViT", "Swin"])
def test_frozen_parts_copies_pickles_and_averages(name):
    stock, images = made(name)
    for p in list(stock.parameters())[::3]:
        p.requires_grad_(False)
    _, expected = step(stock, images)
    model = low_memory(copy.deepcopy(stock))
    assert isinstance(model, type(stock))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in (model, *others, AveragedModel(model).module):
        assert other.low_memory == model.low_memory
        assert_close(step(other, images)[1], expected)


def test_hooks_on_treated_modules_are_called():
    stock, images = made("ViT")
    model, calls = low_memory(stock), []
    for name, module in model.named_modules():
        if name in model.low_memory.changed or name.endswith(("norm1", "qkv", "mlp")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(images)
    assert {f"blocks.{i}{part}" for i in range(3) for part in ("", ".attn", ".attn.qkv", ".mlp")} <= {*calls}


def test_a_module_in_two_places_is_treated_once():
    stock, images = made("ViT")
    stock.blocks[2] = stock.blocks[0]
    _, expected = step(stock, images)
    assert_close(step(low_memory(stock), images)[1], expected)


def test_tracing_finds_detectron2s_operators():
    stock, images = made("ViT", torch.float32)
    model = low_memory(copy.deepcopy(stock)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images, strict=False)
        assert "scaled_dot_product" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(images), stock.eval()(images))


def over_a_resnet(detector, norm="", mask_norm=None):
    """A stock detector with a small ResNet, whose batch norms are trained, and few channels."""
    cfg = changed_config(detector, "mvit")
    suffix = "retinanet_resnet_fpn_backbone" if "retinanet" in detector else "resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.NAME = f"build_{suffix}"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = "BN", norm
    cfg.MODEL.ROI_MASK_HEAD.NORM = norm if mask_norm is None else mask_norm
    torch.manual_seed(0)
    return build_model(cfg)


def losses_and_gradients(model):
    torch.manual_seed(1)
    with EventStorage():
        losses = model.train()([training_input()])
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
    return list(losses.values()), [torch.zeros(1) if g is None else g for g in grads]


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_over_a_resnet_keep_their_losses_and_gradients(detector, norm, monkeypatch):
    """In float32, which Detectron2's anchors and boxes are in; the parts below are exact."""
    stock = over_a_resnet(detector, norm)
    model = low_memory(copy.deepcopy(stock))
    assert "backbone" in model.low_memory.changed
    for actual, expected in zip(losses_and_gradients(model), losses_and_gradients(stock), strict=True):
        assert_close(actual, expected, 1e-4)


def parts_of_detectors():
    """Pyramids and heads, what they are called with, and which of their methods."""
    mask = over_a_resnet("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "GN")
    keypoints = over_a_resnet("COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml")
    dense = over_a_resnet("COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    cfg = changed_config("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "vit")
    simple = build_backbone(cfg)
    levels, rois = [torch.randn(2, 32, size, size) for size in (12, 6)], torch.randn(7, 32, 14, 14)
    yield mask.backbone, torch.randn(2, 3, 64, 96), "forward"
    yield simple, torch.randn(1, 3, 64, 64), "forward"
    yield mask.proposal_generator.rpn_head, levels, "forward"
    yield mask.roi_heads.box_head, rois[..., :7, :7], "forward"
    yield mask.roi_heads.mask_head, rois, "layers"
    yield mask.roi_heads.mask_head, rois[:0], "layers"
    yield keypoints.roi_heads.keypoint_head, rois, "layers"
    yield dense.head, [torch.randn(1, 32, size, size) for size in (9, 5, 3, 2, 1)], "forward"


@pytest.mark.parametrize("values", [2**26, 2**12], ids=["whole", "parts"])
@pytest.mark.usefixtures(nano_defaults.__name__)
def test_pyramids_and_heads_are_exact(values, monkeypatch):
    monkeypatch.setattr(layers, "PART_VALUES", values)
    monkeypatch.setattr(low_memory_forms, "SMALL_LEVEL", values // 2**12)
    for stock, inputs, method in parts_of_detectors():
        stock, inputs = stock.double().train(), tree_map(lambda x: x.double().requires_grad_(), inputs)
        results = []
        for module in (stock, low_memory(copy.deepcopy(stock))):
            torch.manual_seed(1)
            outputs = tree_leaves(getattr(module, method)(inputs))
            wanted = [*tree_leaves(inputs), *(p for p in module.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(sum(y.sin().sum() for y in outputs), wanted, allow_unused=True)
            results.append((outputs, [torch.zeros(1) if g is None else g for g in grads]))
        for expected, actual in zip(*results, strict=True):
            assert_close(actual, expected)


class OwnForward(FastRCNNConvFCHead):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_not_detectron2s_own_code_stays_and_is_named(caplog):
    model = over_a_resnet("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", mask_norm="BN")
    model.roi_heads.box_head.__class__ = OwnForward
    with caplog.at_level(logging.INFO):
        low_memory(model)
    assert set(model.low_memory.left) == {"roi_heads.box_head", "roi_heads.mask_head"}
    assert "own forward()" in model.low_memory.left["roi_heads.box_head"]
    assert "batch norm" in model.low_memory.left["roi_heads.mask_head"]
    assert all(f"{name} is computed as before" in caplog.text for name in model.low_memory.left)
    before = dict(model.low_memory.changed)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert low_memory(model).low_memory.changed == before
    assert "has been changed before" in caplog.text


def test_a_model_without_any_known_part_is_an_error():
    with pytest.raises(ValueError, match="nothing to change in Linear; it knows .*SwinTransformerBlock"):
        low_memory(nn.Linear(2, 2))


@pytest.mark.parametrize("asked", [True, False])
def test_a_config_asks_for_it(asked):
    cfg = model_zoo.get_config("mask_rcnn_rev_mvit_nano_fpn")
    set_small_sizes(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.LOW_MEMORY = "cpu", asked
    model = build_detector(cfg)
    assert hasattr(model, "low_memory") == asked
    assert isinstance(model.backbone, RevFPN)
    if asked:
        assert {"backbone", "proposal_generator.rpn_head", "roi_heads.mask_head"} <= {
            *model.low_memory.changed
        }
