"""An endless stream of training batches that continues, after an interruption, with the batch that was next.

Which image is sample k of the stream follows from the seed alone, and what its augmentations draw from seed
and k alone. Which samples make a batch follows from the sizes of images in the annotations. So a position in
the stream is a few numbers, whatever the number of workers, and no image is decoded to get there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data import DatasetFromList, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.build import _test_loader_from_config, trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..files import printable
from ..stopping import survive_signals, workers_held_back
from .images import unusable_images
from .mapper import RevDatasetMapper

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# (position in the stream over all processes, index of the image)
Sample = tuple[int, int]

# How many images to try where a mapper declines one by returning None.
_TRIES = 100


class TrainLoader:
    """Batches of one process, without end, from a position that is saved and restored.

    An iteration begins after the last batch that was taken, by this object or by the run whose state it has
    loaded. Of the global stream of samples this process takes every ``world_size``-th, as Detectron2's
    samplers do. Random generators of the process are left as they are, except during the mapping of a sample
    without workers.

    Args:
        records: the dataset, in Detectron2's format.
        mapper: makes a model input of a record; None to have another image taken in its place.
        sampler: from a seed to one of Detectron2's endless samplers of indices.
        batch_size: of this process.
        seed: of the sampler and the mapper, the same in all processes; 0 or more.
        group_by_aspect_ratio: only wide, or only tall, images in a batch.
        num_workers: processes that map; 0 to map in this one.

    Raises:
        ValueError: a record has no width or height to group by.
    """

    def __init__(
        self,
        records: Sequence[Record],
        mapper: Callable[[Record], Record | None],
        sampler: Callable[[int], Sampler],
        *,
        batch_size: int,
        seed: int,
        group_by_aspect_ratio: bool = True,
        num_workers: int = 0,
    ):
        self._sizes = _sizes(records) if group_by_aspect_ratio else None
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper
        self._sampler = sampler
        self._seed = seed
        self._num_workers = num_workers
        # Position: batches taken since the stream's sample number _start.
        self._start = 0
        self._batches = 0
        # What must not change for a position to mean the same batches.
        self._layout = {
            "images": len(records),
            "processes": comm.get_world_size(),
            "batch_size": batch_size,
            "grouped": int(group_by_aspect_ratio),
        }

    def __iter__(self) -> Iterator[list[Record]]:
        loader = DataLoader(
            _SeededSamples(self._records, self._mapper, self._seed),
            batch_sampler=itertools.islice(self._plan(), self._batches, None),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=survive_signals,
            # Otherwise it takes a number from torch's global generator, which a resumed run would not.
            generator=torch.Generator(),
        )
        with workers_held_back():
            batches = iter(loader)
        for batch in batches:
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position after the batch that was taken last, the same in all processes."""
        return {"seed": self._seed, "start": self._start, "batches": self._batches, **self._layout}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue another run's stream, its seed included, from the next iteration on.

        If the number of images, of processes or of images per batch is another one, there can be no such
        batches as that run would have had: a warning says so, and the stream goes on where it had stopped.

        Args:
            state: of `state_dict`, in any process of that run.
        """
        if state["seed"] != self._seed:
            logger.info("Training data continue the stream of seed %d", state["seed"])
        self._seed, self._start, self._batches = state["seed"], state["start"], state["batches"]
        changed = [key for key, value in self._layout.items() if state[key] != value]
        if not changed:
            return
        # All processes begin at the same turn, which may repeat some samples of an incomplete one.
        self._start += self._batches * state["batch_size"] * state["processes"]
        self._start -= self._start % self._layout["processes"]
        self._batches = 0
        logger.warning(
            "The run that is resumed had %s: training data go on at sample %d of its stream, but batches are "
            "not those that it would have seen",
            ", ".join(f"{key} {state[key]} (now {self._layout[key]})" for key in changed),
            self._start,
        )

    def _plan(self) -> Iterator[list[Sample]]:
        """The samples of each batch since the position ``_start``."""
        processes, batch_size = self._layout["processes"], self._layout["batch_size"]
        positions = itertools.count(comm.get_rank(), processes)
        samples = itertools.islice(
            zip(positions, self._sampler(self._seed), strict=False), self._start // processes, None
        )
        if self._sizes is None:
            while True:
                yield list(itertools.islice(samples, batch_size))
        # Detectron2's own grouping, of stand-ins for the images.
        stand_ins = (
            {"width": self._sizes[index][0], "height": self._sizes[index][1], "sample": (position, index)}
            for position, index in samples
        )
        for group in AspectRatioGroupedDataset(stand_ins, batch_size):
            yield [stand_in["sample"] for stand_in in group]


def build_train_loader(
    cfg: CfgNode,
    mapper: Callable[[Record], Record | None] | None = None,
    total_batch_size: int | None = None,
) -> TrainLoader:
    """The training data of a config, as Detectron2's ``build_detection_train_loader`` but resumable.

    Keys: ``DATASETS.TRAIN``, ``DATALOADER.*`` and ``SEED``; if that is negative, the processes agree on a
    random seed, which the state keeps.

    Args:
        cfg: a config whose datasets are registered.
        mapper: None for ``RevDatasetMapper(cfg, is_train=True)``.
        total_batch_size: images of one forward in all processes together; None for ``SOLVER.IMS_PER_BATCH``,
            of which it is a part under gradient accumulation.

    Raises:
        ValueError: processes cannot share a batch equally; the sampler is unknown or depends on more than a
            seed; there are no images to train on, or they come as a torch dataset.
    """
    total = cfg.SOLVER.IMS_PER_BATCH if total_batch_size is None else total_batch_size
    processes = comm.get_world_size()
    if total < 1 or total % processes:
        raise ValueError(
            f"{total} images in one forward (SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}) cannot be "
            f"shared equally by {processes} processes; set it to a multiple"
        )
    records = _training_records(cfg)
    sampler = _sampler_factory(cfg, records)
    # One call in every process, or none in any: it communicates.
    seed = cfg.SEED if cfg.SEED >= 0 else int(comm.shared_random_seed())
    logger.info(
        "Training data: %d images, %s, seed %d, %d images per forward in each process",
        len(records),
        cfg.DATALOADER.SAMPLER_TRAIN,
        seed,
        total // processes,
    )
    return TrainLoader(
        records,
        RevDatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        sampler,
        batch_size=total // processes,
        seed=seed,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


class _SeededSamples(Dataset):
    """Mapped samples whose random draws depend only on the seed and the position in the stream."""

    def __init__(self, records: DatasetFromList, mapper: Callable[[Record], Record | None], seed: int):
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, sample: Sample) -> Record:
        position, index = sample
        with _seeded(self._seed, position):
            for _ in range(_TRIES):
                record = self._records[index]
                mapped = self._mapper(record)
                if mapped is not None:
                    return mapped
                index = random.randrange(len(self._records))
        raise ValueError(
            f"the mapper returned None for {_TRIES} training images in a row, the last of them "
            f"{record.get('file_name')}; it must accept more of DATASETS.TRAIN"
        )


@contextlib.contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators; leave them as they were."""
    before = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence((seed, position)).generate_state(4)
    with torch.random.fork_rng(devices=[]):
        random.seed(words.tobytes())
        np.random.seed(words)
        # torch.manual_seed would seed CUDA as well.
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable[list[Record]]:
    """Detectron2's test loader, without the images that `unusable_images` finds; these are named.

    Args:
        cfg: a config with rev_det's keys.
        dataset_name: a registered dataset.

    Raises:
        ValueError: no image is left.
    """
    arguments = _test_loader_from_config(cfg, dataset_name, RevDatasetMapper(cfg, is_train=False))
    records = arguments["dataset"]
    if isinstance(records, list) and (left_out := dict(unusable_images(records, *sizes_of_tests(cfg)))):
        for path, reason in left_out.items():
            logger.warning("%s is left out of the evaluation: %s", printable(path), reason)
        records = [record for record in records if record["file_name"] not in left_out]
        if not records:
            raise ValueError(
                f"no image of dataset '{dataset_name}' can be evaluated, they are too large or narrow"
            )
        arguments |= {"dataset": records, "sampler": None}
    return build_detection_test_loader(**arguments)


