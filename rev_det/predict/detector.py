"""A trained detector, from a training run's folder or a config and weights, and the loop that predicts."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from torch import nn

from ..checkpoint import RevCheckpointer
from ..checkpoint.checkpointer import last_checkpoint
from ..checkpoint.named import PUBLISHED
from ..checkpoint.origin import classes_of_origin
from ..config_files import read_config_file
from ..data.images import check_extent
from ..devices import check_device, device_settings, is_out_of_memory
from ..engine import Precision, build_detector
from ..engine.model_config import read_config
from ..model_zoo import find_config_file
from ..rules import check_choice
from .classes import classes_of_config, classes_of_json, named_classes
from .inputs import Frame, Source, read_frames

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from .output import PredictionWriter

logger = logging.getLogger(__name__)

# Detectron2's default, which cannot be told from an explicit 80.
_DEFAULT_NUM_CLASSES = 80
_CONFIG = "config.yaml"  # what a training run writes into its folder


@dataclass(frozen=True)
class Origin:
    """Where a detector is from.

    Attributes:
        config_file: path of its config.
        weights: path or URL.
    """

    config_file: str
    weights: str

    @classmethod
    def find(cls, run: str | None = None, config: str | None = None, weights: str | None = None) -> Origin:
        """Settle what is not given.

        Args:
            run: folder of a training run; stands for its config and its last checkpoint.
            config: path of a config, or name of one in rev_det's zoo; by default the one beside the weights.
            weights: of a trained detector; by default the run's or the config's.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: what is given is too little, or too much.
        """
        if run is not None and config is not None:
            raise ValueError("--run brings its own config; give either --run or --config-file")
        if run is None and config is None:
            if weights is None:
                raise ValueError(
                    "name a detector: --run OUTPUT_DIR, --weights of a training run, "
                    "or --config-file and --weights"
                )
            if "://" not in weights and not os.path.isfile(weights.partition("#")[0]):
                raise FileNotFoundError(f"--weights {weights} does not exist")
        folder = os.path.dirname(weights or "") if run is None else run
        path = os.path.join(folder, _CONFIG) if config is None else find_config_file(config)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"there is no {path}, which a training run writes; name the detector's own with --config-file"
            )
        if not weights and run is not None:
            noted = os.path.isfile(os.path.join(run, "last_checkpoint"))
            weights = last_checkpoint(run) if noted else os.path.join(run, "model_final.pth")
        weights = weights or read_config_file(path).MODEL.WEIGHTS
        if not weights or weights in {published.url for published in PUBLISHED.values()}:
            raise ValueError(
                f"--weights is missing: MODEL.WEIGHTS of {path} names none of a whole detector; name your own"
            )
        return cls(path, weights)

    def read_config(self, opts: Sequence[str] = (), device: str = "cpu") -> CfgNode:
        """The config as it is used without training and data.

        Args:
            opts: keys and values that override the file's, alternating.
            device: for ``MODEL.DEVICE``.

        Raises:
            FileNotFoundError, ValueError: see `rev_det.engine.load_config`.
        """
        return read_config(self.config_file, opts, device)

    def load_model(self, cfg: CfgNode, classes: list[str] | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """Build the detector and load its weights, all of which must be there.

        Args:
            cfg: of `read_config`.
            classes: names, to be compared with those of the training if they are known.

        Returns:
            the model, and what else its checkpoint holds.

        Raises:
            FileNotFoundError, ValueError: the config cannot be built, or the weights are not the model's.
        """
        model = build_detector(cfg)
        loaded = RevCheckpointer(
            model,
            strict_weights=cfg.MODEL.REV.STRICT_WEIGHTS,
            strict_classes=cfg.MODEL.REV.STRICT_CLASSES,
            evaluation=True,
            origin={"classes": classes},
        ).load(self.weights, checkpointables=[])
        return model, loaded


@dataclass
class Detector:
    """Predicts on images of any size, as Detectron2's ``DefaultPredictor``, but on batches and in RGB.

    Attributes:
        cfg: the config that the model was built from.
        model: returns instances; it is put into evaluation mode.
        classes: of the model, with ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``.
        precision: the arithmetic.
        threshold: lowest score to return.
        only: indices of the classes to return; None for all.

    Raises:
        ValueError: the config's image format is neither RGB nor BGR.
    """

    cfg: CfgNode
    model: nn.Module
    classes: Metadata
    precision: Precision
    threshold: float = 0.5
    only: frozenset[int] | None = None

    def __post_init__(self) -> None:
        check_choice("INPUT.FORMAT", self.cfg.INPUT.FORMAT, ("RGB", "BGR"))
        self.model.eval()

    def __call__(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Predict on a batch.

        Args:
            images: each (H, W, 3), RGB, uint8.

        Returns:
            for each image its instances on the CPU, in pixels of the image.

        Raises:
            MemoryError: the batch does not fit into memory.
            ValueError: the model returns no instances.
        """
        try:
            inputs = [self._prepare(image) for image in images]
            with torch.inference_mode(), device_settings(self.cfg), self.precision.autocast():
                results = self.model(inputs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            many = f"{len(images)} images at a time do" if len(images) > 1 else "the image does"
            raise MemoryError(f"{many} not fit into memory") from error
        if not all("instances" in result for result in results):
            raise ValueError(
                f"a {type(self.model).__name__} returns {', '.join(results[0])}, and no instances to show"
            )
        return [self._chosen(result["instances"].to("cpu")) for result in results]

    def check(self, image: np.ndarray) -> None:
        """Whether there is anything left of an image once it is resized.

        Args:
            image: (H, W, 3).

        Raises:
            ValueError: there is not.
        """
        check_extent(*image.shape[:2], self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST)

    def _prepare(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        keys = self.cfg.INPUT
        if keys.FORMAT == "BGR":
            image = image[:, :, ::-1]
        resize = T.ResizeShortestEdge([keys.MIN_SIZE_TEST] * 2, keys.MAX_SIZE_TEST)
        resized = resize.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))  # (3, H, W)
        return {"image": pixels, "height": height, "width": width}

    def _chosen(self, instances: Instances) -> Instances:
        keep = instances.scores >= self.threshold
        if self.only is not None:
            keep &= torch.isin(instances.pred_classes, torch.tensor(sorted(self.only)))
        return instances[keep]


