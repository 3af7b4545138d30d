"""Loading weights into backbones, pyramids and detectors: all is settled before anything is copied."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .files import read_checkpoint, split_digest
from .layouts import Converted, backbone_prefix, convert, is_mvit, last_norm
from .named import NAMED_MODELS, grid_side, read_geometry

logger = logging.getLogger(__name__)

_ZOO = "detectron2://"
_SCALE_NORM = re.compile(r"(scale\d+_norm)\.\w+")
# Tensors of Detectron2's heads with rows for each class; those of the first group tell how many there are.
_CLASS_ROWS = re.compile(
    r"(?:.*\.)?(?:((?:roi_heads\.box_predictor(?:\.\d+)?|head)\.cls_score|sem_seg_head\.predictor)"
    r"|roi_heads\.(?:box_predictor(?:\.\d+)?\.bbox_pred|mask_head\.predictor))\.(?:weight|bias)"
)
_MASK_HEAD = "roi_heads.mask_head."
_NOT_STRICT = "strict=False (MODEL.REV.STRICT_WEIGHTS False)"


@dataclass
class LoadResult:
    """What became of every tensor of a weight file and of a model.

    Attributes:
        source: where the weights came from.
        layout: "pyslowfast", "mmpretrain" or "rev_det".
        loaded: tensors of the model that were loaded.
        expected: tensors of the model that the source should hold: all but ``initialised``.
        resized: loaded after interpolation to another grid (position embeddings).
        dropped: of the source, for which the model has no use: a classifier's head, the norm of a scale that
            is not returned, a detector's heads where the model is a backbone.
        initialised: of the model, that keep their values because no file of this kind holds them: a pyramid,
            heads, norms of other scales; heads for another number of classes.
        missing: of the model, that the source should hold and does not, or not in this shape.
        unexpected: of the source, that have no place in the model.
        notes: what else there is to know, a sentence each.
        warnings: what the user must see, a sentence each.
    """

    source: str
    layout: str
    loaded: int = 0
    expected: int = 0
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded}/{self.expected} tensors loaded ({self.layout} layout)"]
        for name in ("resized", "dropped", "initialised", "missing", "unexpected"):
            if keys := getattr(self, name):
                lines.append(f"  {name}: {name_some(keys)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


@dataclass(frozen=True)
class LoadMode:
    """How much may differ between a source and a model.

    Attributes:
        strict: whatever is missing, unexpected or of another shape is an error.
        evaluation: the model is to be used as it is: its heads must be in the source, for its classes.
        resume: the source is a checkpoint of this very model; nothing may differ, whatever ``strict`` says.
    """

    strict: bool = True
    evaluation: bool = False
    resume: bool = False


def load_pretrained(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Any],
    strict: bool = True,
    *,
    evaluation: bool = False,
) -> LoadResult:
    """Load weights of any supported layout; the result is logged, too.

    The layout is recognised by the keys. Everything is checked before anything is copied: on an error the
    model is as it was. Position embeddings for another grid are interpolated, floating-point values take the
    model's type.

    Args:
        model: a ``RevViT`` or ``RevMViT``, a pyramid over one, or a whole detector.
        source: path or URL, with an optional ``#sha256=<hex>`` that is verified; or what such a file holds.
            Layouts: PySlowFast, mmpretrain, rev_det (a backbone, a pyramid or a whole detector).
        strict: anything missing, unexpected or of another shape is an error. If not, what fits is loaded and
            the rest is listed and logged as a warning. Not counted are, in the result, ``dropped`` and
            ``initialised``.
        evaluation: the model will be used as it is: with ``strict``, weights without its heads, or with heads
            for another number of classes, are an error. Otherwise such heads keep their values, with a
            warning.

    Returns:
        what became of every tensor.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: the file is damaged, of no supported kind or would run code; the weights do not fit the
            model, or are not finite.
    """
    container, name = read_source(source)
    return LoadPlan(model, convert(container, name), name, LoadMode(strict, evaluation)).carry_out()


def read_source(source: str | os.PathLike | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What a source holds, and its name for messages.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`, for what concerns the file alone.
    """
    if isinstance(source, Mapping):
        return source, "the state"
    name, _ = split_digest(source)
    if name.startswith(_ZOO):
        raise ValueError(
            f"{name} is of Detectron2's model zoo, which has no reversible backbone (R-50.pkl is a ResNet). "
            "Set MODEL.WEIGHTS to a Rev-ViT or Rev-MViT file, or to '' to train from scratch"
        )
    return read_checkpoint(source), name


