"""A trained detector, ready to predict: from a training run's folder, or from a config and weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ..analysis.cases import read_config
from ..checkpoint import RevCheckpointer
from ..checkpoint.checkpointer import last_checkpoint
from ..checkpoint.named import PUBLISHED
from ..checkpoint.origin import classes_of_origin
from ..config_files import read_config_file
from ..data.images import check_extent
from ..devices import check_device, device_settings, is_out_of_memory
from ..engine import Precision, build_detector
from ..model_zoo import find_config_file
from .classes import Classes, classes_from_json, classes_of_config, files_of_config, training_folder

if TYPE_CHECKING:
    from detectron2.config import CfgNode

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
        if run is not None:
            if config is not None:
                raise ValueError("--run brings its own config; give either --run or --config-file")
            if not os.path.isdir(run):
                raise FileNotFoundError(f"--run {run} is not a folder; name the OUTPUT_DIR of a training run")
            if not os.path.isfile(os.path.join(run, _CONFIG)):
                raise FileNotFoundError(f"--run {run} has no {_CONFIG}, which a training run writes into it")
            return cls(os.path.join(run, _CONFIG), weights or _last_checkpoint(run))
        if config is None and weights is None:
            raise ValueError(
                "name a detector: --run OUTPUT_DIR, --weights of a training run, "
                "or --config-file and --weights"
            )
        if config is None:
            if "://" not in weights and not os.path.isfile(weights.partition("#")[0]):
                raise FileNotFoundError(f"--weights {weights} does not exist")
            beside = os.path.join(os.path.dirname(weights), _CONFIG)
            if not os.path.isfile(beside):
                raise ValueError(
                    f"there is no {_CONFIG} beside {weights}: name the detector's own with --config-file"
                )
            return cls(beside, weights)
        if os.path.isfile(config):
            return cls(config, weights or _weights_of(config))
        path = find_config_file(config)
        if not weights:
            raise ValueError(
                f"--weights is missing: no trained weights are published for {config}, name those of your own"
            )
        return cls(path, weights)


class Detector:
    """Predicts on images of any size.

    Args:
        cfg: the config that the model was built from.
        model: returns instances; it is put into evaluation mode.
        classes: of the model.
        precision: the arithmetic.
        threshold: lowest score to return.
        only: indices of the classes to return; None for all.

    Raises:
        ValueError: the config's image format is neither RGB nor BGR.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        classes: Classes,
        precision: Precision,
        threshold: float = 0.5,
        only: frozenset[int] | None = None,
    ):
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; allowed are 'RGB' and 'BGR'")
        self.cfg = cfg
        self.model = model.eval()
        self.classes = classes
        self.precision = precision
        self.threshold = threshold
        self.only = only
        self._flipped = cfg.INPUT.FORMAT == "BGR"
        self._resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

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
        inputs = [self._prepare(image) for image in images]
        try:
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

    def highest_score(self, images: Sequence[np.ndarray]) -> float | None:
        """The score of what would be found first if the threshold were lower.

        Args:
            images: each (H, W, 3), RGB, uint8; one batch.

        Returns:
            of the classes to return; None if nothing of them is found at any threshold.

        Raises:
            ValueError: as for a prediction.
        """
        # Where Detectron2's heads keep the threshold that they were built with.
        heads = [module for module in self.model.modules() if hasattr(module, "test_score_thresh")]
        saved = self.threshold, [head.test_score_thresh for head in heads]
        try:
            self.threshold = 0.0
            for head in heads:
                head.test_score_thresh = 0.0
            found = self(images)
        finally:
            self.threshold = saved[0]
            for head, threshold in zip(heads, saved[1], strict=True):
                head.test_score_thresh = threshold
        return max((score for instances in found for score in instances.scores.tolist()), default=None)

    def _prepare(self, image: np.ndarray) -> dict:
        height, width = image.shape[:2]
        resized = self._resize.get_transform(image).apply_image(image[:, :, ::-1] if self._flipped else image)
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
    cfg = read_config(origin.config_file, opts, device)
    cfg.defrost()
    if dataset_json:
        found, absent = classes_from_json(dataset_json), ""
    else:
        found, absent = _classes_of(origin.config_file, opts)
    count = _settle_count(cfg, found, dataset_json, opts)
    if amp is None:
        amp = cfg.SOLVER.AMP.ENABLED and device != "cpu"
    cfg.SOLVER.AMP.ENABLED = amp
    # What lies below it is not worth a mask, and what lies above it must not be left out before.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    model = build_detector(cfg)
    known = found is not None and len(found.names) == count
    loaded = RevCheckpointer(
        model,
        strict_weights=cfg.MODEL.REV.STRICT_WEIGHTS,
        strict_classes=cfg.MODEL.REV.STRICT_CLASSES,
        evaluation=True,
        origin={"classes": list(found.names) if known else None},
    ).load(origin.weights, checkpointables=[])
    classes = found if known else _classes_of_checkpoint(loaded, count)
    if classes is None:
        logger.warning(
            "The names of the detector's %d classes are not known: %s. They are numbered; --dataset-json "
            "FILE, in COCO's format, names them",
            count,
            absent if found is None else f"the data of its config have {len(found.names)}",
        )
        classes = Classes.numbered(count)
    chosen = classes.indices(only) if only else None
    return Detector(cfg, model, classes, Precision.from_config(cfg), threshold, chosen)