def load_detector(
    origin: Origin,
    *,
    device: str | None = None,
    threshold: float = 0.5,
    only: Sequence[str] = (),
    amp: bool | None = None,
    dataset_json: str | None = None,
    opts: Sequence[str] = (),
) -> Detector:
    """Build a detector and load its weights, all of which must be there.

    Args:
        origin: its config and weights.
        device: "cpu", "cuda" or "cuda:N"; None for a GPU if there is one.
        threshold: lowest score to return, from 0 to 1.
        only: names of the classes to return; all if empty.
        amp: mixed precision; None for as the config says on a GPU, and none on the CPU.
        dataset_json: a file in COCO's format with the classes; None for those of the config's data.
        opts: keys and values that override the config's, alternating.

    Raises:
        FileNotFoundError: the weights or ``dataset_json`` do not exist.
        ValueError: the config, the weights or the classes do not go together, or an argument is not valid.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"--threshold must be from 0 to 1, got {threshold}")
    device = check_device("--device", device)
    cfg = origin.read_config(opts, device)
    cfg.defrost()
    if dataset_json:
        found = classes_of_json(dataset_json)
    else:
        data = read_config_file(origin.config_file)
        data.merge_from_list(list(opts))
        found = classes_of_config(data)
    count = _settle_count(cfg, found, dataset_json, opts)
    if amp is None:
        amp = cfg.SOLVER.AMP.ENABLED and device != "cpu"
    cfg.SOLVER.AMP.ENABLED = amp
    # What lies below it is not worth a mask, and what lies above it must not be left out before.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    known = found is not None and len(found.thing_classes) == count
    model, loaded = origin.load_model(cfg, found.thing_classes if known else None)
    classes = found if known else _unknown_classes(classes_of_origin(loaded.get("made_by")), count)
    chosen = _indices(classes.thing_classes, only) if only else None
    return Detector(cfg, model, classes, Precision.from_config(cfg), threshold, chosen)


def predict(
    detector: Detector,
    sources: Sequence[Source],
    writer: PredictionWriter,
    batch_size: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[str, str]]:
    """Predict on files, and write the results in their order.

    Args:
        detector: the detector.
        sources: the files.
        writer: takes the results; it is left open.
        batch_size: pictures at a time, at least 1.
        done: is told how many further pictures are finished.

    Returns:
        path and reason of each file that could not be read, or not to its end, or does not fit into memory.

    Raises:
        ValueError: the batch size is none, or a batch of several does not fit into memory.
        OSError: results cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    failures: list[tuple[str, str]] = []
    frames = _usable_frames(detector, sources, failures)
    while batch := list(islice(frames, batch_size)):
        try:
            results = detector([frame.image for frame in batch])
        except MemoryError as error:
            if len(batch) > 1:
                raise ValueError(f"{error}; lower --batch-size") from error
            failures.append((batch[0].source.path, str(error)))
            results = []
        for frame, instances in zip(batch, results, strict=False):
            writer.add(frame, instances)
        done(len(batch))
    return failures


def _settle_count(cfg: CfgNode, found: Metadata | None, dataset_json: str | None, opts: Sequence[str]) -> int:
    """The model's number of classes, which is set if it is left to the data (in place)."""
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    key = f"MODEL.{head}.NUM_CLASSES"
    own = found is not None and found.name == Metadata.name  # others have a name in Detectron2's catalog
    if own and cfg.MODEL[head].NUM_CLASSES == _DEFAULT_NUM_CLASSES and key not in opts:
        cfg.MODEL[head].NUM_CLASSES = len(found.thing_classes)
    count = cfg.MODEL[head].NUM_CLASSES
    if dataset_json and len(found.thing_classes) != count:
        raise ValueError(
            f"--dataset-json {dataset_json} has {len(found.thing_classes)} classes, but the detector has "
            f"{count} ({key}); name the file that it was trained on"
        )
    return count


def _unknown_classes(names: Sequence[str] | None, count: int) -> Metadata:
    """Without the data: the names that a checkpoint keeps, or none."""
    kept = names is not None and len(names) == count
    logger.warning(
        "The data of the detector's config are not at hand, or have not its %d classes. The classes are "
        "numbered from 1, and their names are %s; --dataset-json FILE, in COCO's format, gives both",
        count,
        "those that the checkpoint keeps" if kept else "not known",
    )
    return named_classes(names if kept else [f"class {i}" for i in range(1, count + 1)])


def _indices(known: Sequence[str], names: Sequence[str]) -> frozenset[int]:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            listed = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
            hint = f"did you mean {' or '.join(close)}?" if close else f"the classes are {listed}"
            raise ValueError(f"--classes: the detector has no class {name!r}; {hint}")
    return frozenset(index for index, name in enumerate(known) if name in names)


def _usable_frames(
    detector: Detector, sources: Sequence[Source], failures: list[tuple[str, str]]
) -> Iterator[Frame]:
    for source in sources:
        # Errors of the detector or the writer are raised outside of this generator.
        try:
            for frame in read_frames(source):
                detector.check(frame.image)
                yield frame
        except (ValueError, OSError) as error:
            failures.append((source.path, str(error)))
