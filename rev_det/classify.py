"""ImageNet classification, to confirm a weight file from end to end: the published files' heads put back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from .checkpoint.named import PUBLISHED, NamedWeights, load_named_model
from .data.images import open_image
from .engine.amp import Precision

IMAGE_SIDE = 224
_RESIZE = 256  # of the shorter side, before the crop
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


class Classifier(nn.Module):
    """A backbone and its classifier: the last feature map's mean over all positions, then a linear layer.

    Args:
        backbone: returns {name: (B, C, H, W)}, the last scale last.
        head: linear, from that scale's C to the classes.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), preprocessed, to logits (B, classes)."""
        return self.classify(self.backbone(images))

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """The logits, (B, classes), from the backbone's feature maps."""
        last = list(features.values())[-1]
        # In the head's own precision: bfloat16 is too coarse to rank classes.
        with torch.autocast(last.device.type, enabled=False):
            return self.head(last.to(self.head.weight.dtype).mean(dim=(2, 3)))


def load_classifier(source: str | os.PathLike | Mapping) -> tuple[Classifier, NamedWeights]:
    """Load a published classifier, in eval mode.

    Args:
        source: as `rev_det.checkpoint.load_pretrained`'s, with the classifier's head in it.

    Returns:
        the classifier, and what it was made of.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: the file fits no named model, does not fill it, or holds no classifier.
    """
    weights = load_named_model(source)
    if weights.head is None:
        published = PUBLISHED.get(weights.model)
        raise ValueError(
            f"{weights.report.source} holds no classifier (a weight `head.projection` or `head.fc`). "
            "Converted files and detectors have none: take the published file"
            + (f", {published.url}" if published else "")
        )
    return Classifier(weights.backbone, weights.head).eval(), weights


def preprocessing() -> transforms.Compose:
    """The official models' for validation: a PIL image to (3, 224, 224), RGB, with ImageNet's statistics."""
    return transforms.Compose(
        [
            transforms.Resize(_RESIZE, InterpolationMode.BICUBIC),
            transforms.CenterCrop(IMAGE_SIDE),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )


class ImageFiles(Dataset):
    """Image files, preprocessed. A file that cannot be read is an item, too: it is named with the reason.

    Args:
        paths: of the files.
        labels: class index of each; None if they are not known.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | None = None):
        if not paths:
            raise ValueError("there are no images to classify")
        self.paths = list(paths)
        self.labels = None if labels is None else list(labels)
        self.transform = preprocessing()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, classes: int) -> ImageFiles:
        """ImageNet's validation images: ``folder/CLASS/*``, classes numbered in the order of their names.

        Args:
            folder: with one folder for each class.
            classes: how many there must be.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it has another number of class folders, or no images.
        """
        folder = os.fspath(folder)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder {folder}")
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if len(found) != classes:
            raise ValueError(
                f"{folder} has {len(found)} folders, but the classifier has {classes} classes. Its images "
                "must be sorted into one folder for each class, all of them: a class's number is its "
                "folder's place in the order of their names"
            )
        samples = ImageFolder(folder, allow_empty=True).samples
        if not samples:
            raise ValueError(f"there are no images in the {classes} class folders of {folder}")
        paths, labels = zip(*samples, strict=True)
        return cls(paths, labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        """The index, the image (None if it cannot be read), and then why."""
        try:
            with open_image(self.paths[index]) as image:
                return index, self.transform(image.convert("RGB")), ""
        except Exception as error:  # a damaged file makes PIL raise errors of many kinds
            return index, None, " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Predictions:
    """Of a batch.

    Attributes:
        paths: of the images that could be read, n of them.
        labels: (n,) class indexes, on the CPU; None if they are not known.
        probabilities: (n, classes), float32, on the CPU.
        unreadable: path and reason of each file that could not be read.
    """

    paths: list[str]
    labels: Tensor | None
    probabilities: Tensor
    unreadable: list[tuple[str, str]]


@dataclass
class Accuracy:
    """Counts of images: all, and those with the right class first and among the first five."""

    images: int = 0
    top1: int = 0
    top5: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, batch: Predictions) -> None:
        """Count a batch whose labels are known."""
        first = batch.probabilities.topk(min(5, batch.probabilities.shape[1])).indices  # (n, 5)
        hits = first == batch.labels[:, None]
        self.images += len(batch.paths)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.unreadable += batch.unreadable


def predict(
    classifier: Classifier,
    files: ImageFiles,
    precision: Precision,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[Predictions]:
    """Classify files, batch by batch in their order.

    Args:
        classifier: moved to the device.
        files: the images.
        precision: the arithmetic, for this device.
        device: where to compute.
        batch_size: images at a time, at least 1.
        workers: processes that read images; 0 reads them in this one.

    Raises:
        ValueError: the batch size or the number of workers is none, logits are not finite, or a batch does
            not fit into the GPU's memory.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"the batch size must be at least 1 and workers at least 0: {batch_size}, {workers}")
    return _predict(classifier.to(device), files, precision, device, batch_size, workers)


def _predict(
    classifier: Classifier,
    files: ImageFiles,
    precision: Precision,
    device: str | torch.device,
    batch_size: int,
    workers: int,
) -> Iterator[Predictions]:
    # One batch is read sooner than a process starts.
    workers = workers if len(files) > batch_size else 0
    for samples in DataLoader(files, batch_size, num_workers=workers, collate_fn=list):
        images = [image for _, image, _ in samples if image is not None]
        indexes = [index for index, image, _ in samples if image is not None]
        logits = torch.zeros(0, classifier.head.out_features)
        if images:
            try:
                with torch.inference_mode(), precision.autocast():
                    logits = classifier(torch.stack(images).to(device)).float().cpu()
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{len(images)} images at a time do not fit into the GPU's memory; lower --batch-size"
                ) from error
            if not logits.isfinite().all():
                raise ValueError(
                    f"the logits of {files.paths[indexes[0]]} or images after it are not finite: the "
                    f"weights' values are too large for {precision}"
                )
        yield Predictions(
            paths=[files.paths[index] for index in indexes],
            labels=None if files.labels is None else torch.tensor([files.labels[i] for i in indexes]),
            probabilities=logits.softmax(dim=1),
            unreadable=[(files.paths[index], why) for index, image, why in samples if image is None],
        )


def read_labels(path: str | os.PathLike, classes: int) -> list[str]:
    """Names of classes from a text file with one name on each line, in the order of their indexes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or has another number of lines than there are classes.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)} with the classes' names")
    try:
        with open(path, encoding="utf-8") as file:
            names = file.read().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not a text file in UTF-8: {error}") from error
    if len(names) != classes:
        raise ValueError(
            f"{os.fspath(path)} has {len(names)} lines, but the classifier has {classes} classes; it must "
            "name one on each line, in the order of their indexes"
        )
    return [name.strip() for name in names]
