"""At 1333 x 800 in bfloat16, nothing that a detector places moves: not RoIs, boxes, masks or keypoints.

What is checked reaches the operator, or is what it returns.
"""

import copy
import logging
import math
import pickle

import pytest
import torch
from detectron2.export.torchscript_patch import freeze_training_mode, patch_instances
from detectron2.layers import ROIAlign
from detectron2.modeling import box_regression, build_model, poolers
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from nano_detector import nano_config
from small_backbones import annotated_image
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from rev_det import model_zoo
from rev_det.comparison.cases import detector_step
from rev_det.engine import Trainer
from rev_det.modeling import float32_boxes
from rev_det.predict import Origin, load_detector
from rev_det_cli import main

HEIGHT, WIDTH = 800, 1333
PIXELS = 0.01
OPTIONS = {
    "mask": [],
    "faster": ["MODEL.MASK_ON", False],
    "cascade": ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "keypoint": ["MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1],
    "retinanet": [
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_rev_mvit_fpn_backbone"),
        *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]),
        *("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 1),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
    ],
}
DETECTORS = [*OPTIONS, "fcos"]


def config(detector):
    cfg = nano_config()
    # Untrained scores are all alike, and low.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 100
    cfg.merge_from_list(OPTIONS[detector])
    return cfg


