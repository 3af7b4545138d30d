"""A detector written as TorchScript, ONNX or torch.export computes what it computes, or is not written."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from nano_detector import nano_config
from torch import nn

import rev_det.export as module
from rev_det import model_zoo
from rev_det.engine import build_detector
from rev_det.export import DESCRIPTION, check_target, export
from rev_det_cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
# torch.jit is, but nothing else takes a detector of any size.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx or onnxruntime is not installed")
SUFFIX = {"torchscript": ".ts", "onnx": ".onnx", "torch-export": ".pt2"}
formats = pytest.mark.parametrize("format", ["torchscript", pytest.param("onnx", marks=needs_onnx)])


def mask_rcnn_mvit():
    return nano_config()


def mask_rcnn_vit():
    cfg = model_zoo.get_config("mask_rcnn_rev_vit_nano_fpn")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    return cfg


def faster_rcnn():
    cfg = nano_config()
    cfg.MODEL.MASK_ON = False
    return cfg


def cascade_mask_rcnn():
    cfg = nano_config()
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    return cfg


def retinanet():
    cfg = nano_config()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_rev_mvit_fpn_backbone"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.1
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    return cfg


DETECTORS = [
    mask_rcnn_mvit,
    retinanet,
    *(pytest.param(make, marks=pytest.mark.slow) for make in (mask_rcnn_vit, faster_rcnn, cascade_mask_rcnn)),
]


def build(make):
    torch.manual_seed(0)
    cfg = make()
    cfg.MODEL.DEVICE = "cpu"
    model = build_detector(cfg)
    if make is retinanet:
        # At first all scores are nearly the same, and which are the highest is left to chance.
        for parameter in model.head.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def load(path, format):
    """The file as its users load it, without what exported it: from input to outputs in order."""
    if format == "torchscript":
        return torch.jit.load(str(path))
    if format == "torch-export":
        exported = torch.export.load(str(path)).module()
        return lambda x: tuple(exported(x).values())
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return lambda x: tuple(
        map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: x.numpy()}))
    )


def description(path, format):
    files = {DESCRIPTION: ""}
    if format == "torchscript":
        torch.jit.load(str(path), _extra_files=files)
    elif format == "torch-export":
        torch.export.load(str(path), extra_files=files)
    else:
        import onnx

        (files[DESCRIPTION],) = [p.value for p in onnx.load(str(path)).metadata_props if p.key == DESCRIPTION]
    return json.loads(files[DESCRIPTION])


@formats
@pytest.mark.parametrize("make", DETECTORS)
def test_a_detector_computes_the_same(make, format, tmp_path):
    model = build(make)
    path = tmp_path / f"detector{SUFFIX[format]}"
    compared = export(model, path, format, size=(64, 96))
    assert [comparison.shape[1:] for comparison in compared][0] == (64, 96)
    assert len(compared) == (1 if format == "onnx" else 2)
    assert all(comparison.detections > 10 for comparison in compared)

    image = 255 * torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (expected,) = model([{"image": image}])
    found = dict(zip(description(path, format)["outputs"], load(path, format)(image), strict=True))
    expected = expected["instances"]
    assert torch.allclose(found["scores"], expected.scores, atol=1e-5)
    assert torch.allclose(found["pred_boxes"], expected.pred_boxes.tensor, atol=1e-2)
    assert torch.equal(found["pred_classes"], expected.pred_classes)
    assert found["image_size"].tolist() == [64, 96]
    assert ("pred_masks" in found) == expected.has("pred_masks")
    if "pred_masks" in found:
        assert found["pred_masks"].shape == (len(expected), 1, 28, 28)


@pytest.mark.parametrize(
    "make, format, size",
    [
        # Two are made at the size of their position embedding, which needs no interpolation.
        (mask_rcnn_mvit, "torchscript", (64, 64)),
        (mask_rcnn_vit, "torchscript", (128, 128)),
        (retinanet, "torchscript", (160, 192)),
        pytest.param(mask_rcnn_mvit, "onnx", (64, 64), marks=needs_onnx),
        pytest.param(mask_rcnn_vit, "onnx", (128, 128), marks=needs_onnx),
        pytest.param(retinanet, "onnx", (160, 192), marks=needs_onnx),
        (mask_rcnn_vit, "torch-export", (160, 192)),
        pytest.param(mask_rcnn_mvit, "torch-export", (160, 192), marks=pytest.mark.slow),
    ],
)
def test_a_backbone_takes_any_batch_and_size(make, format, size, tmp_path):
    model = build(make)
    path = tmp_path / f"backbone{SUFFIX[format]}"
    export(model, path, format, "backbone", size=size)
    loaded = load(path, format)
    content = description(path, format)
    assert list(content["inputs"]) == ["images"] and content["part"] == "backbone"
    # Sides of 160 pixels make 3 at the stride of 64, which does not divide them.
    for name, shape in model.backbone.output_shape().items():
        meaning = f"(B, {shape.channels}, ceil(H / s), ceil(W / s)) float32, s = {shape.stride}"
        assert content["outputs"][name] == meaning
    for shape in ((3, 3, 96, 96), (1, 3, 128, 128), (1, 3, 128, 96), (2, 3, 96, 224)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model.backbone(x)
        assert list(expected) == list(content["outputs"])
        for found, value in zip(loaded(x), expected.values(), strict=True):
            assert torch.allclose(found, value, atol=1e-4)


def test_torchscript_needs_torchvision_alone(tmp_path):
    path = tmp_path / "detector.ts"
    export(build(mask_rcnn_mvit), path, "torchscript", size=(64, 64))
    code = (
        "import sys; sys.modules['detectron2'] = sys.modules['rev_det'] = None\n"
        "import torch, torchvision\n"
        f"outputs = torch.jit.load({str(path)!r})(torch.rand(3, 50, 70) * 255)\n"
        "print(len(outputs), outputs[-1].tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "5 [50, 70]"


@needs_onnx
def test_onnx_of_a_detector_takes_its_size_alone(tmp_path):
    # Of another size its proposals would be wrong, and it would not always say so.
    path = tmp_path / "detector.onnx"
    export(build(faster_rcnn), path, "onnx", size=(64, 96))
    with pytest.raises(Exception, match="invalid dimensions"):
        load(path, "onnx")(torch.zeros(3, 96, 64))
    content = description(path, "onnx")
    assert "(3, 64, 96)" in content["inputs"]["image"]
    assert list(content["outputs"]) == ["pred_boxes", "pred_classes", "scores", "image_size"]


def test_the_model_is_as_before_and_exported_without_drop_path_and_gradients(tmp_path):
    cfg = nano_config()
    cfg.MODEL.REV_MVIT.DROP_PATH_RATE = 0.9
    model = build(lambda: cfg).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    export(model, tmp_path / "backbone.ts", "torchscript", "backbone", size=(96, 96))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    loaded, x = load(tmp_path / "backbone.ts", "torchscript"), torch.randn(1, 3, 96, 96)
    assert torch.equal(loaded(x)[0], loaded(x)[0])
    assert not loaded(x)[0].requires_grad


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("detector", lambda first: first * 1.001, "pred_boxes by"),
        ("backbone", lambda first: first * 1.001, "p2 by"),
        # What is computed for the shape of the example alone.
        ("backbone", lambda first: first[:, :, :24, :24], r"\(1, 3, 128, 32\): p2 has shape"),
    ],
)
def test_a_file_that_computes_something_else_is_not_kept(part, change, message, tmp_path, monkeypatch):
    class Another(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner.eval()

        def forward(self, x):
            first, *rest = self.inner(x)
            return (change(first), *rest)

    def export_another(source):
        return real(replace(source, module=Another(source.module)))

    real = module._EXPORTERS["torchscript"]
    path = tmp_path / "file.ts"
    path.write_bytes(b"what was there")
    monkeypatch.setitem(module._EXPORTERS, "torchscript", export_another)
    with pytest.raises(ValueError, match=f"differs from the model on an input of shape .*{message}"):
        export(build(mask_rcnn_mvit), path, "torchscript", part, size=(96, 96))
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def boxes_and_classes(order, boxes, classes):
    """A detector's outputs, of an exported file and of the model; the file has its detections in an order."""
    expected = {"pred_boxes": torch.tensor(boxes), "pred_classes": torch.tensor(classes)}
    expected["scores"] = torch.ones(len(boxes))
    found = {name: value[order] for name, value in expected.items()}
    source = module._Source(lambda x: tuple(expected.values()), ("image", ""), expected, None, None)
    return source, found