def _last_checkpoint(run: str) -> str:
    try:
        return last_checkpoint(run)
    except FileNotFoundError:
        return os.path.join(run, "model_final.pth")


def _weights_of(config: str) -> str:
    """``MODEL.WEIGHTS`` of a file, unless that is a published backbone's.

    Raises:
        OSError, ValueError: the file cannot be read, or there are none of a detector.
    """
    weights = read_config_file(config).MODEL.WEIGHTS
    if not weights or weights in {published.url for published in PUBLISHED.values()}:
        found = "a backbone's alone" if weights else "none"
        raise ValueError(
            f"--weights is missing: MODEL.WEIGHTS of {config} are {found}, name a trained detector's"
        )
    return weights


def _classes_of(config_file: str, opts: Sequence[str]) -> tuple[Classes | None, str]:
    """The classes of a config's data; if there are none, where they were looked for."""
    cfg = read_config_file(config_file)
    start = training_folder(cfg.OUTPUT_DIR, os.path.dirname(config_file))
    folders = ("",) if start is None else (start, "")
    cfg.merge_from_list(list(opts))
    found = classes_of_config(cfg, folders)
    paths = [path for tried in files_of_config(cfg, folders).values() for path in tried]
    if found is not None:
        return found, ""
    return None, f"there is no {' or '.join(paths)}" if paths else "its config names no data at hand"


def _settle_count(cfg: CfgNode, found: Classes | None, dataset_json: str | None, opts: Sequence[str]) -> int:
    """The model's number of classes, which is set if it is left to the data (in place)."""
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    key = f"MODEL.{head}.NUM_CLASSES"
    count = cfg.MODEL[head].NUM_CLASSES
    if found is not None and found.own and count == _DEFAULT_NUM_CLASSES and key not in opts:
        count = cfg.MODEL[head].NUM_CLASSES = len(found.names)
    if dataset_json and len(found.names) != count:
        raise ValueError(
            f"--dataset-json {dataset_json} has {len(found.names)} classes, but the detector has {count} "
            f"({key}); name the file that it was trained on"
        )
    return count


def _classes_of_checkpoint(loaded: Mapping[str, Any], count: int) -> Classes | None:
    """Where the data are not at hand: the names that a checkpoint keeps, with ids from 1 on."""
    names = classes_of_origin(loaded.get("made_by"))
    return Classes(tuple(names), tuple(range(1, count + 1))) if names and len(names) == count else None
