"""Classify images with a published file's own classifier, or measure its accuracy on ImageNet."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..classify import Accuracy, Classifier, ImageFiles
    from ..engine.amp import Precision


_VALIDATION_IMAGES = 50_000


def run(args: argparse.Namespace) -> int:
    from ..classify import ImageFiles, load_classifier, read_labels

    if bool(args.images) == (args.imagenet is not None):
        raise ValueError("name either IMAGE files to classify or --imagenet DIR to measure the accuracy on")
    precision, device = _choose_device(args.device, args.amp)
    classifier, weights = load_classifier(args.weights)
    classes = classifier.head.out_features
    if not 1 <= args.top <= classes:
        raise ValueError(f"--top must be 1 to {classes}, the number of classes; got {args.top}")
    names = read_labels(args.labels, classes) if args.labels else [""] * classes
    if args.imagenet is not None:
        files = ImageFiles.from_folder(args.imagenet, classes)
    else:
        files = ImageFiles(args.images)
    print(weights.report)
    if args.imagenet is None:
        return _classify(args, classifier, files, precision, device, names)
    accuracy = _measure(args, classifier, files, precision, device)
    if accuracy.images:
        print(compare_with_published(accuracy, weights.model, precision))
    return _report_unreadable(accuracy.unreadable, len(files))


def _choose_device(name: str | None, amp: bool) -> tuple[Precision, str]:
    from ..config_files import default_config
    from ..devices import check_device
    from ..engine.amp import Precision

    name = check_device("--device", name)
    cfg = default_config()
    cfg.MODEL.DEVICE = name
    cfg.SOLVER.AMP.ENABLED = amp
    return Precision.from_config(cfg), name


def _classify(
    args: argparse.Namespace,
    classifier: Classifier,
    files: ImageFiles,
    precision: Precision,
    device: str,
    names: list[str],
) -> int:
    from ..classify import predict

    unreadable = []
    options = {"device": device, "batch_size": args.batch_size, "workers": args.workers}
    for batch in predict(classifier, files, precision, **options):
        for path, probabilities in zip(batch.paths, batch.probabilities, strict=True):
            print(path)
            for value, index in zip(*probabilities.topk(args.top), strict=True):
                print(f"  {100 * value:6.2f} %  {int(index):3d}  {names[index]}".rstrip())
        unreadable += batch.unreadable
    return _report_unreadable(unreadable, len(files))


def _measure(
    args: argparse.Namespace, classifier: Classifier, files: ImageFiles, precision: Precision, device: str
) -> Accuracy:
    from tqdm import tqdm

    from ..classify import Accuracy, predict

    accuracy = Accuracy()
    options = {"device": device, "batch_size": args.batch_size, "workers": args.workers}
    batches = predict(classifier, files, precision, **options)
    with tqdm(total=len(files), unit="image", desc="classify") as bar:
        for batch in batches:
            accuracy.add(batch)
            bar.update(len(batch.paths) + len(batch.unreadable))
            if accuracy.images:
                bar.set_postfix({"top-1": f"{100 * accuracy.top1 / accuracy.images:.2f} %"})
    return accuracy


def compare_with_published(accuracy: Accuracy, model: str, precision: Precision) -> str:
    """The measured accuracy, of one image at least, and what the authors publish for a named model."""
    from ..checkpoint.named import PUBLISHED

    top1, top5 = (100 * hits / accuracy.images for hits in (accuracy.top1, accuracy.top5))
    lines = [
        f"measured here: top-1 {top1:.2f} %, top-5 {top5:.2f} % ({accuracy.images:,} images, {precision})"
    ]
    if model in PUBLISHED:
        published = PUBLISHED[model]
        remark = f"; {published.remark}" if published.remark else ""
        lines.append(f"published:     top-1 {published.top1} % (by the authors' model table{remark})")
        if accuracy.images != _VALIDATION_IMAGES:
            lines.append(
                "not to be compared: the published figure is for ImageNet's "
                f"{_VALIDATION_IMAGES:,} validation images"
            )
    else:
        lines.append(f"published:     none for {model}")
    return "\n".join(lines)


def _report_unreadable(unreadable: list[tuple[str, str]], total: int) -> int:
    """Name the files that could not be read; the exit code."""
    if not unreadable:
        return 0
    sys.stderr.write(f"{len(unreadable)} of {total} images could not be read:\n")
    for path, reason in unreadable:
        sys.stderr.write(f"  {path}: {reason}\n")
    return 1