def sizes_of_tests(cfg: CfgNode) -> tuple[int, int]:
    """What tests resize images to, with test-time augmentation or without: see `check_extent`."""
    if cfg.INPUT.MIN_SIZE_TEST or not cfg.TEST.AUG.ENABLED:
        return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return min(cfg.TEST.AUG.MIN_SIZES), cfg.TEST.AUG.MAX_SIZE


def _training_records(cfg: CfgNode) -> list[Record]:
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=(
                cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
            ),
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    # Detectron2 asserts that images are left.
    except AssertionError as error:
        raise ValueError(f"DATASETS.TRAIN is {cfg.DATASETS.TRAIN}: {error}") from error
    if not isinstance(records, list):
        raise ValueError(
            f"DATASETS.TRAIN is {cfg.DATASETS.TRAIN}, which gives a {type(records).__name__}; to be resumed, "
            "training needs a list of dictionaries in Detectron2's dataset format"
        )
    return records


def _sampler_factory(cfg: CfgNode, records: list[Record]) -> Callable[[int], Sampler]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; allowed, as they can be resumed, are 'TrainingSampler' "
        "and 'RepeatFactorTrainingSampler'"
    )


def _sizes(records: Sequence[Record]) -> list[tuple[int, int]]:
    """(width, height) of each image, in pixels."""
    for record in records:
        if not ("width" in record and "height" in record):
            raise ValueError(
                f"the dataset entry of {record.get('file_name')} has no width and height to group images by; "
                "add them, or set DATALOADER.ASPECT_RATIO_GROUPING False"
            )
    return [(record["width"], record["height"]) for record in records]
