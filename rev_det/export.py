"""A trained detector for deployment, as TorchScript, ONNX or `torch.export`; checked before it is kept.

What is traced is Detectron2's ``TracingAdapter``, which makes tensors of its lists and ``Instances``.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional

from . import __version__
from .data.images import check_extent
from .devices import is_out_of_memory
from .files import check_output, whole_file
from .modeling.backbone import ReversibleBackbone
from .modeling.derived import Methods, give_methods
from .rules import check_choice, check_pair

# By format, how the names of its files end.
FORMATS = {"torchscript": (".pt", ".ts"), "onnx": (".onnx",), "torch-export": (".pt2",)}
PARTS = ("detector", "backbone")
# Of the largest value (at least 1) of an output: what the order of additions changes in float32.
TOLERANCE = 1e-4
# Where the description lies in the file; in ONNX, the key of the metadata.
DESCRIPTION = "rev_det.json"

_OPSET = 17
_WORKS = (
    "what works: torchscript and onnx of the detector; torchscript, onnx and torch-export of the backbone"
)
_MEANINGS = {
    "pred_boxes": "(N, 4) float32: x1, y1, x2, y2 in pixels of the image",
    "pred_classes": "(N,) int64: class index, from 0",
    "pred_masks": "(N, 1, M, M) float32: probability of the mask on a grid over the box",
    "scores": "(N,) float32: from 0 to 1",
    "image_size": "(2,) int64: height and width of the image",
}
_Outputs = dict[str, Tensor]
_Exported = tuple[io.BytesIO, Callable[[Tensor], _Outputs]]


@dataclass(frozen=True)
class Comparison:
    """The exported file beside the model, on one input.

    Attributes:
        shape: of the input.
        difference: the largest, over all outputs, of absolute values.
        output: where that is.
        detections: how many were compared; None for a backbone.
    """

    shape: tuple[int, ...]
    difference: float
    output: str
    detections: int | None

    def __str__(self) -> str:
        what = "" if self.detections is None else f" over {self.detections} detections"
        return (
            f"input {' x '.join(map(str, self.shape))}: largest difference {self.difference:.2g} "
            f"(in {self.output}){what}"
        )


@dataclass(frozen=True)
class _Source:
    """What is exported: a module from one tensor to a tuple of tensors, and inputs to try it on."""

    module: TracingAdapter
    input: tuple[str, str]  # name and meaning
    outputs: dict[str, str]
    example: Tensor
    other: Tensor | None  # of another size; None if the file takes that of the example alone
    # What the sides of a backbone's images are multiples of, and the least multiple.
    multiple: int = 1
    minimum: int = 1

    def named(self, values: Iterable[Tensor]) -> _Outputs:
        return dict(zip(self.outputs, values, strict=True))

    def description(self) -> str:
        """What goes in and what comes out, as JSON."""
        part = "backbone" if self.input[0] == "images" else "detector"
        content = {"part": part, "inputs": dict([self.input]), "outputs": self.outputs}
        return json.dumps({"rev_det": __version__, **content}, indent=1)


def export(
    model: nn.Module,
    path: str | os.PathLike,
    format: str,
    part: str = "detector",
    *,
    size: tuple[int, int] | None = None,
    image: Tensor | None = None,
) -> list[Comparison]:
    """Write a part of a detector to a file that needs neither rev_det nor Detectron2.

    Its content is loaded again and must compute what the model computes: on the input it was made with and,
    unless it takes that size alone (ONNX of a detector), on one of another size. Else nothing is written.
    Inputs and outputs are described in the file, in `DESCRIPTION`.

    Args:
        model: a Mask, Faster or Cascade R-CNN or RetinaNet on the CPU, with its weights; for the backbone
            anything that has one. What is exported is put into evaluation mode.
        path: of the file; its name must end as `FORMATS` says.
        format: one of `FORMATS`.
        part: one of `PARTS`.
        size: height and width of the input it is made with; for a backbone multiples of its largest stride.
            None for those of ``image``.
        image: (3, H, W), in the colours of ``INPUT.FORMAT``, from 0 to 255, with objects to detect; it is
            resized to ``size``. None for a drawn pattern.

    Returns:
        the comparisons that were made.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written.
        ImportError: ONNX without onnx and onnxruntime.
        ValueError: an argument is not allowed, the combination does not work, or the file computes something
            else.
    """
    check_target(path, format, part)
    if size is None and image is None:
        raise ValueError("--size is missing: there is no image to take it from")
    size = tuple(image.shape[-2:]) if size is None else tuple(size)
    check_pair("--size", size, minimum=32)
    try:
        check_extent(*size)
    except ValueError as error:
        raise ValueError(f"--size {size[0]} {size[1]} is no image to export with: {error}") from error
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing warns of each value that it takes for a constant; whether that is right is seen below.
        warnings.simplefilter("ignore")
        (model if part == "detector" else model.backbone).eval()
        # TorchScript keeps which parameters require gradients, and users of the file would pay for them.
        model = copy.deepcopy(model).requires_grad_(False)
        give_methods(model, {ReversibleBackbone: _AnySize})
        source = (_detector if part == "detector" else _backbone)(model, size, image, format)
        try:
            content, load = _EXPORTERS[format](source)
        # The exporters raise exceptions of many kinds.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"--format {format} --part {part} fails: {reason}; {_WORKS}") from error
        inputs = [x for x in (source.example, source.other) if x is not None]
        comparisons = [_compare(source, load, x) for x in inputs]
    with whole_file(os.fspath(path)) as unfinished, open(unfinished, "wb") as file:
        file.write(content.getbuffer())
    return comparisons


def check_target(path: str | os.PathLike, format: str, part: str) -> None:
    """Find what can be wrong before there is a model; the arguments are those of `export`.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `export`.
    """
    check_choice("--format", format, FORMATS)
    check_choice("--part", part, PARTS)
    if format == "torch-export" and part == "detector":
        raise ValueError(
            "--format torch-export --part detector: how Detectron2 pads images and how many proposals "
            f"it has depends on the data, which torch.export does not take; {_WORKS}"
        )
    check_output(path, FORMATS[format], "--output")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise ImportError(
            f"--format onnx needs {' and '.join(missing)}, to write the file and to check it: "
            f"pip install {' '.join(missing)}"
        )


class _AnySize(Methods):
    """Interpolates the position embedding even to its own size, which changes nothing there.

    `ReversibleBackbone` leaves it as it is then, and a trace would have one or the other for all sizes.
    """

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(images)  # (B, H', W', C)
        side = math.isqrt(self.pos_embed.shape[1])
        grid = self.pos_embed.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, C, side, side)
        grid = functional.interpolate(grid, size=x.shape[1:3], mode="bicubic", align_corners=False)
        return (x + grid.permute(0, 2, 3, 1)).flatten(1, 2), (x.shape[1], x.shape[2])


def _detector(model: nn.Module, size: tuple[int, int], image: Tensor | None, format: str) -> _Source:
    if type(model) not in (GeneralizedRCNN, RetinaNet):
        raise ValueError(
            f"--part detector: a {type(model).__name__} cannot be exported, a GeneralizedRCNN or "
            "RetinaNet can; --part backbone exports its backbone"
        )
    height, width = size
    picture = (_pattern() if image is None else image)[None].float()
    example, other = (
        functional.interpolate(picture, size, mode="bilinear")[0]
        for size in (size, (height * 3 // 4 + 5, width * 5 // 6 + 3))
    )
    adapter = TracingAdapter(model, [{"image": example}], _detect).eval()
    adapter(example)
    names = (*adapter.outputs_schema.keys, "image_size")
    outputs = {name: _MEANINGS.get(name, "") for name in names}
    if format == "onnx":
        other, shape = None, f"(3, {height}, {width})"
    else:
        shape = "(3, H, W)"
    meaning = f"{shape} float32: pixels from 0 to 255, in the colours of INPUT.FORMAT"
    return _Source(adapter, ("image", meaning), outputs, example, other)


def _detect(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Instances:
    """Detections of an image; masks are not pasted into it."""
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]["instances"]


def _backbone(model: nn.Module, size: tuple[int, int], image: Tensor | None, format: str) -> _Source:
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    multiple = model.backbone.size_divisibility or max(strides.values())
    # `torch.export` takes sizes of 1 for constants: no feature map may have such a side.
    minimum = max(strides.values()) // multiple + 1 if format == "torch-export" else 1
    height, width = size
    if height % multiple or width % multiple or min(size) < minimum * multiple:
        raise ValueError(
            f"--size of this backbone must be multiples of {multiple}, at least {minimum * multiple} for "
            f"--format {format}; got {height} {width}"
        )
    # Not of the same batch, aspect and size; and one side that the position embedding has.
    shapes = (2, *size), (1, height + multiple, max(minimum, width // multiple // 2) * multiple)
    generator = torch.Generator().manual_seed(0)
    example, other = (torch.randn((b, 3, h, w), generator=generator) for b, h, w in shapes)
    adapter = TracingAdapter(_Backbone(model.backbone), example).eval()
    maps = adapter(example)
    outputs = {
        name: f"(B, {x.shape[1]}, ceil(H / s), ceil(W / s)) float32, s = {strides[name]}"
        for name, x in zip(adapter.outputs_schema.keys, maps, strict=True)
    }
    meaning = (
        "(B, 3, H, W) float32: pixels less MODEL.PIXEL_MEAN, divided by MODEL.PIXEL_STD; H and W "
        f"multiples of {multiple}, at least {minimum * multiple}"
    )
    return _Source(adapter, ("images", meaning), outputs, example, other, multiple, minimum)


class _Backbone(nn.Module):
    """A backbone whose input has the name that is documented."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.backbone(images)


