"""Predict with a trained detector on images and videos: pictures, and results in COCO's format."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..files import printable

if TYPE_CHECKING:
    from ..predict import Detector, PredictionWriter


# Classes to list in the summary.
_LISTED = 8


def run(args: argparse.Namespace) -> int:
    """Predict, write, and say what was found.

    Returns:
        0, or 1 if some files could not be read, or not to their end; they are named at the end.

    Raises:
        ValueError, OSError: arguments, inputs, config or weights that cannot be used.
    """
    from detectron2.utils.logger import setup_logger
    from tqdm import tqdm

    from ..predict import Origin, PredictionWriter, check_folder, find_sources, load_detector, predict

    setup_logger(name="rev_det")
    sources = find_sources(args.inputs)
    origin = Origin.find(args.run, args.config_file, args.weights)
    inputs = [origin.config_file, origin.weights.partition("#")[0], args.dataset_json or ""]
    check_folder(args.output, sources, inputs)
    detector = load_detector(
        origin,
        device=args.device,
        threshold=args.threshold,
        only=args.classes,
        amp=args.amp,
        dataset_json=args.dataset_json,
        opts=args.opts,
    )
    with ending_on_sigterm():
        with PredictionWriter(
            args.output, detector.classes, args.dataset_json, not args.no_pictures
        ) as writer:
            total = sum(source.num_frames() for source in sources)
            # In a file each step of the bar is a line.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            title = f"predict{'' if args.no_pictures else ' and draw'} ({detector.precision})"
            with tqdm(total=total, unit="image", desc=title, mininterval=interval) as bar:
                failures = predict(detector, sources, writer, args.batch_size, bar.update)
    print(_summary(writer, detector, args.classes))
    print(f"written to {printable(args.output)}")
    return report_failures(failures, f"{len(sources)} files", "read, or not to the end")


def report_failures(failures: Sequence[tuple[str, str]], total: str, done: str) -> int:
    """Name the files that were left out, each with its reason, on the standard error stream.

    Returns:
        the exit code: 1 if there are some.
    """
    if failures:
        sys.stderr.write(f"{len(failures)} of {total} could not be {done}:\n")
        sys.stderr.writelines(f"  {printable(path)}: {printable(reason)}\n" for path, reason in failures)
    return 1 if failures else 0


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: results are kept, and unfinished files removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(writer: PredictionWriter, detector: Detector, classes: Sequence[str]) -> str:
    """What was found; if that is nothing, what a newcomer can try."""
    files, objects = writer.files(), sum(writer.counts.values())
    what = f"{objects} object{'s' * (objects != 1)} in {files} file{'s' * (files != 1)}"
    if not files:
        return what
    if objects:
        return f"{what} ({_listed([f'{name}: {count}' for name, count in writer.counts.most_common()])})"
    wanted = f" for {_listed(classes)}" if classes else ""
    return (
        f"{what}: no score{wanted} is as high as the --threshold of {detector.threshold:g}, and a lower one "
        f"shows more\nthe detector knows {_listed(detector.classes.thing_classes)}\n"
        "predictions.json is an empty list, which pycocotools' loadRes cannot load"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return printable(", ".join(names[:_LISTED])) + more
