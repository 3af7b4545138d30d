"""A trained detector for deployment, as TorchScript, ONNX or `torch.export`; checked before it is kept.

What is traced is Detectron2's ``TracingAdapter``, which makes tensors of its lists and ``Instances``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from .modeling import backbone as plain_backbone
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

    part: str
    module: nn.Module
    input: str
    outputs: tuple[str, ...]
    example: Tensor
    other: Tensor
    multiple: int
    minimum: int = 1
    strides: tuple[int, ...] = ()  # of a backbone's outputs

    def __call__(self, x: Tensor) -> _Outputs:
        return dict(zip(self.outputs, self.module(x), strict=True))


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

    The file is loaded again and must compute what the model computes: on the input it was made with and,
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
    path = Path(path)
    if size is None and image is None:
        raise ValueError("--size is missing: there is no image to take it from")
    size = tuple(image.shape[-2:]) if size is None else tuple(size)
    check_pair("--size", size, minimum=32)
    try:
        check_extent(*size)
    except ValueError as error:
        raise ValueError(f"--size {size[0]} {size[1]} is no image to export with: {error}") from error
    with torch.no_grad(), _frozen(model), _any_size(), _quiet():
        source = _detector(model, size, image) if part == "detector" else _backbone(model, size, format)
        with whole_file(str(path)) as unfinished:
            unfinished = Path(unfinished)
            try:
                _WRITERS[format](source, unfinished)
                load = _READERS[format](source, unfinished)
            # The exporters raise exceptions of many kinds.
            except Exception as error:
                full = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
                if full or isinstance(error, OSError) or is_out_of_memory(error):
                    raise
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ValueError(f"--format {format} --part {part} fails: {reason}; {_WORKS}") from error
            fixed = (format, part) == ("onnx", "detector")
            inputs = [source.example] if fixed else [source.example, source.other]
            return [_compare(source, load, x) for x in inputs]


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


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """TorchScript keeps which parameters require gradients, and users of the file would pay for them."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Let the position embedding be interpolated even to its own size, which changes nothing there.

    Detectron2's function then returns it as it is, and a trace would have one or the other for all sizes.
    """
    before = plain_backbone.get_abs_pos
    plain_backbone.get_abs_pos = _interpolated
    try:
        yield
    finally:
        plain_backbone.get_abs_pos = before


def _interpolated(pos_embed: Tensor, has_cls_token: bool, hw: Sequence[int]) -> Tensor:
    """What Detectron2's ``get_abs_pos`` computes for other sizes. (1, S * S, C) -> (1, H, W, C)."""
    side = math.isqrt(int(pos_embed.shape[1]))
    grid = pos_embed.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=tuple(hw), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of each value that it takes for a constant; whether that is right is checked later."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _detector(model: nn.Module, size: tuple[int, int], image: Tensor | None) -> _Source:
    if type(model) not in (GeneralizedRCNN, RetinaNet):
        raise ValueError(
            f"--part detector: a {type(model).__name__} cannot be exported, a GeneralizedRCNN or "
            "RetinaNet can; --part backbone exports its backbone"
        )
    picture = _pattern() if image is None else image
    height, width = size
    example, other = (_resized(picture, (h, w)) for h, w in (size, (height * 3 // 4 + 5, width * 5 // 6 + 3)))
    adapter = TracingAdapter(model, [{"image": example}], _detect).eval()
    adapter(example)
    names = (*adapter.outputs_schema.keys, "image_size")
    return _Source("detector", adapter, "image", names, example, other, multiple=1)


def _detect(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Instances:
    """Detections of an image; masks are not pasted into it."""
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]["instances"]


def _backbone(model: nn.Module, size: tuple[int, int], format: str) -> _Source:
    backbone = _Backbone(model.backbone)
    strides = [shape.stride for shape in model.backbone.output_shape().values()]
    multiple = model.backbone.size_divisibility or max(strides)
    # `torch.export` takes sizes of 1 for constants: no feature map may have such a side.
    minimum = max(strides) // multiple + 1 if format == "torch-export" else 1
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
    adapter = TracingAdapter(backbone, example).eval()
    adapter(example)
    names = tuple(adapter.outputs_schema.keys)
    strides = tuple(model.backbone.output_shape()[name].stride for name in names)
    return _Source("backbone", adapter, "images", names, example, other, multiple, minimum, strides)


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


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(image[None].float(), size, mode="bilinear")[0]


def _write_torchscript(source: _Source, path: Path) -> None:
    # The trace is compared below, on other inputs too.
    traced = torch.jit.trace(source.module, source.example, check_trace=False)
    # By its own hand torch would end the program where the disk is full.
    with path.open("wb") as file:
        torch.jit.save(traced, file, _extra_files={DESCRIPTION: _description(source, fixed=False)})


def _read_torchscript(source: _Source, path: Path) -> Callable[[Tensor], _Outputs]:
    loaded = torch.jit.load(str(path))
    return lambda x: dict(zip(source.outputs, loaded(x), strict=True))


def _write_onnx(source: _Source, path: Path) -> None:
    import onnx

    fixed = source.part == "detector"
    axes = {0: "batch", 2: "height", 3: "width"}
    # With `dynamo` it goes through `torch.export`, which does not take a detector.
    torch.onnx.export(
        source.module,
        (source.example,),
        str(path),
        dynamo=False,
        opset_version=_OPSET,
        input_names=[source.input],
        output_names=list(source.outputs),
        dynamic_axes=None if fixed else {source.input: axes, **{name: axes for name in source.outputs}},
    )
    model = onnx.load(str(path))
    for value, name in zip(model.graph.output, source.outputs, strict=True):
        _rename(model.graph, value.name, name)
    model.doc_string = f"A {source.part} exported by rev_det {__version__}"
    onnx.helper.set_model_props(model, {DESCRIPTION: _description(source, fixed)})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _rename(graph: Any, before: str, after: str) -> None:
    """The exporter loses the names of outputs that are made in scripted functions."""
    values = [*graph.output, *graph.value_info]
    for value in values:
        if value.name == before:
            value.name = after
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [after if name == before else name for name in names]


def _read_onnx(source: _Source, path: Path) -> Callable[[Tensor], _Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> _Outputs:
        values = session.run(list(source.outputs), {source.input: x.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(source.outputs, values, strict=True)}

    return run


def _write_torch_export(source: _Source, path: Path) -> None:
    height, width = (
        source.multiple * torch.export.Dim(name, min=source.minimum) for name in ("height", "width")
    )
    shapes = {"images": {0: torch.export.Dim("batch"), 2: height, 3: width}}
    program = torch.export.export(source.module.model, (source.example,), dynamic_shapes=shapes)
    buffer = io.BytesIO()  # for the same reason
    torch.export.save(program, buffer, extra_files={DESCRIPTION: _description(source, fixed=False)})
    path.write_bytes(buffer.getbuffer())


def _read_torch_export(source: _Source, path: Path) -> Callable[[Tensor], _Outputs]:
    return torch.export.load(str(path)).module()


_WRITERS = {"torchscript": _write_torchscript, "onnx": _write_onnx, "torch-export": _write_torch_export}
_READERS = {"torchscript": _read_torchscript, "onnx": _read_onnx, "torch-export": _read_torch_export}


def _description(source: _Source, fixed: bool) -> str:
    """What goes in and what comes out, as JSON."""
    if source.part == "detector":
        height, width = source.example.shape[-2:] if fixed else ("H", "W")
        what = f"(3, {height}, {width}) float32: pixels from 0 to 255, in the colours of INPUT.FORMAT"
        outputs = {name: _MEANINGS.get(name, "") for name in source.outputs}
    else:
        what = (
            "(B, 3, H, W) float32: pixels less MODEL.PIXEL_MEAN, divided by MODEL.PIXEL_STD; H and W "
            f"multiples of {source.multiple}, at least {source.minimum * source.multiple}"
        )
        features = zip(source.outputs, source.module(source.example), source.strides, strict=True)
        outputs = {
            name: f"(B, {x.shape[1]}, ceil(H / s), ceil(W / s)) float32, s = {stride}"
            for name, x, stride in features
        }
    content = {
        "rev_det": __version__,
        "part": source.part,
        "inputs": {source.input: what},
        "outputs": outputs,
    }
    return json.dumps(content, indent=1)


def _compare(source: _Source, load: Callable[[Tensor], _Outputs], x: Tensor) -> Comparison:
    shape = tuple(x.shape)
    expected = source(x)
    try:
        found = load(x)
    # Raised by onnxruntime and by the guards of `torch.export`, of many kinds.
    except Exception as error:
        raise ValueError(f"the exported file fails on an input of shape {shape}: {error}") from error
    detections = None
    if source.part == "detector":
        found, detections = _in_order(found, expected, shape), len(expected["scores"])
    worst, where = 0.0, next(iter(expected))
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"the exported file differs from the model on an input of shape {shape}: {name} has shape "
                f"{tuple(found[name].shape)}, and not {tuple(value.shape)}"
            )
        if not value.numel():
            continue
        value = value.double()
        difference = (found[name].double() - value).abs().max().item()
        # Not below it: a NaN is not equal to anything.
        if not difference <= TOLERANCE * max(1.0, value.abs().max().item()):
            raise ValueError(
                f"the exported file differs from the model on an input of shape {shape}: {name} by "
                f"{difference:.3g}"
            )
        if difference > worst:
            worst, where = difference, name
    return Comparison(shape, worst, where, detections)


def _in_order(found: _Outputs, expected: _Outputs, shape: tuple[int, ...]) -> _Outputs:
    """Detections in the order of the expected ones: those of nearly equal scores may have changed places."""
    count = len(expected["scores"])
    if len(found["scores"]) != count:
        raise ValueError(
            f"the exported file differs from the model on an input of shape {shape}: it detects "
            f"{len(found['scores'])} objects, and not {count}"
        )
    distance = torch.cdist(expected["pred_boxes"], found["pred_boxes"], p=float("inf"))
    other_class = expected["pred_classes"][:, None] != found["pred_classes"]
    distance.masked_fill_(other_class, float("inf"))
    order = []
    for row in distance:
        nearest = int(row.argmin())
        if torch.isinf(row[nearest]):
            raise ValueError(
                f"the exported file differs from the model on an input of shape {shape}: it detects other "
                "objects"
            )
        order.append(nearest)
        # Boxes that reach beyond the image are equal once they are clipped to it.
        distance[:, nearest] = float("inf")
    return {name: value if name == "image_size" else value[order] for name, value in found.items()}