def _pattern() -> Tensor:
    """A picture with edges and colours of many sizes, the same every time. (3, 256, 256)."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand((1, 3, side, side), generator=generator) for side in (4, 8, 16, 64)]
    layers = [functional.interpolate(layer, (256, 256), mode="nearest") for layer in layers]
    return 255 * sum(layers)[0] / len(layers)


def _torchscript(source: _Source) -> _Exported:
    content = io.BytesIO()
    # The trace is compared later, on other inputs too.
    traced = torch.jit.trace(source.module, source.example, check_trace=False)
    torch.jit.save(traced, content, _extra_files={DESCRIPTION: source.description()})
    content.seek(0)
    loaded = torch.jit.load(content)
    return content, lambda x: source.named(loaded(x))


def _onnx(source: _Source) -> _Exported:
    import onnx
    import onnxruntime

    content = io.BytesIO()
    names, axes = [source.input[0], *source.outputs], {0: "batch", 2: "height", 3: "width"}
    # With `dynamo` it goes through `torch.export`, which does not take a detector.
    torch.onnx.export(
        source.module,
        (source.example,),
        content,
        dynamo=False,
        opset_version=_OPSET,
        input_names=names[:1],
        output_names=names[1:],
        dynamic_axes=None if source.other is None else {name: axes for name in names},
    )
    content.seek(0)
    model = onnx.load(content)
    for value, name in zip(model.graph.output, source.outputs, strict=True):
        if value.name != name:  # the exporter loses those of what is made in scripted functions
            model.graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
            value.name = name
    model.doc_string = f"Exported by rev_det {__version__}"
    onnx.helper.set_model_props(model, {DESCRIPTION: source.description()})
    onnx.checker.check_model(model)
    content = io.BytesIO(model.SerializeToString())
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    run = functools.partial(session.run, names[1:])
    return content, lambda x: source.named(map(torch.from_numpy, run({names[0]: x.numpy()})))


def _torch_export(source: _Source) -> _Exported:
    height, width = (
        source.multiple * torch.export.Dim(name, min=source.minimum) for name in ("height", "width")
    )
    shapes = {"images": {0: torch.export.Dim("batch"), 2: height, 3: width}}
    program = torch.export.export(source.module.model, (source.example,), dynamic_shapes=shapes)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={DESCRIPTION: source.description()})
    content.seek(0)
    return content, torch.export.load(content).module()


# Each returns what belongs into the file, and what computes its outputs, loaded from there.
_EXPORTERS = {"torchscript": _torchscript, "onnx": _onnx, "torch-export": _torch_export}


def _compare(source: _Source, load: Callable[[Tensor], _Outputs], x: Tensor) -> Comparison:
    shape = tuple(x.shape)
    differs = f"the exported file differs from the model on an input of shape {shape}:"
    expected = source.named(source.module(x))
    try:
        found = load(x)
    # Raised by onnxruntime and by the guards of `torch.export`, of many kinds.
    except Exception as error:
        raise ValueError(f"the exported file fails on an input of shape {shape}: {error}") from error
    detections = len(expected["scores"]) if "scores" in expected else None
    if detections is not None:
        found = _in_order(found, expected)
    differences = dict.fromkeys(expected, 0.0)
    for name, value in expected.items():
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, and not {tuple(value.shape)}"
            raise ValueError(f"{differs} {name} has shape {shapes}")
        if value.numel():
            difference = differences[name] = (found[name].double() - value.double()).abs().max().item()
            allowed = TOLERANCE * max(1.0, value.abs().max().item()) if value.is_floating_point() else 0.0
            # Not above it: a NaN is not equal to anything.
            if not difference <= allowed:
                raise ValueError(f"{differs} {name} by {difference:.3g}")
    output = max(differences, key=lambda name: differences[name])
    return Comparison(shape, differences[output], output, detections)


def _in_order(found: _Outputs, expected: _Outputs) -> _Outputs:
    """Detections in the order of the expected ones: those of nearly equal scores may have changed places."""
    if len(found["scores"]) != len(expected["scores"]):
        return found
    distance = torch.cdist(expected["pred_boxes"], found["pred_boxes"], p=float("inf"))
    distance[expected["pred_classes"][:, None] != found["pred_classes"]] = torch.finfo(distance.dtype).max
    order = []
    for row in distance:
        order.append(int(row.argmin()))
        # Boxes that reach beyond the image are equal once they are clipped to it.
        distance[:, order[-1]] = float("inf")
    return {name: value if name == "image_size" else value[order] for name, value in found.items()}
