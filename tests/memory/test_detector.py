"""Whole training steps on made-up images: what they train on, and that they are counted as they are."""

import pytest
import torch

from rev_det.comparison.cases import detector_step
from rev_det.memory.counting import Counter
from rev_det.memory.detector import NUM_OBJECTS, count_detector
from rev_det.memory.measure import measure


def count(cfg, batch, size, device_rules="cuda"):
    return count_detector(detector_step(cfg, batch, size), device_rules)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_a_made_up_batch_trains_every_head_with_its_full_share_of_foreground(config, mask_format):
    torch.manual_seed(0)
    heads = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.25)
    step = detector_step(config("INPUT.MASK_FORMAT", mask_format, *heads), 2, (128, 128))
    step.settle()
    before = [p.detach().clone() for p in step.model.parameters()]
    step.run()
    # Each foreground RoI is one of the mask head.
    assert step.rois() == {"box": 32, "mask": 8}
    losses = {name for name in step.storage.latest() if name.startswith("loss")}
    assert losses == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    moved = [not torch.equal(p, b) for p, b in zip(step.model.parameters(), before, strict=True)]
    # The bias of keys has no effect on attention, so none on the losses.
    assert sum(moved) > 0.9 * len(moved)


def test_a_step_goes_on_with_images_of_another_size(config):
    step = detector_step(config(), 2, (128, 128))
    step.settle()
    seen = []
    step.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    step.resize((96, 160))
    step.run()
    assert seen == [(2, 3, 96, 160)]
    assert all(len(image["instances"]) == NUM_OBJECTS for image in step.batch)
    assert step.storage.latest()["loss_mask"][0] > 0


def test_counting_a_detector_is_counting_its_real_step(config):
    counted = count(config(), 2, (128, 128))
    step = detector_step(config(), 2, (128, 128))
    step.settle()
    images = [image["image"] for image in step.batch]
    with Counter(step.model, step.optimizer, images) as counter:
        step.run()
    real = counter.result()
    assert counted.weights == real.weights
    assert counted.optimizer_state == real.optimizer_state
    # Another network predicts other boxes: some more or fewer survive suppression.
    assert counted.peak == pytest.approx(real.peak, rel=0.05)
    assert counted.flops == pytest.approx(real.flops, rel=0.02)


@pytest.mark.parametrize("optimizer, averages", [("AdamW", 2), ("SGD", 1)])
def test_all_parameters_are_updated_at_once_as_on_cuda(config, optimizer, averages):
    cfg = config("SOLVER.OPTIMIZER", optimizer)
    cuda, cpu = (count(cfg, 1, (64, 64), rules) for rules in ("cuda", "cpu"))
    parameters = len(list(detector_step(config(), 1, (64, 64)).model.parameters()))
    # An operation for each average and for the weight, at least, where they are updated one by one.
    assert cpu.cost.launches - cuda.cost.launches > (averages + 0.5) * parameters
    assert cuda.optimizer_state == cpu.optimizer_state > averages * 0.9 * cuda.weights


def test_memory_of_the_backbone_is_told_apart_from_that_of_the_heads(config):
    regions = "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"
    few, many = (
        count(config(regions, number, "MODEL.REV.ACTIVATIONS", "cached"), 1, (256, 256)) for number in (8, 64)
    )
    parts = [counted.split("backbone") for counted in (few, many)]
    # p2 .. p6 in float32 are the outputs: 64 channels at strides 4 .. 64. At the peak p2 is still there.
    pixels = [(256 // stride) ** 2 for stride in (4, 8, 16, 32, 64)]
    assert 4 * 64 * pixels[0] <= parts[0]["outputs"] <= 4 * 64 * sum(pixels)
    # More regions are the heads' memory alone.
    name = "backbone: kept for backward"
    assert parts[0][name] == parts[1][name] > 0
    assert parts[1]["heads: kept for backward"] > 1.5 * parts[0]["heads: kept for backward"]
    for counted, part in zip((few, many), parts, strict=True):
        assert sum(part.values()) == counted.total - counted.inputs


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p9"]),
        ("MODEL.META_ARCHITECTURE", "NoSuchArchitecture"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32]] * 4),
    ],
    ids=["feature", "architecture", "anchors"],
)
def test_a_config_that_cannot_be_built_is_an_error(config, opts):
    with pytest.raises(ValueError, match="the config cannot be built|which .* does not return"):
        detector_step(config(*opts), 1, (64, 64))


def test_a_single_stage_detector_is_counted_too(config):
    cfg = config(
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_rev_mvit_fpn_backbone"),
        *("MODEL.FPN.IN_FEATURES", ["scale3", "scale4", "scale5"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
        *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"], "MODEL.MASK_ON", False),
    )
    counted = count(cfg, 1, (256, 256))
    assert any(a.module.startswith("head") for a in counted.at_peak)
    assert counted.flops > 2 * counted.forward.flops


def test_other_annotations_are_refused(config):
    with pytest.raises(ValueError, match="MODEL.KEYPOINT_ON True"):
        detector_step(config("MODEL.KEYPOINT_ON", True), 1, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cached", "checkpoint", "reversible"])
def test_memory_grows_in_a_straight_line_with_the_images(config, mode):
    cfg = config("MODEL.REV.ACTIVATIONS", mode, file="rev_mvit_b")
    one, two, four = (count(cfg, batch, (800, 1344)).peak for batch in (1, 2, 4))
    assert (four - two) / 2 == pytest.approx(two - one, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cached", "reversible"])
def test_the_counted_detector_is_what_a_gpu_allocates(config, mode):
    opts = ("MODEL.REV.ACTIVATIONS", mode, "SOLVER.AMP.DTYPE", "bf16")
    counted = count(config(*opts, file="rev_mvit_b"), 2, (800, 1344))
    step = detector_step(config(*opts, "MODEL.DEVICE", "cuda", file="rev_mvit_b"), 2, (800, 1344))
    measured = measure(step, 2, torch.device("cuda"), 2, 2)
    assert step.rois()["mask"] == 128
    # Without cuDNN the allocator reaches 1.01 times the count (docs/memory.md): the rest is left to the
    # workspaces of its convolutions.
    assert measured.allocated == pytest.approx(counted.total, rel=0.1)