def check_values(values: Mapping[str, Tensor], integers: Collection[str], name: str) -> None:
    """Require dense tensors of floating-point numbers, or of integers.

    Args:
        values: by key.
        integers: keys of integers.
        name: of the source, for messages.

    Raises:
        ValueError: there are others.
    """
    wrong = []
    for key, value in values.items():
        found = [_name_type(value)]
        found += [str(value.layout).removeprefix("torch.")] * (value.layout != torch.strided)
        found += ["without values (on the meta device)"] * value.is_meta
        other = value.is_complex() or value.is_quantized or value.is_floating_point() == (key in integers)
        if other or len(found) > 1:
            allowed = "integer" if key in integers else "floating-point"
            wrong.append(f"{key} is {' '.join(found)}, allowed are dense {allowed} tensors")
    if wrong:
        raise ValueError(f"{name} holds values that are no weights: {name_some(wrong)}")


def check_finite(values: Mapping[str, Tensor], name: str) -> None:
    """Require numbers.

    Raises:
        ValueError: tensors hold NaN or infinite values.
    """
    if broken := [key for key, value in values.items() if not torch.isfinite(value).all()]:
        raise ValueError(
            f"{name} holds NaN, infinite or too large values in {len(broken)} tensors: "
            f"{name_some(broken)}. It is damaged, or the training it comes from had diverged"
        )


