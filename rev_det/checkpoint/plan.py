"""Which tensor of a source goes where in a model: settled, and checked, before anything is copied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .geometry import NAMED_HEADS, grid_side, read_geometry
from .layouts import Converted, backbone_prefix, is_mvit, last_norm
from .report import LoadReport, name_some

_SCALE_NORM = re.compile(r"(scale\d+_norm)\.\w+")
# Tensors of Detectron2's heads with rows for each class; those of the first group tell how many there are.
_CLASS_ROWS = re.compile(
    r"(?:.*\.)?(?:((?:roi_heads\.box_predictor(?:\.\d+)?|head)\.cls_score|sem_seg_head\.predictor)"
    r"|roi_heads\.(?:box_predictor(?:\.\d+)?\.bbox_pred|mask_head\.predictor))\.(?:weight|bias)"
)
_MASK_HEAD = "roi_heads.mask_head."


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


@dataclass
class LoadPlan:
    """What is to be copied.

    Attributes:
        values: the model's names to tensors of the model's shapes and types.
        report: of what will have been done.
        warnings: that the user must see.
    """

    values: dict[str, Tensor]
    report: LoadReport
    warnings: list[str] = field(default_factory=list)


def plan_load(model: nn.Module, source: Converted, name: str, mode: LoadMode) -> LoadPlan:
    """Decide on every tensor of a source and of a model.

    Args:
        model: a Rev-ViT or Rev-MViT, alone, in a pyramid or in a detector.
        source: the converted weights.
        name: of the source, for messages.
        mode: what is to be an error.

    Raises:
        ValueError: the source does not fit the model, or holds values that are no weights.
    """
    return _Planner(model, source, name, mode).plan()


class _Planner:
    def __init__(self, model: nn.Module, source: Converted, name: str, mode: LoadMode):
        self.source, self.name, self.mode = source, name, mode
        self.strict = mode.strict or mode.resume
        self.targets: dict[str, Tensor] = model.state_dict()
        prefix = backbone_prefix(self.targets)
        if prefix is None:
            raise ValueError(f"{name} is for a Rev-ViT or Rev-MViT, but the model has no such backbone")
        self.prefix = prefix
        attention = dict(model.named_modules()).get(f"{prefix}blocks.0.F.attn")
        self.num_heads: int | None = getattr(attention, "num_heads", None)
        self.report = LoadReport(name, source.layout)
        self.report.dropped += source.dropped
        self.report.unexpected += source.unexpected
        self.warnings: list[str] = []
        self.mismatched: dict[str, tuple[int, ...]] = {}  # with the source's shapes
        self.class_heads: list[str] = []
        self._classes = ("", 0, 0)  # with class heads: as `_count_classes` says

    def plan(self) -> LoadPlan:
        values = self._match_names()
        values = {key: value for key, value in values.items() if self._fits(key, value)}
        self._set_class_heads_aside()
        if self.mode.resume:
            self.report.missing += self.report.initialised
            self.report.unexpected += self.report.dropped
            self.report.initialised, self.report.dropped = [], []
        self._judge()
        values = self._to_model(values)
        self.report.loaded = len(values)
        self.report.expected = len(self.targets) - len(self.report.initialised)
        return LoadPlan(values, self.report, self.warnings)

    def _match_names(self) -> dict[str, Tensor]:
        """Tensors of the source under the model's names; what has no counterpart goes to the report."""
        report, source = self.report, self.source
        aligned = {self.prefix + key: value for key, value in source.backbone.items()}
        inside = ""  # what every tensor of the model that the source can hold starts with
        # A backbone's weights alone are that, whatever its names are prefixed with.
        prefix = source.prefix if source.others else ""
        if prefix.endswith(self.prefix):
            # A detector's weights for a detector, a pyramid or a backbone.
            outer = prefix.removesuffix(self.prefix)
            aligned |= {k.removeprefix(outer): v for k, v in source.others.items() if k.startswith(outer)}
            report.dropped += [key for key in source.others if not key.startswith(outer)]
        else:
            # A backbone's or a pyramid's weights for what contains it; else detectors of two kinds.
            if self.prefix.endswith(prefix):
                inside = self.prefix.removesuffix(prefix)
            aligned |= {inside + key: value for key, value in source.others.items()}

        # Published files have the last scale's norm only, and a backbone need not return every scale.
        loose = prefix == "" or self.prefix == ""
        last = last_norm(key.removeprefix(self.prefix) for key in self.targets)
        for key in self.targets:
            norm = self._scale_norm(key)
            absent = norm is not None and not _holds(aligned, self.prefix + norm)
            if key not in aligned:
                optional = not key.startswith(inside) or (loose and absent and norm != last)
                (report.initialised if optional else report.missing).append(key)
        for key in [key for key in aligned if key not in self.targets]:
            norm = self._scale_norm(key)
            unused = loose and norm is not None and not _holds(self.targets, self.prefix + norm)
            (report.dropped if unused else report.unexpected).append(key)
            del aligned[key]
        return {key: torch.as_tensor(value) for key, value in aligned.items()}

    def _scale_norm(self, key: str) -> str | None:
        match = _SCALE_NORM.fullmatch(key.removeprefix(self.prefix)) if key.startswith(self.prefix) else None
        return match.group(1) if match else None

    def _fits(self, key: str, value: Tensor) -> bool:
        theirs, ours = tuple(value.shape), tuple(self.targets[key].shape)
        if theirs == ours:
            return True
        if key == f"{self.prefix}pos_embed" and not self.mode.resume and theirs[-1:] == ours[-1:]:
            sides = grid_side(theirs), grid_side(ours)
            if None not in sides:
                self.report.resized.append(key)
                self.report.notes.append(
                    f"{key} was resized from {sides[0]} x {sides[0]} to {sides[1]} x {sides[1]} (bicubic)"
                )
                return True
        self.mismatched[key] = theirs
        return False

    def _set_class_heads_aside(self) -> None:
        """Heads for another number of classes keep the model's values if the model is yet to be trained."""
        in_rows = [k for k, shape in self.mismatched.items() if _differ_in_rows(shape, self.targets[k].shape)]
        matches = {key: match for key in in_rows if (match := _CLASS_ROWS.fullmatch(key))}
        if not any(match.group(1) for match in matches.values()):
            return
        self.class_heads = list(matches)
        self._classes = self._count_classes()
        if self.mode.resume or (self.mode.evaluation and self.strict):
            return
        self.warnings.append(
            f"{self.name}: {self._class_counts()}. {len(self.class_heads)} tensors of the heads start anew: "
            f"{name_some(self.class_heads)}"
        )
        for key in self.class_heads:
            del self.mismatched[key]
        self.report.initialised += self.class_heads

    def _class_counts(self) -> str:
        node, theirs, ours = self._classes
        counts = f"{theirs} in the file, {ours} in the model ({node}.NUM_CLASSES)"
        return f"The heads are for another number of classes: {counts}"

    def _count_classes(self) -> tuple[str, int, int]:
        """The config node of the heads that differ in classes, the file's number of them, and the model's."""
        key = next(key for key in self.class_heads if _CLASS_ROWS.fullmatch(key).group(1))
        theirs, ours = self.mismatched[key][0], self.targets[key].shape[0]
        if "box_predictor" in key:  # with one row for the background
            return "MODEL.ROI_HEADS", theirs - 1, ours - 1
        if "sem_seg_head" in key:
            return "MODEL.SEM_SEG_HEAD", theirs, ours
        # RetinaNet's have rows for every anchor and class; its boxes, four for every anchor.
        boxes = self.targets.get(key.replace("cls_score", "bbox_pred"))
        anchors = boxes.shape[0] // 4 if boxes is not None else 1
        return "MODEL.RETINANET", theirs // anchors, ours // anchors

    def _judge(self) -> None:
        """Raise, or warn of, whatever does not fit."""
        report = self.report
        heads = [key for key in report.initialised if not key.startswith(self.prefix)]
        if self.mode.evaluation and heads and not self.class_heads:
            text = (
                f"{self.name} holds no weights for {len(heads)} tensors outside the backbone, which would be "
                f"random: {name_some(heads)}"
            )
            if self.strict:
                raise ValueError(
                    f"{text}. It holds no detection heads: evaluate the weights of a trained detector; to "
                    "evaluate all the same, set strict=False (MODEL.REV.STRICT_WEIGHTS False)"
                )
            self.warnings.append(text)
        found = [
            f"{len(items)} {what}: {name_some(items)}"
            for what, items in (
                ("missing in the file", report.missing),
                ("unexpected in the file", report.unexpected),
                ("of another shape", self._shapes()),
            )
            if items
        ]
        causes = self._causes(bool(found))
        if found or causes:
            details = ". ".join(causes + found)
            text = f"{self.name} ({report.layout} layout) does not fit the model. {details}"
            if self.strict:
                raise ValueError(f"{text}. {self._way_out()}")
            self.warnings.append(text)
        elif not self.mode.resume:
            self._warn_of_heads()
        report.missing += self.mismatched

    def _warn_of_heads(self) -> None:
        """Our files do not say for how many heads they are: they may be a published one's, converted."""
        if (heads := self._other_heads()) is not None:
            size = read_geometry(self.source.backbone)
            self.warnings.append(
                f"{self.name} has the size of a {size}, whose first block has {heads} attention heads; the "
                f"model's has {self.num_heads} (NUM_HEADS). That is right for weights that were trained so, "
                "and wrong for a published file's that were converted"
            )

    def _shapes(self) -> list[str]:
        return [
            f"{key} {shape} in the file, {tuple(self.targets[key].shape)} in the model"
            for key, shape in self.mismatched.items()
        ]

    def _causes(self, differs: bool) -> list[str]:
        """Likely reasons for the differences; other numbers of heads make one of their own."""
        theirs = read_geometry(self.source.backbone)
        ours = read_geometry(
            {k.removeprefix(self.prefix): v for k, v in self.targets.items() if k.startswith(self.prefix)}
        )
        causes = []
        if differs and theirs.family != ours.family:
            causes.append(f"Another family: the file holds a {theirs}, the model is a {ours}")
        elif differs and (sizes := theirs.differences(ours)):
            text = f"Another size: the file holds a {theirs}, the model is a {ours}"
            causes.append(f"{text}, with another {', '.join(sizes)}" if str(theirs) == str(ours) else text)
        elif self.class_heads and self.class_heads[0] in self.mismatched:
            causes.append(self._class_counts())
        heads = self._other_heads()
        if heads is not None and self.source.layout != "rev_det" and not causes:
            causes.append(
                f"Another number of attention heads: the file's first block has {heads}, the model's has "
                f"{self.num_heads} (NUM_HEADS)"
            )
        return causes

    def _other_heads(self) -> int | None:
        """Attention heads of the first block of the source, if they are known and not the model's."""
        heads = NAMED_HEADS.get(read_geometry(self.source.backbone).model, self.source.num_heads)
        return None if self.num_heads in (None, heads) else heads

    def _way_out(self) -> str:
        if self.mode.resume:
            return "Resume with the config the run was started with, or start a new run in another OUTPUT_DIR"
        if self.class_heads and self.mismatched.keys() == set(self.class_heads):
            return (
                f"Evaluate weights for the model's classes, or set {self._classes[0]}.NUM_CLASSES to the "
                "file's; strict=False (MODEL.REV.STRICT_WEIGHTS False) leaves these heads as initialised"
            )
        differing = {*self.report.missing, *self.report.unexpected, *self.mismatched}
        if self.source.layout == "rev_det" and not any(key.startswith(self.prefix) for key in differing):
            return self._way_out_of_heads(differing)
        node = "MODEL.REV_MVIT" if is_mvit(self.source.backbone) else "MODEL.REV_VIT"
        return (
            f"Take the file that is meant for this model, or set {node} to what the file holds; strict=False "
            "(MODEL.REV.STRICT_WEIGHTS False) loads what fits and leaves the rest as initialised"
        )

    def _way_out_of_heads(self, differing: set[str]) -> str:
        """Where the backbones agree, and what is built upon them does not."""
        masks = [key for key in differing if key.startswith(_MASK_HEAD)]
        advice = (
            "The backbones agree, what is built on them does not. Take the config that the file was trained "
            "with (config.yaml of its run) or a file for this one"
        )
        if len(masks) == len(differing) and not self.mismatched:
            on = not self.report.missing
            advice += f", or set MODEL.MASK_ON {on}: the file was trained {'with' if on else 'without'} masks"
        return (
            f"{advice}. strict=False (MODEL.REV.STRICT_WEIGHTS False) loads what fits and leaves the rest as "
            "initialised"
        )

    def _to_model(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the model's types and grids.

        Raises:
            ValueError: values that are not finite or not of the model's kind.
        """
        resized, converted, kinds = {}, {}, {}
        for key, value in values.items():
            target = self.targets[key]
            wanted = "integer" if not target.is_floating_point() else "float"
            if _kind(value) != wanted or (self.mode.resume and value.dtype != target.dtype):
                kinds[key] = f"{key} is {_dtype(value)}, not {_dtype(target)}"
                continue
            if value.dtype != target.dtype:
                converted.setdefault((_dtype(value), _dtype(target)), []).append(key)
            if value.shape != target.shape:
                value = _resize_grid(value, grid_side(tuple(target.shape)))
            resized[key] = value.to(target.dtype)
        if kinds:
            raise ValueError(f"{self.name} holds values that are no weights: {name_some(kinds.values())}")
        broken = [key for key, value in resized.items() if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(
                f"{self.name} holds NaN, infinite or too large values in {len(broken)} tensors: "
                f"{name_some(broken)}. It is damaged, or the training it comes from had diverged"
            )
        for (theirs, ours), keys in converted.items():
            self.report.notes.append(f"{len(keys)} tensors were converted from {theirs} to {ours}")
        return resized


def _holds(keys: Mapping[str, Tensor], module: str) -> bool:
    return any(key.startswith(f"{module}.") for key in keys)


def _differ_in_rows(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and tuple(one[1:]) == tuple(other[1:])


def _kind(value: Tensor) -> str:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "sparse, quantized or without values"
    return "float" if value.is_floating_point() else "complex" if value.is_complex() else "integer"


def _dtype(value: Tensor) -> str:
    kind = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
    return str(value.dtype).removeprefix("torch.") + kind


def _resize_grid(value: Tensor, side: int) -> Tensor:
    """Interpolate a position embedding, (1, N, C), to ``side`` x ``side`` tokens."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    grid = value.unflatten(1, (grid_side(tuple(value.shape)), -1)).permute(0, 3, 1, 2)  # (1, C, h, w)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)  # (1, C, side, side) -> (1, side * side, C)
