"""What is written of predictions: pictures, videos, and results in COCO's format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ..files import part_path, read_json, whole_file, write_json, write_whole
from ..rules import is_whole
from .classes import Classes
from .inputs import Frame, Source

# Images whose longer side is shorter, in pixels, are enlarged: labels would not be legible.
_LEGIBLE = 448
_JPEG_QUALITY = 95
# Tried in this order; which of them OpenCV can write depends on how it was built.
_CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))
RESULTS, IMAGES = "predictions.json", "images.json"


class PredictionWriter:
    """Writes predictions into a folder; to be closed, or used in a ``with`` statement.

    - ``NAME.jpg`` or ``NAME.mp4`` for each source: what was found, drawn by Detectron2.
    - ``predictions.json``: detections in COCO's result format. Of videos each frame is an image. If nothing
      was found it is an empty list, which pycocotools cannot load.
    - ``images.json``: which file or frame an ``image_id`` is, and the categories; with it,
      ``COCO("images.json").loadRes("predictions.json")`` works.

    Args:
        folder: made if missing.
        classes: of the detector.
        dataset_json: a file in COCO's format, whose image ids are used for its images; others are counted on.
        pictures: False to write the JSON files alone.

    Raises:
        ValueError: ``dataset_json`` is not in COCO's format.
    """

    def __init__(self, folder: str, classes: Classes, dataset_json: str | None = None, pictures: bool = True):
        self.folder = Path(folder)
        self.classes = classes
        self.counts: Counter[str] = Counter()
        self._pictures = pictures
        self._metadata = Metadata(name="predictions", thing_classes=list(classes.names))
        self._ids = _known_images(dataset_json) if dataset_json else {}
        self._next_id = 1 + max((i for images in self._ids.values() for _, i in images), default=0)
        self._images: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._video: _VideoFile | None = None
        self._written: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        # Of an interrupted run what there is; but not nothing, in the place of earlier results.
        if error is None or self._images:
            self.close()
        else:
            self._finish_video()

    def add(self, frame: Frame, instances: Instances) -> None:
        """Write a picture, and keep its detections until `close`.

        Args:
            frame: frames of a video must come one after another.
            instances: on the CPU, in pixels of the frame.

        Raises:
            OSError: a picture or video cannot be written.
        """
        if self._video is not None and self._video.source != frame.source:
            self._finish_video()
        if self._pictures:
            self._draw(frame, instances)
        height, width = frame.image.shape[:2]
        image = {
            "id": self._image_id(frame),
            "file_name": frame.source.path,
            "height": height,
            "width": width,
        }
        if frame.index is not None:
            image["frame"] = frame.index
        self._images.append(image)
        results = instances_to_coco_json(_copied(instances), image["id"])
        for result in results:
            self.counts[self.classes.names[result["category_id"]]] += 1
            result["category_id"] = self.classes.ids[result["category_id"]]
        self._results += results

    def close(self) -> None:
        """Complete the video and write the JSON files."""
        self._finish_video()
        pairs = zip(self.classes.ids, self.classes.names, strict=True)
        categories = [{"id": key, "name": name} for key, name in pairs]
        for name, content in (
            (RESULTS, self._results),
            (IMAGES, {"images": self._images, "categories": categories}),
        ):
            write_json(str(self.folder / name), content, indent=None)

    def files(self) -> int:
        """How many files there are predictions on."""
        return len({image["file_name"] for image in self._images})

    def others(self) -> int:
        """How many pictures and videos are in the folder that this writer has not written."""
        extensions = (".jpg", *(extension for _, extension in _CODECS))
        names = {path.name for path in self.folder.iterdir() if path.suffix in extensions}
        return sum(not name.startswith(".part-") for name in names - self._written)

    @matplotlib.rc_context({"text.parse_math": False})  # names of classes may have dollar signs
    def _draw(self, frame: Frame, instances: Instances) -> None:
        if frame.index is not None:
            if self._video is None:
                self._video = _VideoFile(self.folder, frame, self._metadata)
            self._video.add(frame.image, instances)
            return
        # Beyond 4 times, Detectron2 rounds the size of letters to zero.
        scale = min(4.0, max(1.0, _LEGIBLE / max(frame.image.shape[:2])))
        visualizer = Visualizer(frame.image, self._metadata, scale=scale)
        picture = visualizer.draw_instance_predictions(instances).get_image()
        save = partial(Image.fromarray(picture).save, quality=_JPEG_QUALITY)
        name = f"{frame.source.name}.jpg"
        write_whole(str(self.folder / name), save)
        self._written.add(name)

    def _finish_video(self) -> None:
        if self._video is not None:
            self._video.close()
            self._written.add(self._video.path.name)
            self._video = None

    def _image_id(self, frame: Frame) -> int:
        if frame.index is None:
            path = Path(frame.source.path).resolve()
            for parts, key in self._ids.get(path.name, ()):
                if path.parts[-len(parts) :] == parts:
                    return key
        self._next_id += 1
        return self._next_id - 1


class _VideoFile:
    """An annotated video; instances keep their colours from frame to frame."""

    def __init__(self, folder: Path, frame: Frame, metadata: Metadata):
        self.source = frame.source
        self._frames = 0
        self._visualizer = VideoVisualizer(metadata)
        height, width = frame.image.shape[:2]
        for codec, extension in _CODECS:
            self.path = folder / f"{frame.source.name}{extension}"
            # A video that a killed program leaves cannot be played.
            fourcc = cv2.VideoWriter_fourcc(*codec)
            part = part_path(str(self.path))
            self._writer = cv2.VideoWriter(part, fourcc, frame.rate, (width, height))
            if self._writer.isOpened():
                return
        raise OSError(
            f"{self.path} cannot be written: OpenCV has no codec for it; --no-pictures writes JSON alone"
        )

    @matplotlib.rc_context({"text.parse_math": False})  # names of classes may have dollar signs
    def add(self, image: np.ndarray, instances: Instances) -> None:
        picture = self._visualizer.draw_instance_predictions(image, instances).get_image()
        self._writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
        self._frames += 1

    def close(self) -> None:
        with whole_file(str(self.path)) as part:
            self._writer.release()
            # OpenCV does not say that it could not write.
            found = max(0, int(cv2.VideoCapture(part).get(cv2.CAP_PROP_FRAME_COUNT)))
            if found != self._frames:
                raise OSError(
                    f"{self.path} cannot be written: {found} of {self._frames} frames are there; is the disk "
                    "full?"
                )


def check_output(folder: str, sources: Sequence[Source]) -> None:
    """Find before the work that there is no such folder, or a picture in the place of one to predict on.

    Args:
        folder: of a `PredictionWriter`.
        sources: what it will write about.

    Raises:
        ValueError: naming the picture, or what is no folder.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--output {folder} is a file; name a folder, which is made if it is missing")
    paths = {os.path.realpath(source.path) for source in sources}
    for source in sources:
        for extension in (".jpg", *(extension for _, extension in _CODECS)):
            path = os.path.join(folder, f"{source.name}{extension}")
            if os.path.realpath(path) in paths:
                raise ValueError(f"--output {folder} would overwrite {path}; name another folder")


def _copied(instances: Instances) -> Instances:
    """With keypoints of its own: Detectron2 shifts them when it writes them."""
    if not instances.has("pred_keypoints"):
        return instances
    copy = Instances(instances.image_size, **instances.get_fields())
    copy.pred_keypoints = instances.pred_keypoints.clone()
    return copy


def _known_images(dataset_json: str) -> dict[str, list[tuple[tuple[str, ...], int]]]:
    """Parts of ``file_name`` and id of a file's images, by the last part."""
    content = read_json(dataset_json)
    known: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    try:
        for image in content.get("images", []):
            parts = Path(image["file_name"]).parts
            known.setdefault(parts[-1], []).append((parts, image["id"]))
            if not is_whole(image["id"]):
                raise TypeError("an id is no whole number")
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{dataset_json} is not in COCO's format: images need a file_name and a whole number as id"
        ) from error
    return known