SAME_BOX = [[0.0, 0, 10, 10], [50, 50, 90, 90], [0, 0, 10, 10]]


@pytest.mark.parametrize(
    "order, classes", [([2, 0, 1], [0, 1, 2]), ([2, 0, 1], [0, 0, 0]), ([0, 1, 2], [1, 1, 1])]
)
def test_detections_of_nearly_equal_scores_may_change_places(order, classes):
    source, found = boxes_and_classes(order, SAME_BOX, classes)
    assert module._compare(source, lambda x: found, torch.zeros(3, 64, 64)).detections == 3


@pytest.mark.parametrize(
    "order, message",
    [
        ([0, 1, 1], "pred_boxes by 80"),
        ([0, 1], r"pred_boxes has shape \(2, 4\), and not \(3, 4\)"),
        ([0, 1, 2], "pred_classes by 1"),
    ],
)
def test_other_detections_are_a_difference(order, message):
    source, found = boxes_and_classes(order, SAME_BOX, [0, 1, 20_000])
    found["pred_classes"] = found["pred_classes"] + (found["pred_classes"] == 20_000)
    with pytest.raises(ValueError, match=f"differs from the model on an input of shape .*: {message}"):
        module._compare(source, lambda x: found, torch.zeros(3, 64, 64))


def test_not_a_number_is_not_equal(tmp_path, monkeypatch):
    model = build(mask_rcnn_mvit)
    with torch.no_grad():
        model.backbone.fpn_output2.weight[0] = float("nan")
    with pytest.raises(ValueError, match="p2 by nan"):
        export(model, tmp_path / "file.ts", "torchscript", "backbone", size=(96, 96))
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_fails_is_one_line_with_what_works(tmp_path, monkeypatch):
    def fail(source):
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setitem(module._EXPORTERS, "torchscript", fail)
    with pytest.raises(ValueError) as error:
        export(build(mask_rcnn_mvit), tmp_path / "file.ts", "torchscript", "backbone", size=(96, 96))
    assert str(error.value).startswith(
        "--format torchscript --part backbone fails: no such operator; what works:"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, format, part, message",
    [
        (
            "a.ts",
            "tflite",
            "detector",
            "--format is 'tflite'; allowed are 'torchscript', 'onnx', 'torch-export'",
        ),
        ("a.ts", "torchscript", "head", "--part is 'head'; allowed are 'detector', 'backbone'"),
        ("a.pth", "torchscript", "detector", "a.pth cannot be written: its name must end with .pt or .ts"),
        ("a.pt2", "torch-export", "detector", "what works: torchscript and onnx of the detector"),
        ("gone/a.ts", "torchscript", "backbone", "the folder .*gone does not exist"),
    ],
)
def test_what_cannot_work_is_said_before_there_is_a_model(name, format, part, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_target(tmp_path / name, format, part)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs onnx and onnxruntime.*pip install onnx onnxruntime"):
        check_target(tmp_path / "a.onnx", "onnx", "backbone")


@pytest.mark.parametrize(
    "format, size, message",
    [
        ("torchscript", (96, 100), "must be multiples of 32, at least 32 for --format torchscript"),
        ("torch-export", (64, 96), "must be multiples of 32, at least 96 for --format torch-export"),
        (
            "torchscript",
            (100_000, 100_000),
            "--size 100000 100000 is no image .* more than 89 million pixels",
        ),
        ("torchscript", (64, -64), "--size must be two whole numbers of at least 32"),
        ("torchscript", None, "--size is missing"),
    ],
)
def test_the_size_is_checked_before_memory_is_asked_for(format, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(build(mask_rcnn_mvit), tmp_path / f"a{SUFFIX[format]}", format, "backbone", size=size)
    assert not list(tmp_path.iterdir())


def test_other_architectures_are_an_error_that_names_them(tmp_path):
    cfg = nano_config()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    with pytest.raises(ValueError, match="a ProposalNetwork cannot be exported.*--part backbone"):
        export(build(lambda: cfg), tmp_path / "a.ts", "torchscript", size=(64, 64))


def test_an_image_gives_its_size(tmp_path):
    compared = export(build(faster_rcnn), tmp_path / "a.ts", "torchscript", image=torch.rand(3, 70, 90) * 255)
    assert compared[0].shape == (3, 70, 90)


@needs_onnx
def test_commands_and_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    cfg = mask_rcnn_vit()
    cfg.MODEL.DEVICE = "cpu"
    Path("output/demo").mkdir(parents=True)
    torch.save({"model": build_model(cfg).state_dict()}, "output/demo/model_final.pth")
    Path("output/demo/config.yaml").write_text(cfg.dump())
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = [line for kind, text in blocks if not kind for line in text.splitlines()]
    assert len(commands) == 4
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "rev-det" and main(words) == 0
    examples = [text for kind, text in blocks if kind == "py"]
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, "example", "exec"), {})


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, full_disk):
    path = tmp_path / "a.ts"
    with (
        full_disk(100_000),
        pytest.raises(OSError, match=rf"{path} cannot be written: File too large; .* free"),
    ):
        export(build_model(nano_config()), path, "torchscript", "backbone", size=(96, 96))
    assert not list(tmp_path.iterdir())


@formats
def test_a_place_that_is_not_utf8_is_written_to(tmp_path, format):
    path = tmp_path / os.fsdecode(b"\xff") / ("x" * 240 + SUFFIX[format])
    path.parent.mkdir()
    export(build(mask_rcnn_mvit), path, format, "backbone", size=(96, 96))
    assert path.stat().st_size > 100_000
