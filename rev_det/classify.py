"""ImageNet classification, to confirm a weight file from end to end: the published files' heads put back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from .checkpoint import LoadResult
from .checkpoint.layouts import convert
from .checkpoint.loading import LoadMode, LoadPlan, read_source
from .checkpoint.named import NAMED_MODELS, read_geometry
from .data.images import open_image
from .engine.amp import Precision

IMAGE_SIDE = 224
_RESIZE = 256  # of the shorter side, before the crop
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
_HEAD = re.compile(r"(?:.*\.)?head\.(?:projection|fc)\.(weight|bias)")  # PySlowFast, mmpretrain


class Classifier(nn.Module):
    """A backbone and its classifier: the last feature map's mean over all positions, then a linear layer.

    Args:
        backbone: returns {name: (B, C, H, W)}, the last scale last.
        head: linear, from that scale's C to the classes; None if there is none.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear | None):
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


def load_classifier(
    source: str | os.PathLike | Mapping, model: str | None = None
) -> tuple[Classifier, str, LoadResult]:
    """Build the named model that a file is for, and load it strictly, with its classifier's head.

    Args:
        source: as `rev_det.checkpoint.load_pretrained`'s.
        model: name of the model, as "rev_vit_s"; None for the one that the file fits.

    Returns:
        the classifier in eval mode, whose backbone returns all scales, the model's name, and the result of
        loading. The head is None if the file holds none.

    Raises:
        FileNotFoundError: no such file, or it cannot be downloaded.
        ValueError: there is no model of that name, the file fits none, or as `load_pretrained`.
    """
    container, name = read_source(source)
    converted = convert(container, name)
    size = read_geometry(converted.backbone)
    known = ", ".join(NAMED_MODELS)
    if model is None and size.model is None:
        raise ValueError(
            f"{name} holds a {size}, which is none of the named models ({known}). "
            "Weights of other sizes are loaded into a config of that size (MODEL.WEIGHTS)"
        )
    model = model or size.model
    if model not in NAMED_MODELS:
        raise ValueError(f"there is no model {model!r}; the named ones are {known}")
    backbone, head = NAMED_MODELS[model].build(), None
    unused = converted.dropped | converted.others
    values = {match.group(1): unused.pop(key) for key in list(unused) if (match := _HEAD.fullmatch(key))}
    if values:
        classes = next((len(value) for value in values.values() if value.ndim), 0)
        head = nn.Linear(list(backbone.output_shape().values())[-1].channels, classes)
    classifier = Classifier(backbone, head).eval()
    heads = {f"head.{key}": value for key, value in values.items()}
    whole = replace(converted, prefix="backbone.", others=heads, dropped=unused)
    return classifier, model, LoadPlan(classifier, whole, name, LoadMode()).carry_out()


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


def find_validation_images(folder: str | os.PathLike, classes: int) -> list[tuple[str, int]]:
    """ImageNet's validation images: ``folder/CLASS/*``, classes numbered in the order of their names.

    Args:
        folder: with one folder for each class.
        classes: how many there must be.

    Returns:
        path and class index of each.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has another number of class folders, or no images.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}")
    found = sum(entry.is_dir() for entry in os.scandir(folder))
    if found != classes:
        raise ValueError(
            f"{folder} has {found} folders, but the classifier has {classes} classes. Its images "
            "must be sorted into one folder for each class, all of them: a class's number is its "
            "folder's place in the order of their names"
        )
    samples = ImageFolder(folder, allow_empty=True).samples
    if not samples:
        raise ValueError(f"there are no images in the {classes} class folders of {folder}")
    return samples


class _Images(Dataset):
    """Images, preprocessed, with ""; or None with the reason why a file cannot be read."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self.transform = preprocessing()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            with open_image(self.paths[index]) as image:
                return self.transform(image.convert("RGB")), ""
        except Exception as error:  # a damaged file makes PIL raise errors of many kinds
            return None, " ".join(str(error).split()) or type(error).__name__


def predict(
    classifier: Classifier,
    paths: Sequence[str],
    precision: Precision,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[tuple[str, Tensor | None, str]]:
    """Classify image files, in their order.

    Args:
        classifier: with a head; moved to the device.
        paths: of the files.
        precision: the arithmetic, for this device.
        device: where to compute.
        batch_size: images at a time.
        workers: processes that read images; 0 reads them in this one.

    Yields:
        path, probabilities of the classes (float32, on the CPU) and ""; of a file that cannot be read its
        path, None and the reason.

    Raises:
        ValueError: logits are not finite, or a batch does not fit into the GPU's memory.
    """
    classifier.to(device)
    # One batch is read sooner than a process starts.
    workers = workers if len(paths) > batch_size else 0
    done = 0
    for samples in DataLoader(_Images(paths), batch_size, num_workers=workers, collate_fn=list):
        batch, done = paths[done : done + len(samples)], done + len(samples)
        images = [image for image, _ in samples if image is not None]
        probabilities = iter(())
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
                    f"the logits of {batch[0]} or images after it are not finite: the weights' values are "
                    f"too large for {precision}"
                )
            probabilities = iter(logits.softmax(dim=1))
        for path, (image, problem) in zip(batch, samples, strict=True):
            yield path, None if image is None else next(probabilities), problem


def read_labels(path: str | os.PathLike, classes: int) -> list[str]:
    """Names of classes from a text file with one name on each line, in the order of their indexes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or has another number of lines than there are classes.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)} with the classes' names")
    try:
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            names = file.read().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not a text file in UTF-8: {error}") from error
    if len(names) != classes:
        raise ValueError(
            f"{os.fspath(path)} has {len(names)} lines, but the classifier has {classes} classes; it must "
            "name one on each line, in the order of their indexes"
        )
    return [name.strip() for name in names]
