"""What is written of predictions: pictures, videos, and results in COCO's format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
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
from torch.nn import functional

from ..files import (
    check_kept,
    check_output,
    naming,
    part_path,
    printable,
    whole_file,
    write_json,
    write_whole,
)
from .classes import coco_names
from .inputs import Frame, Source

# Images whose longer side is shorter, in pixels, are enlarged: labels would not be legible.
_LEGIBLE = 448
_JPEG_QUALITY = 95
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

    def __init__(
        self, folder: str, classes: Metadata, dataset_json: str | None = None, pictures: bool = True
    ):
        self.folder = Path(folder)
        self.counts: Counter[str] = Counter()
        self._pictures = pictures
        self._names = classes.thing_classes
        indices = classes.get("thing_dataset_id_to_contiguous_id") or range(len(self._names))
        self._category_ids = sorted(indices, key=lambda number: indices[number])
        self._metadata = Metadata(thing_classes=[printable(name) for name in self._names])
        known = coco_names(dataset_json, "images", "file_name") if dataset_json else {}
        self._known = {Path(name).parts: number for number, name in known.items()}
        self._used: dict[int, str] = {}
        self._next_id = 1 + max(known, default=0)
        self._images: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._video: _VideoFile | None = None
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
            instances: on the CPU, in pixels of the frame; keypoints are changed, as Detectron2 writes them.

        Raises:
            OSError: a picture or video cannot be written.
            ValueError: two files are the same image of ``dataset_json``.
        """
        if self._video is not None and self._video.source != frame.source:
            self._finish_video()
        height, width = frame.image.shape[:2]
        path = frame.source.path
        image = {"id": self._image_id(frame), "file_name": path, "height": height, "width": width}
        if frame.index is not None:
            image["frame"] = frame.index
        if self._pictures:
            self._draw(frame, instances)
        self._images.append(image)
        results = instances_to_coco_json(instances, image["id"])
        for result in results:
            index = result["category_id"]
            self.counts[self._names[index]] += 1
            result["category_id"] = self._category_ids[index]
        self._results += results

    def close(self) -> None:
        """Complete the video and write the JSON files."""
        try:
            self._finish_video()
        finally:
            pairs = zip(self._category_ids, self._names, strict=True)
            categories = [{"id": number, "name": name} for number, name in pairs]
            write_json(str(self.folder / RESULTS), self._results, indent=None)
            images = {"images": self._images, "categories": categories}
            write_json(str(self.folder / IMAGES), images, indent=None)

    def files(self) -> int:
        """How many files there are predictions on."""
        return len({image["file_name"] for image in self._images})

    @matplotlib.rc_context({"text.parse_math": False})  # names of classes may have dollar signs
    def _draw(self, frame: Frame, instances: Instances) -> None:
        height, width = frame.image.shape[:2]
        image, instances = _padded(frame.image, instances)
        if frame.index is not None:
            if self._video is None:
                self._video = _VideoFile(self.folder, frame, image.shape[:2], self._metadata)
            self._video.add(image, instances)
            return
        # Beyond 4 times, Detectron2 rounds the size of letters to zero.
        scale = min(4.0, max(1.0, _LEGIBLE / max(height, width)))
        visualizer = Visualizer(image, self._metadata, scale=scale)
        picture = visualizer.draw_instance_predictions(instances).get_image()
        picture = picture[: round(scale * height), : round(scale * width)]
        save = partial(Image.fromarray(picture).save, quality=_JPEG_QUALITY)
        write_whole(_picture(self.folder, frame.source), save)

    def _finish_video(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            video.close()

    def _image_id(self, frame: Frame) -> int:
        path = frame.source.path
        parts = Path(path).resolve().parts if frame.index is None else ()
        known = (self._known.get(parts[start:]) for start in range(len(parts)))
        number = next((number for number in known if number is not None), None)
        if number is None:
            self._next_id += 1
            return self._next_id - 1
        other = self._used.setdefault(number, path)
        if other != path:
            raise ValueError(
                f"{other} and {path} are both the image {number} of --dataset-json by their names; name "
                "the images of this file alone"
            )
        return number


class _VideoFile:
    """An annotated video; instances keep their colours from frame to frame."""

    def __init__(self, folder: Path, frame: Frame, size: tuple[int, int], metadata: Metadata):
        self.source = frame.source
        self._path = _picture(folder, frame.source)
        self._frames = 0
        self._visualizer = VideoVisualizer(metadata)
        # A video that a killed program leaves cannot be played.
        part = part_path(self._path)
        with naming(self._path):  # OpenCV does not say why it cannot write
            open(part, "wb").close()
        # As bytes: a name that is not UTF-8 ends the program.
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(os.fsencode(part), codec, frame.rate, size[::-1])
        if not self._writer.isOpened():
            os.remove(part)
            raise OSError(
                f"{self._path} cannot be written: this OpenCV has no MPEG-4; --no-pictures writes JSON alone"
            )

    def add(self, image: np.ndarray, instances: Instances) -> None:
        picture = self._visualizer.draw_instance_predictions(image, instances).get_image()
        self._writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
        self._frames += 1

    def close(self) -> None:
        with whole_file(self._path) as part:
            self._writer.release()
            # OpenCV does not say that it could not write.
            found = max(0, int(cv2.VideoCapture(os.fsencode(part)).get(cv2.CAP_PROP_FRAME_COUNT)))
            if found != self._frames:
                there = f"{found} of {self._frames} frames are there"
                raise OSError(f"{self._path} cannot be written: {there}; is the disk full?")


def check_folder(folder: str, sources: Sequence[Source], inputs: Iterable[str] = ()) -> None:
    """Find before the work that results cannot be written, or would take the place of what is read.

    Args:
        folder: of a `PredictionWriter`.
        sources: what it will write about.
        inputs: paths of what else is read.

    Raises:
        FileNotFoundError, ValueError: naming the place.
    """
    outputs = [os.path.join(folder, name) for name in (RESULTS, IMAGES)]
    outputs += [_picture(folder, source) for source in sources]
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ValueError(f"--output {folder} cannot be made: {there} is a file; name another folder")
    check_output(os.path.join(there, RESULTS), name="--output")
    for path in filter(os.path.isdir, outputs):
        raise ValueError(f"--output {folder} cannot be used: {path} is a folder; name another")
    check_kept(f"--output {folder}", outputs, [*inputs, *(source.path for source in sources)])


def _picture(folder: str | Path, source: Source) -> str:
    return os.path.join(folder, f"{source.name}{'.mp4' if source.is_video else '.jpg'}")


def _padded(image: np.ndarray, instances: Instances) -> tuple[np.ndarray, Instances]:
    """With more pixels on the right and below: codecs take even sizes alone, and Detectron2 takes masks that
    are two pixels wide for polygons."""
    height, width = image.shape[:2]
    below, right = height % 2, max(4 - width, width % 2)
    if not below and not right:
        return image, instances
    fields = instances.get_fields()
    if "pred_masks" in fields:
        fields = fields | {"pred_masks": functional.pad(fields["pred_masks"], (0, right, 0, below))}
    image = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")
    return image, Instances((height + below, width + right), **fields)