def stock_detector(detector):
    """With feature maps of 1333 x 800 pixels in bfloat16, from no backbone."""
    torch.manual_seed(0)
    model = fcos() if detector == "fcos" else build_model(config(detector))
    maps = {
        name: torch.randn(1, shape.channels, -(-HEIGHT // shape.stride), -(-WIDTH // shape.stride))
        for name, shape in model.backbone.output_shape().items()
    }
    maps = {name: value.bfloat16().requires_grad_() for name, value in maps.items()}
    model.backbone.forward = lambda images: maps
    return model


def fcos():
    pyramid = build_model(config("retinanet")).backbone
    shapes = list(pyramid.output_shape().values())
    head = FCOSHead(input_shape=shapes, num_classes=3, conv_dims=[8], norm="")
    torch.nn.init.constant_(head.bbox_pred.bias, 2.3)  # sides of some strides
    statistics = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
    limits = {"test_score_thresh": 0.0, "test_topk_candidates": 100}
    return FCOS(backbone=pyramid, head=head, num_classes=3, **limits, **statistics)


def sample():
    """An image with objects to the right and at the bottom, where the steps of bfloat16 are the largest."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(12, 2, generator=generator) * torch.tensor([WIDTH - 300.0, HEIGHT - 200.0])
    sides = 20 + torch.rand(12, 2, generator=generator) * torch.tensor([270.0, 170.0])
    boxes = torch.cat([corners, corners + sides], 1)
    boxes[0] = torch.tensor([1003.3, 411.1, 1027.3, 433.3])
    return annotated_image(HEIGHT, WIDTH, boxes)


class Record(TorchDispatchMode):
    """How far a detector's operators place things from where they ought to be while it runs.

    Attributes:
        moved: by kind, the distances in pixels.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.moved = {}
        convert, sample_grid = poolers.convert_boxes_to_pooler_format, functional.grid_sample

        def rois(boxes):
            self.rois = convert(boxes)
            return self.rois

        def grid_sample(masks, grid, **options):
            # Pixels lie in regular steps.
            for line in (grid[0, 0, :, 0].double(), grid[0, :, 0, 1].double()):
                if len(line) > 1:
                    step = (line[-1] - line[0]) / (len(line) - 1)
                    self.add("masks", (line - line[0]) / step - torch.arange(len(line)))
            return sample_grid(masks, grid, **options)

        def watch_boxes(transform):
            stock = transform.apply_deltas

            def apply_deltas(self_, deltas, boxes):
                result = stock(self_, deltas, boxes)
                self.add("boxes", result - stock(self_, deltas.float(), boxes.float()))
                return result

            monkeypatch.setattr(transform, "apply_deltas", apply_deltas)

        watch_boxes(box_regression.Box2BoxTransform)
        watch_boxes(box_regression.Box2BoxTransformLinear)
        monkeypatch.setattr(poolers, "convert_boxes_to_pooler_format", rois)
        monkeypatch.setattr(functional, "grid_sample", grid_sample)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.torchvision.roi_align.default and len(args[1]):
            # Of all RoIs that were to be pooled, this level's are some.
            distances = torch.cdist(args[1].double(), self.rois.double(), p=math.inf)
            self.add("rois", distances.min(dim=1).values)
        return function(*args, **(kwargs or {}))

    def add(self, kind, distances):
        self.moved[kind] = max(self.moved.get(kind, 0.0), distances.abs().max().item())


def off_the_grid(instances):
    """How far keypoints are from the middles of a heatmap's pixels: one cell a pixel, rounded up."""
    low, high = instances.pred_boxes.tensor.double()[:, None].chunk(2, dim=2)
    cells = (high - low).clamp(min=1).ceil()
    found = (instances.pred_keypoints[..., :2].double() - low) * cells / (high - low).clamp(min=1) - 0.5
    return (found - found.round()).abs().max().item()


def run(model, training):
    """A forward pass in bfloat16; by kind, how many pixels what it places has moved."""
    with pytest.MonkeyPatch.context() as patch, EventStorage(), torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(training), Record(patch) as record:
            result = model.train(training)([sample()])
    if training:
        return record.moved
    (found,) = (image["instances"] for image in result)
    assert len(found) > 3
    assert found.pred_boxes.tensor.max() > 512
    return record.moved | ({"keypoints": off_the_grid(found)} if found.has("pred_keypoints") else {})


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_nothing_moves(detector, training):
    moved = run(float32_boxes(stock_detector(detector)), training)
    kinds = {"mask": {"masks"}, "cascade": {"masks"}, "keypoint": {"keypoints"}}
    expected = set() if training else {"boxes", *kinds.get(detector, set())}
    if training and detector != "retinanet":  # its loss compares deltas
        expected |= {"boxes"}
    if detector not in ("retinanet", "fcos"):
        expected |= {"rois"}
    assert set(moved) == expected
    assert all(distance <= PIXELS for distance in moved.values()), moved


@pytest.mark.parametrize(
    "detector, training, kinds",
    [
        ("mask", True, {"rois"}),
        ("mask", False, {"rois", "masks"}),
        ("keypoint", False, {"rois", "keypoints"}),
        ("fcos", False, {"boxes"}),
    ],
)
def test_without_it_they_move(detector, training, kinds):
    moved = run(stock_detector(detector), training)
    assert {kind for kind, distance in moved.items() if distance > PIXELS} == kinds


# ---- every command ----


def is_treated(model):
    """Whether a Mask R-CNN has the methods in all the places that it has."""
    kinds = {type(module).__name__ for module in model.modules()}
    changed = {"ROIAlignWithFloat32RoIs", "MaskRCNNConvUpsampleHeadWithFloat32Masks"}
    return changed <= kinds and not {"ROIAlign", "MaskRCNNConvUpsampleHead"} & kinds


def test_every_command_builds_its_detector_so(tmp_path, monkeypatch):
    cfg = nano_config()
    stock = build_model(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": stock.state_dict()}, tmp_path / "model_final.pth")
    assert not is_treated(stock)
    assert is_treated(Trainer.build_model(cfg))  # train, and --eval-only
    assert is_treated(load_detector(Origin.find(str(tmp_path))).model)  # predict, data
    assert is_treated(detector_step(cfg, 1, (64, 64)).model)  # bench, analyze
    assert is_treated(model_zoo.get("Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml", device="cpu"))
    exported = []
    monkeypatch.setattr("rev_det.export.export", lambda model, *args, **kwargs: exported.append(model) or [])
    weights, target = str(tmp_path / "model_final.pth"), str(tmp_path / "detector.ts")
    assert main(["export", "--weights", weights, "--format", "torchscript", "--output", target]) == 0
    assert is_treated(exported[0])


# ---- what stays as it was ----


def test_a_detector_is_what_it_was():
    """What holds of copies, pickles and a second call of any model is in test_derived.py."""
    stock = build_model(nano_config())
    model = float32_boxes(copy.deepcopy(stock))
    assert is_treated(model) and not is_treated(stock)
    state = stock.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert isinstance(model.roi_heads.mask_head, MaskRCNNConvUpsampleHead)
    assert all(isinstance(level, ROIAlign) for level in model.roi_heads.box_pooler.level_poolers)
    assert is_treated(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("detector", DETECTORS)
def test_without_autocast_nothing_changes(detector):
    stock = stock_detector(detector).eval()
    maps = {name: value.detach().float() for name, value in stock.backbone(None).items()}
    stock.backbone.forward = lambda images: maps
    (expected,) = stock([sample()])
    (found,) = float32_boxes(stock)([sample()])
    expected, found = expected["instances"].get_fields(), found["instances"].get_fields()
    assert list(expected) == list(found)
    for name, value in expected.items():
        value, other = (getattr(x, "tensor", x) for x in (value, found[name]))
        assert value.dtype == other.dtype and torch.equal(value, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pooled_features_have_the_type_of_the_features(dtype):
    torch.manual_seed(0)
    pool = float32_boxes(torch.nn.Sequential(ROIAlign((7, 7), 1 / 16, 0)))[0]
    features = torch.randn(1, 2, 50, 84).to(dtype).requires_grad_()
    rois = torch.tensor([[0.0, 1003.3, 411.1, 1027.3, 433.3]])
    expected = roi_align(features.double(), rois.double(), (7, 7), 1 / 16, 0, True)
    pooled = pool(features, rois)
    assert pooled.dtype == dtype
    # Rounded once, to the nearest.
    tolerance = torch.finfo(dtype).eps / 2 if dtype != torch.float64 else 1e-12
    assert ((pooled - expected).abs() <= tolerance * expected.abs().clamp(min=0.1)).all()
    found, wanted = (torch.autograd.grad(y.double().sum(), features)[0] for y in (pooled, expected))
    torch.testing.assert_close(found, wanted)


def test_a_head_with_its_own_forward_is_named_in_a_warning(caplog):
    model = build_model(nano_config())
    head = model.roi_heads.mask_head
    head.forward = head.forward
    with caplog.at_level(logging.WARNING):
        float32_boxes(model)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "roi_heads.mask_head" in message and "has its own forward()" in message
    assert type(head) is MaskRCNNConvUpsampleHead


TENSORS = "objectness_logits scores pred_classes pred_masks pred_keypoints pred_keypoint_heatmaps"
FIELDS = {"proposal_boxes": Boxes, "pred_boxes": Boxes, **dict.fromkeys(TENSORS.split(), torch.Tensor)}


@pytest.mark.parametrize("detector", ["mask", "keypoint"])
def test_roi_heads_can_be_scripted(detector):
    """By Detectron2's function; what is traced is in test_export.py."""
    model = float32_boxes(stock_detector(detector)).eval()
    features, images = model.backbone(None), model.preprocess_image([sample()])
    features = {name: value.detach().float() for name, value in features.items()}
    with torch.no_grad():
        proposals, _ = model.proposal_generator(images, features)
        (expected,), _ = model.roi_heads(images, features, proposals)
    # What Detectron2's `scripting_with_instances` does.
    with freeze_training_mode(model.roi_heads), patch_instances(FIELDS) as ScriptInstances:
        scripted = torch.jit.script(model.roi_heads)
        with torch.no_grad():
            (found,), _ = scripted(images, features, [ScriptInstances.from_instances(x) for x in proposals])
    assert torch.equal(found.scores, expected.scores)
    for name in ("pred_masks", "pred_keypoints"):
        assert not expected.has(name) or torch.equal(getattr(found, name), expected.get(name))
