"""Detectron2's checkpointer, exact about weights and careful with files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..files import whole_file, write_text
from .files import local_file, read_checkpoint, split_digest, unsafe_globals
from .layouts import backbone_prefix, convert, holds_reversible_backbone, unwrap
from .loading import LoadMode, LoadPlan, check_finite, name_some, read_source
from .origin import compare_origins, origin_of

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_LAST = "last_checkpoint"
_LONGEST_NAME = 256
_HEURISTICS = "?matching_heuristics=True"  # what Detectron2 understands after a file's name
_WEIGHTS = ("model", "matching_heuristics", "__author__")  # as Detectron2's checkpointer has them


def last_checkpoint(folder: str | os.PathLike) -> str:
    """The path of the checkpoint that was written last, whether it is there or not.

    Raises:
        FileNotFoundError: there is no file ``last_checkpoint`` in the folder.
        ValueError: it cannot be read, or holds something else than the name of a file in the folder.
    """
    note = os.path.join(folder, _LAST)
    name = ""
    if not os.path.lexists(note):
        raise FileNotFoundError(f"there is no {note}")
    with contextlib.suppress(OSError):  # a folder, or a link to nowhere
        with open(note, encoding="utf-8", errors="replace") as f:
            name = f.read(_LONGEST_NAME).strip()
    if not (name.isprintable() and name.endswith(".pth") and name == os.path.basename(name)):
        raise ValueError(f"{note} does not hold the name of a checkpoint beside it; {_whole_beside(note)}")
    return os.path.join(folder, name)


def _whole_beside(path: str) -> str:
    """Of the checkpoints in the folder of a file that cannot be used, the newest that can, for a message."""
    folder = os.path.dirname(path)
    paths = {os.path.join(folder, name) for name in os.listdir(folder or ".") if name.endswith(".pth")}
    for other in sorted(paths - {path}, key=lambda p: (os.path.getmtime(p), p), reverse=True):
        if _is_whole(other):
            return f"{os.path.basename(other)} beside it is whole: write this name into {_LAST} to use it"
    return "no other checkpoint is whole in this folder"


def _is_whole(path: str) -> bool:
    """Whether a checkpoint can be read, and holds numbers."""
    try:
        state = unwrap(read_checkpoint(path), path)
        check_finite({key: torch.as_tensor(value) for key, value in state.items()}, path)
    except (OSError, ValueError):
        return False
    return True


class RevCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` for detectors with reversible backbones, and for any other.

    Models with a Rev-ViT or Rev-MViT load all that `load_pretrained` loads, as exactly. Other models load
    what Detectron2 loads, in its way, but from files that cannot run code (``.pkl`` from ``detectron2://``
    only). Checkpoints are written whole or not at all.

    Args:
        model: the detector, or its ``DistributedDataParallel``.
        save_dir: local folder for checkpoints.
        save_to_disk: None to save on the first process only.
        strict_weights: ``MODEL.REV.STRICT_WEIGHTS``: whatever does not fit is an error. Resuming is always
            strict.
        strict_classes: ``MODEL.REV.STRICT_CLASSES``: to resume or evaluate with other classes than those of
            the training is an error.
        evaluation: the model will be evaluated as loaded: weights without its heads, or with heads for
            another number of classes, are an error unless ``strict_weights`` is False.
        origin: what `origin.origin_of` returns. Each checkpoint keeps it as ``made_by``; how that of one that
            is loaded differs is named.
        checkpointables: further objects with ``state_dict()`` and ``load_state_dict()``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        strict_weights: bool = True,
        strict_classes: bool = True,
        evaluation: bool = False,
        origin: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.mode = LoadMode(strict=strict_weights, evaluation=evaluation)
        self.origin = origin or {}
        self.strict_classes = strict_classes

    @classmethod
    def of_run(
        cls, cfg: CfgNode, model: nn.Module, *, evaluation: bool = False, **checkpointables: Any
    ) -> RevCheckpointer:
        """The checkpointer of a run, or of an evaluation, as its config says.

        Args:
            cfg: a config with rev_det's keys.
            model, evaluation, checkpointables: as above.
        """
        return cls(
            model,
            cfg.OUTPUT_DIR,
            strict_weights=cfg.MODEL.REV.STRICT_WEIGHTS,
            strict_classes=cfg.MODEL.REV.STRICT_CLASSES,
            evaluation=evaluation,
            origin=origin_of(cfg, cfg.DATASETS.TEST if evaluation else cfg.DATASETS.TRAIN),
            **checkpointables,
        )

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the state of checkpointables that the file holds.

        Args:
            path: as `load_pretrained`'s; empty to load nothing, which is an error for evaluation.
            checkpointables: names of those to load; None for all.

        Returns:
            what else our own checkpoint holds, as the iteration.

        Raises:
            FileNotFoundError, ValueError: as `load_pretrained`.
        """
        return self._load(path, checkpointables, self.mode)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint in ``save_dir``; if there is none, or not ``resume``, load weights.

        Args:
            path: of the weights to load if not resuming.
            resume: prefer the last checkpoint, which must then match in everything, checkpointables included.

        Returns:
            as `load`.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """
        if resume and self.has_checkpoint():
            last = self.get_checkpoint_file()
            try:
                return self._load(last, None, LoadMode(evaluation=self.mode.evaluation, resume=True))
            except (FileNotFoundError, ValueError) as error:
                if _is_whole(last):
                    raise
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"{error}; {_whole_beside(last)}") from error
        return self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Whether there is a last checkpoint, or something in its place."""
        return os.path.lexists(os.path.join(self.save_dir, _LAST))

    def get_checkpoint_file(self) -> str:
        """See `last_checkpoint`."""
        return last_checkpoint(self.save_dir)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` and make it the last checkpoint.

        Args:
            name: of the file in ``save_dir``, without its extension.
            kwargs: further plain data to keep.

        Raises:
            ValueError: there is something else than tensors and plain values to be kept, which could not be
                loaded.
            UnwritableError: the file cannot be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        data |= kwargs
        if self.origin:
            data["made_by"] = self.origin
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with whole_file(path) as part:
            with open(part, "wb") as f:
                torch.save(data, f)
                f.flush()
                os.fsync(f.fileno())
            if unsafe := unsafe_globals(part):
                raise ValueError(
                    f"{path} was not written: it would hold {', '.join(unsafe)}, and could not be loaded. "
                    "State that is kept must be tensors, numbers, strings, lists, tuples and dictionaries"
                )
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, _LAST), last_filename_basename)

    def _load(self, path: str, checkpointables: list[str] | None, mode: LoadMode) -> dict[str, Any]:
        if not path:
            if mode.evaluation and mode.strict:
                raise ValueError(
                    "there are no weights to evaluate: set MODEL.WEIGHTS to those of a trained detector"
                )
            return super().load(path)
        reversible = backbone_prefix(self.model.state_dict()) is not None
        container, name = read_source(path) if reversible else self._read_other(path)
        source = convert(container, name) if reversible else None
        # Of other layouts' training state nothing is ours to load.
        own = isinstance(container.get("model"), Mapping) and (not reversible or source.layout == "rev_det")
        rest = {key: value for key, value in container.items() if key not in _WEIGHTS} if own else {}
        absent = [key for key in self.checkpointables if key not in rest]
        if absent and mode.resume:
            raise ValueError(
                f"{name} cannot be resumed from: it holds no state of {', '.join(absent)}. "
                "Start a new run in another OUTPUT_DIR with it as MODEL.WEIGHTS"
            )
        compare_origins(rest.get("made_by"), self.origin, name, mode, self.strict_classes)
        if reversible:
            LoadPlan(self.model, source, name, mode).carry_out()
        else:
            self._load_other({key: container[key] for key in _WEIGHTS if key in container}, name, mode)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in rest:
                try:
                    self.checkpointables[key].load_state_dict(rest.pop(key))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{name} cannot be resumed from: its {key} does not fit this run: {error}. Give "
                        "the SOLVER keys of config.yaml beside it, or start a new run in another OUTPUT_DIR "
                        "with it as MODEL.WEIGHTS"
                    ) from error
        return rest

    def _read_other(self, path: str) -> tuple[dict[str, Any], str]:
        """What a file for a model without a reversible backbone holds, as Detectron2 has it, and its name."""
        source = path.replace(_HEURISTICS, "")
        name, digest = split_digest(source)
        if name.endswith(".pkl"):
            if not name.startswith("detectron2://"):
                raise ValueError(
                    f"{name} is a pickle, which could run code when it is read; .pkl files are read from "
                    "detectron2:// addresses only"
                )
            with local_file(name, digest) as local:
                return super()._load_file(local), name
        container = read_checkpoint(source)
        rest = container if "model" in container else {}
        heuristics = source != path or name.endswith(".pyth")  # which Detectron2 takes for a pycls file
        return {**rest, "model": unwrap(container, name), "matching_heuristics": heuristics}, name

    def _load_other(self, weights: dict[str, Any], name: str, mode: LoadMode) -> None:
        if mode.strict and holds_reversible_backbone(weights["model"]):
            raise ValueError(
                f"the weights of {name} are a Rev-ViT's or Rev-MViT's, but the model's backbone is not "
                "reversible: change MODEL.BACKBONE.NAME or MODEL.WEIGHTS. "
                "MODEL.REV.STRICT_WEIGHTS False loads what fits"
            )
        incompatible = self._load_model(weights)
        self._log_incompatible_keys(incompatible)
        wrong = incompatible.missing_keys  # those of another shape among them
        if wrong and (mode.resume or (mode.evaluation and mode.strict)):
            raise ValueError(
                f"the weights of {name} lack {len(wrong)} tensors of the model, or have them in another "
                f"shape: {name_some(wrong)}. Evaluation and resuming need all of them; to evaluate all the "
                "same, set MODEL.REV.STRICT_WEIGHTS False"
            )
