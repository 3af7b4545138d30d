"""Classify images with a published file's own classifier, or measure its accuracy on ImageNet."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.amp import Precision


_VALIDATION_IMAGES = 50_000


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..checkpoint.named import NAMED_MODELS
    from ..classify import find_validation_images, load_classifier, predict, read_labels
    from ..rules import check_count

    if bool(args.images) == (args.imagenet is not None):
        raise ValueError("name either IMAGE files to classify or --imagenet DIR to measure the accuracy on")
    check_count("--batch-size", args.batch_size)
    check_count("--workers", args.workers, 0)
    precision = _choose_precision(args)
    classifier, model, result = load_classifier(args.weights)
    if classifier.head is None:
        published = NAMED_MODELS[model].url
        raise ValueError(
            f"{result.source} holds no classifier (a weight `head.projection` or `head.fc`). Converted files "
            "and detectors have none: take the published file" + f", {published}" * bool(published)
        )
    classes = classifier.head.out_features
    if not 1 <= args.top <= classes:
        raise ValueError(f"--top must be 1 to {classes}, the number of classes; got {args.top}")
    names = read_labels(args.labels, classes) if args.labels else [""] * classes
    samples = [(path, None) for path in args.images]
    if args.imagenet is not None:
        samples = find_validation_images(args.imagenet, classes)
    print(result)
    paths = [path for path, _ in samples]
    options = {"device": args.device, "batch_size": args.batch_size, "workers": args.workers}
    predictions = predict(classifier, paths, precision, **options)
    ranks, unreadable = [], []
    with tqdm(total=len(paths), unit="image", desc="classify", disable=args.imagenet is None) as bar:
        for (path, probabilities, problem), (_, label) in zip(predictions, samples, strict=True):
            bar.update()
            if problem:
                unreadable.append(f"  {path}: {problem}\n")
            elif label is None:
                print(path)
                for value, index in zip(*probabilities.topk(args.top), strict=True):
                    print(f"  {100 * value:6.2f} %  {int(index):3d}  {names[index]}".rstrip())
            else:
                order = probabilities.argsort(descending=True, stable=True)
                ranks.append(order.tolist().index(label))
    if ranks:
        print(compare_with_published(ranks, model, precision))
    if unreadable:
        sys.stderr.write(
            f"{len(unreadable)} of {len(paths)} images could not be read:\n{''.join(unreadable)}"
        )
    return 1 if unreadable else 0


def _choose_precision(args: argparse.Namespace) -> Precision:
    """The arithmetic, and in ``args`` the device."""
    from ..config_files import default_config
    from ..devices import check_device
    from ..engine.amp import Precision

    cfg = default_config()
    cfg.MODEL.DEVICE = args.device = check_device("--device", args.device)
    cfg.SOLVER.AMP.ENABLED = args.amp
    return Precision.from_config(cfg)


def compare_with_published(ranks: Sequence[int], model: str, precision: Precision) -> str:
    """The measured accuracy, and what the authors publish for a named model.

    Args:
        ranks: for each image, one at least, how many classes are before the right one.
        model: as "rev_vit_s".
        precision: of the computation.
    """
    from ..checkpoint.named import NAMED_MODELS

    top1, top5 = (100 * sum(rank < best for rank in ranks) / len(ranks) for best in (1, 5))
    lines = [f"measured here: top-1 {top1:.2f} %, top-5 {top5:.2f} % ({len(ranks):,} images, {precision})"]
    published = NAMED_MODELS[model]
    if not published.url:
        return "\n".join([*lines, f"published:     none for {model}"])
    remark = f"; {published.remark}" if published.remark else ""
    lines.append(f"published:     top-1 {published.top1} % (by the authors' model table{remark})")
    if len(ranks) != _VALIDATION_IMAGES:
        lines.append(
            "not to be compared: the published figure is for ImageNet's "
            f"{_VALIDATION_IMAGES:,} validation images"
        )
    return "\n".join(lines)
