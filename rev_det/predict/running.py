"""The loop: pictures in, batches through the detector, results out; what cannot be used is skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .detector import Detector
from .inputs import Frame, Source, read_frames
from .output import PredictionWriter


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
        done: is told how many further pictures are finished, or were skipped.

    Returns:
        path and reason of each file that could not be read, or not to its end, or does not fit into memory.

    Raises:
        ValueError: the batch size is none, or a batch of several does not fit into memory.
        OSError: results cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    failures: list[tuple[str, str]] = []
    batch: list[Frame] = []

    def flush() -> None:
        if batch:
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
            batch.clear()

    for source in sources:
        frames, read = read_frames(source), 0
        while True:
            # Only what reading raises: an error of the detector or the writer is another matter.
            try:
                frame = next(frames, None)
                if frame is None:
                    break
                detector.check(frame.image)
            except (ValueError, OSError) as error:
                failures.append((source.path, str(error)))
                done(source.num_frames() - read)
                break
            batch.append(frame)
            read += 1
            if len(batch) == batch_size:
                flush()
    flush()
    return failures


def highest_score(detector: Detector, sources: Sequence[Source], count: int) -> float | None:
    """What a detector that finds nothing comes closest to.

    Args:
        detector: the detector.
        sources: files that are looked at again; of a video the first picture.
        count: this many at most, as one takes as long as before.

    Returns:
        the highest score of its classes; None if it finds nothing, or there is nothing to look at.
    """
    scores: list[float] = []
    looked_at = 0
    for source in sources:
        if looked_at == count:
            break
        try:
            frame = next(read_frames(source), None)
            if frame is None:
                continue
            detector.check(frame.image)
        except (ValueError, OSError):
            continue
        looked_at += 1
        score = detector.highest_score([frame.image])
        scores += [] if score is None else [score]
    return max(scores, default=None)
