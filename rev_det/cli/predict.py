"""Predict with a trained detector on images and videos: pictures, and results in COCO's format."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..predict import Detector, PredictionWriter, Source


# Classes to list in the summary.
_LISTED = 8
# Files to look at again where nothing was found.
_LOOKED_AT = 4


def run(args: argparse.Namespace) -> int:
    """Predict, write, and say what was found.

    Returns:
        0, or 1 if some files could not be read, or not to their end; they are named at the end.

    Raises:
        ValueError, OSError: arguments, inputs, config or weights that cannot be used.
    """
    from detectron2.utils.logger import setup_logger
    from tqdm import tqdm

    from ..predict import Origin, PredictionWriter, check_output, find_sources, load_detector, predict
    from ..predict.output import RESULTS

    setup_logger(name="rev_det")
    sources = find_sources(args.inputs)
    check_output(args.output, sources)
    detector = load_detector(
        Origin.find(args.run, args.config_file, args.weights),
        device=args.device,
        threshold=args.threshold,
        only=args.classes,
        amp=args.amp,
        dataset_json=args.dataset_json,
        opts=args.opts,
    )
    with PredictionWriter(args.output, detector.classes, args.dataset_json, not args.no_pictures) as writer:
        total = sum(source.num_frames() for source in sources)
        # In a file each step of the bar is a line.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        title = f"predict{'' if args.no_pictures else ' and draw'} ({detector.precision})"
        with tqdm(total=total, unit="image", desc=title, mininterval=interval) as bar:
            failures = predict(detector, sources, writer, args.batch_size, bar.update)
    print(_summary(writer))
    if not writer.counts and writer.files():
        print(_nothing_found(detector, sources, args.classes))
    print(f"written to {writer.folder}")
    if not writer.counts:
        print(f"{RESULTS} is an empty list, which pycocotools' loadRes cannot load")
    if others := writer.others():
        pictures = f"{others} picture{'s' * (others != 1)}"
        print(f"{writer.folder} also holds {pictures} that this call has not written")
    return report_failures(failures, f"{len(sources)} files", "read, or not to the end")


def report_failures(failures: Sequence[tuple[str, str]], total: str, done: str) -> int:
    """Name the files that were left out, each with its reason, on the standard error stream.

    Returns:
        the exit code: 1 if there are some.
    """
    if failures:
        sys.stderr.write(f"{len(failures)} of {total} could not be {done}:\n")
        sys.stderr.writelines(f"  {path}: {reason}\n" for path, reason in failures)
    return 1 if failures else 0


def _summary(writer: PredictionWriter) -> str:
    found = writer.counts.most_common()
    listed = ", ".join(f"{name}: {count}" for name, count in found[:_LISTED])
    more = f" and {len(found) - _LISTED} more classes" if len(found) > _LISTED else ""
    files, objects = writer.files(), sum(writer.counts.values())
    what = f"{objects} object{'s' * (objects != 1)} in {files} file{'s' * (files != 1)}"
    return f"{what} ({listed}{more})" if listed else what


def _nothing_found(detector: Detector, sources: Sequence[Source], classes: Sequence[str]) -> str:
    """What a newcomer can try."""
    from ..predict import highest_score

    known = ", ".join(detector.classes.names[:_LISTED])
    more = len(detector.classes.names) - _LISTED
    known += f" and {more} more" if more > 0 else ""
    score = highest_score(detector, sources, _LOOKED_AT)
    wanted = f" for {', '.join(classes)}" if classes else ""
    if score is None:
        said = f"no object is found{wanted} with any --threshold"
    else:
        few = f" in the first {_LOOKED_AT} files" if len(sources) > _LOOKED_AT else ""
        said = (
            f"no score{wanted} is as high as the --threshold of {detector.threshold:g}: "
            f"the highest{few} is {score:.3f}, and a lower threshold shows more"
        )
    return f"{said}\nthe detector knows {known}"