def name_some(items: Iterable[str], shown: int = 4) -> str:
    """The first of many names, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more


class LoadPlan:
    """What becomes of every tensor of a source and of a model.

    Args:
        model: a Rev-ViT or Rev-MViT, alone, in a pyramid or in a detector.
        source: the converted weights.
        name: of the source, for messages.
        mode: what is to be an error.

    Attributes:
        values: the model's names to tensors of the model's shapes and types.
        result: of loading them.

    Raises:
        ValueError: the source does not fit the model, or holds values that are no weights.
    """

    def __init__(self, model: nn.Module, source: Converted, name: str, mode: LoadMode):
        self.model, self.source, self.name, self.mode = model, source, name, mode
        self.strict = mode.strict or mode.resume
        self.targets: dict[str, Tensor] = model.state_dict()
        self.prefix = backbone_prefix(self.targets)
        if self.prefix is None:
            raise ValueError(f"{name} is for a Rev-ViT or Rev-MViT, but the model has no such backbone")
        self.size = read_geometry(source.backbone)
        self.result = result = LoadResult(name, source.layout)
        result.dropped += source.dropped
        result.unexpected += source.unexpected
        self.mismatched: dict[str, Tensor] = {}  # of the source
        self.class_heads: list[str] = []  # for another number of classes
        self.other_classes = ("", "")  # with class heads: as `_describe_classes` says
        matched = self._match_names()
        fitting = {key: value for key, value in matched.items() if self._fits(key, value)}
        self._set_class_heads_aside()
        if mode.resume:
            result.missing += result.initialised
            result.unexpected += result.dropped
            result.initialised, result.dropped = [], []
        self._judge()
        result.missing += self.mismatched
        self.values = self._to_model(fitting)
        result.loaded = len(self.values)
        result.expected = len(self.targets) - len(result.initialised)

    def carry_out(self) -> LoadResult:
        """Copy the values into the model, and log the result."""
        # Not strict: the plan has settled what is not in it.
        self.model.load_state_dict(self.values, strict=False)
        logger.info("%s", self.result)
        for warning in self.result.warnings:
            logger.warning("%s", warning)
        return self.result

    def _match_names(self) -> dict[str, Tensor]:
        """Tensors of the source under the model's names; what has no counterpart goes to the result."""
        result, source = self.result, self.source
        aligned = {self.prefix + key: value for key, value in source.backbone.items()}
        inside = outer = ""
        # A backbone's weights alone are that, whatever its names are prefixed with.
        prefix = source.prefix if source.others else ""
        if prefix.endswith(self.prefix):  # a detector's weights for a detector, a pyramid or a backbone
            outer = prefix.removesuffix(self.prefix)
        elif self.prefix.endswith(prefix):  # a backbone's or a pyramid's weights for what contains it
            inside = self.prefix.removesuffix(prefix)
        for key, value in source.others.items():
            if key.startswith(outer):
                aligned[inside + key.removeprefix(outer)] = value
            else:
                result.dropped.append(key)

        # Published files have the last scale's norm only, and a backbone need not return every scale.
        loose = source.layout != "rev_det" or prefix == "" or self.prefix == ""
        last = last_norm(key.removeprefix(self.prefix) for key in self.targets)
        for key in [key for key in self.targets if key not in aligned]:
            norm = self._scale_norm(key)
            absent = norm is not None and not _holds(aligned, self.prefix + norm)
            optional = not key.startswith(inside) or (loose and absent and norm != last)
            (result.initialised if optional else result.missing).append(key)
        for key in [key for key in aligned if key not in self.targets]:
            norm = self._scale_norm(key)
            unused = loose and norm is not None and not _holds(self.targets, self.prefix + norm)
            (result.dropped if unused else result.unexpected).append(key)
        return {key: torch.as_tensor(value) for key, value in aligned.items() if key in self.targets}

    def _scale_norm(self, key: str) -> str | None:
        match = _SCALE_NORM.fullmatch(key.removeprefix(self.prefix)) if key.startswith(self.prefix) else None
        return match.group(1) if match else None

    def _fits(self, key: str, value: Tensor) -> bool:
        theirs, ours = tuple(value.shape), tuple(self.targets[key].shape)
        if self._form(value) == self._form(self.targets[key]):
            return True
        sides = grid_side(theirs), grid_side(ours)
        on_grids = key == f"{self.prefix}pos_embed" and None not in sides and theirs[-1] == ours[-1]
        if not on_grids or self.mode.resume:
            self.mismatched[key] = value
            return False
        self.result.resized.append(key)
        self.result.notes.append(
            f"{key} was resized from {sides[0]} x {sides[0]} to {sides[1]} x {sides[1]} (bicubic)"
        )
        return True

    def _form(self, value: Tensor) -> str:
        """What must agree, in words."""
        return f"{tuple(value.shape)}" + f" {_name_type(value)}" * self.mode.resume

    def _set_class_heads_aside(self) -> None:
        """Heads for another number of classes keep the model's values if the model is yet to be trained."""
        pairs = ((key, value.shape, self.targets[key].shape) for key, value in self.mismatched.items())
        in_rows = [key for key, theirs, ours in pairs if theirs and theirs[1:] == ours[1:]]
        matches = {key: match for key in in_rows if (match := _CLASS_ROWS.fullmatch(key))}
        counting = next((key for key, match in matches.items() if match.group(1)), None)
        if counting is None:
            return
        self.class_heads = list(matches)
        self.other_classes = self._describe_classes(counting)
        if self.mode.resume or (self.mode.evaluation and self.strict):
            return
        self.result.warnings.append(
            f"{self.name}: {self.other_classes[1]}. {len(self.class_heads)} tensors of the heads start anew: "
            f"{name_some(self.class_heads)}"
        )
        for key in self.class_heads:
            del self.mismatched[key]
        self.result.initialised += self.class_heads

    def _describe_classes(self, key: str) -> tuple[str, str]:
        """The config key of the number of classes that differs, and both numbers in a sentence."""
        node, extra, rows = "ROI_HEADS", 1, 1  # with one row for the background
        if "sem_seg_head" in key:
            node, extra = "SEM_SEG_HEAD", 0
        elif "box_predictor" not in key:
            # RetinaNet's have rows for every anchor and class; its boxes, four for every anchor.
            boxes = self.targets.get(key.replace("cls_score", "bbox_pred"))
            node, extra, rows = "RETINANET", 0, boxes.shape[0] // 4 if boxes is not None else 1
        theirs, ours = (len(state[key]) // rows - extra for state in (self.mismatched, self.targets))
        counts = f"{theirs} in the file, {ours} in the model (MODEL.{node}.NUM_CLASSES)"
        return f"MODEL.{node}.NUM_CLASSES", f"The heads are for another number of classes: {counts}"

    def _judge(self) -> None:
        """Refuse, or warn of, whatever does not fit."""
        result = self.result
        absent = [key for key in result.initialised if not key.startswith(self.prefix)]
        if self.mode.evaluation and absent and not self.class_heads:
            self._refuse(
                f"{self.name} holds no weights for {len(absent)} tensors outside the backbone, which would "
                f"be random: {name_some(absent)}",
                "It holds no detection heads: evaluate the weights of a trained detector; to evaluate all "
                f"the same, set {_NOT_STRICT}",
            )
        shapes = [
            f"{key} {self._form(value)} in the file, {self._form(self.targets[key])} in the model"
            for key, value in self.mismatched.items()
        ]
        found = [
            f"{len(items)} {what}: {name_some(items)}"
            for what, items in (
                ("missing in the file", result.missing),
                ("unexpected in the file", result.unexpected),
                ("of another shape", shapes),
            )
            if items
        ]
        cause = self._cause(bool(found))
        if cause or found:
            details = ". ".join(filter(None, [cause, *found]))
            problem = f"{self.name} ({result.layout} layout) does not fit the model. {details}"
            self._refuse(problem, self._way_out())
        elif not self.mode.resume and (heads := self._other_heads()):
            # Our files do not say for how many heads they are: they may be a published one's, converted.
            result.warnings.append(
                f"{self.name} has the size of a {self.size}, whose {heads}. That is right for weights that "
                "were trained so, and wrong for a published file's that were converted"
            )

    def _refuse(self, problem: str, way_out: str) -> None:
        if self.strict:
            raise ValueError(f"{problem}. {way_out}")
        self.result.warnings.append(problem)

    def _cause(self, differs: bool) -> str:
        """A likely reason for the differences; another number of heads makes one of its own."""
        theirs = self.size
        ours = read_geometry(
            {k.removeprefix(self.prefix): v for k, v in self.targets.items() if k.startswith(self.prefix)}
        )
        if differs and theirs.family != ours.family:
            return f"Another family: the file holds a {theirs}, the model is a {ours}"
        if differs and (sizes := theirs.differences(ours)):
            text = f"Another size: the file holds a {theirs}, the model is a {ours}"
            return f"{text}, with another {', '.join(sizes)}" if str(theirs) == str(ours) else text
        if self.class_heads and self.class_heads[0] in self.mismatched:
            return self.other_classes[1]
        if self.source.layout != "rev_det" and (heads := self._other_heads()):
            return f"Another number of attention heads: the file's {heads}"
        return ""

    def _other_heads(self) -> str:
        """The numbers of attention heads in words, if the source's is known and not the model's."""
        named = NAMED_MODELS.get(self.size.model)
        theirs = named.num_heads if named else self.source.num_heads
        attention = dict(self.model.named_modules()).get(f"{self.prefix}blocks.0.F.attn")
        ours = getattr(attention, "num_heads", None)
        if theirs == ours or None in (theirs, ours):
            return ""
        return f"first block has {theirs} attention heads, the model's has {ours} (NUM_HEADS)"

    def _way_out(self) -> str:
        if self.mode.resume:
            return "Resume with the config the run was started with, or start a new run in another OUTPUT_DIR"
        if self.class_heads and self.mismatched.keys() == set(self.class_heads):
            return (
                f"Evaluate weights for the model's classes, or set {self.other_classes[0]} to the file's; "
                f"{_NOT_STRICT} leaves these heads as initialised"
            )
        differing = {*self.result.missing, *self.result.unexpected, *self.mismatched}
        if self.source.layout == "rev_det" and not any(key.startswith(self.prefix) for key in differing):
            advice = (
                "The backbones agree, what is built on them does not. Take the config that the file was "
                "trained with (config.yaml of its run) or a file for this one"
            )
            if not self.mismatched and all(key.startswith(_MASK_HEAD) for key in differing):
                on = not self.result.missing
                advice += (
                    f", or set MODEL.MASK_ON {on}: the file was trained {'with' if on else 'without'} masks"
                )
        else:
            node = "MODEL.REV_MVIT" if is_mvit(self.source.backbone) else "MODEL.REV_VIT"
            advice = f"Take the file that is meant for this model, or set {node} to what the file holds"
        return f"{advice}. {_NOT_STRICT} loads what fits and leaves the rest as initialised"

    def _to_model(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the model's types and grids.

        Raises:
            ValueError: values that are not finite or not of the model's kind.
        """
        integers = {key for key in values if not self.targets[key].is_floating_point()}
        check_values(values, integers, self.name)
        found = {}
        for key, value in values.items():
            if value.shape != self.targets[key].shape:
                value = _resize_grid(value, grid_side(tuple(self.targets[key].shape)))
            found[key] = value.to(self.targets[key].dtype)
        check_finite(found, self.name)
        types = Counter((_name_type(value), _name_type(self.targets[key])) for key, value in values.items())
        self.result.notes += [
            f"{count} tensors were converted from {theirs} to {ours}"
            for (theirs, ours), count in types.items()
            if theirs != ours
        ]
        return found


def _holds(keys: Mapping[str, Tensor], module: str) -> bool:
    return any(key.startswith(f"{module}.") for key in keys)


def _name_type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _resize_grid(value: Tensor, side: int) -> Tensor:
    """Interpolate a position embedding, (1, N, C), to ``side`` x ``side`` tokens."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    grid = value.unflatten(1, (grid_side(tuple(value.shape)), -1)).permute(0, 3, 1, 2)  # (1, C, h, w)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)  # (1, C, side, side) -> (1, side * side, C)
