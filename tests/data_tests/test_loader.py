"""The training stream: the same batches for any number of workers, and after any interruption."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from rev_det.checkpoint import RevCheckpointer
from rev_det.config import add_rev_det_config
from rev_det.data import RevDatasetMapper
from rev_det.data.loader import build_train_loader

NUM_IMAGES = 14


@pytest.fixture(scope="module")
def all_records(tmp_path_factory):
    """Wide and tall pictures of noise, the category of every seventh one rare."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    records = []
    for index in range(NUM_IMAGES):
        height, width = (30, 50) if index % 3 else (50, 30)
        path = folder / f"{index}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        box = {"bbox": [2.0, 3.0, 25.0, 28.0], "bbox_mode": BoxMode.XYXY_ABS}
        annotation = {**box, "category_id": int(index % 7 == 0), "iscrowd": 0}
        record = {"file_name": str(path), "image_id": index, "height": height, "width": width}
        records.append({**record, "annotations": [annotation]})
    return records


@pytest.fixture
def cfg(all_records):
    DatasetCatalog.register("pictures", lambda: all_records)
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.DATASETS.TRAIN = ("pictures",)
    cfg.INPUT.AUGMENTATION = "lsj"
    cfg.INPUT.LSJ.SIZE = 32
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 5
    return cfg


@pytest.fixture
def as_process(monkeypatch):
    """Be one process of several."""

    def become(rank, processes):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: processes)

    return become


def content(sample):
    """All that makes a sample, to be compared bit for bit."""
    instances = sample["instances"]
    return (
        sample["file_name"],
        sample["image"].numpy().tobytes(),
        instances.gt_boxes.tensor.numpy().tobytes(),
        instances.gt_classes.tolist(),
    )


def take(loader, count):
    """Contents of the next batches."""
    return [[content(sample) for sample in batch] for batch in itertools.islice(loader, count)]


def build(cfg, *opts, state=None, **arguments):
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    loader = build_train_loader(cfg, **arguments)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def stream(cfg, count):
    """The samples of one process in the order of the sampler."""
    return [batch[0] for batch in take(build(cfg, *UNGROUPED, total_batch_size=1), count)]


UNGROUPED = ("DATALOADER.ASPECT_RATIO_GROUPING", False)


def test_images_come_in_the_order_of_detectron2s_sampler(cfg):
    names = [sample[0] for sample in stream(cfg, 2 * NUM_IMAGES)]
    indices = itertools.islice(TrainingSampler(NUM_IMAGES, seed=5), 2 * NUM_IMAGES)
    assert [os.path.basename(name) for name in names] == [f"{index}.png" for index in indices]


def test_batches_are_grouped_as_by_detectron2(cfg):
    sizes = {record["file_name"]: record for record in DatasetCatalog.get("pictures")}
    samples = [{**sizes[sample[0]], "content": sample} for sample in stream(cfg, 3 * NUM_IMAGES)]
    expected = [[d["content"] for d in batch] for batch in AspectRatioGroupedDataset(samples, 3)]
    assert len(expected) > 10
    assert take(build(cfg), len(expected)) == expected


def test_augmentations_differ_at_each_visit_and_between_seeds(cfg):
    # Large enough for no two draws to give the same image.
    cfg.INPUT.LSJ.SIZE = 512
    cfg.INPUT.LSJ.SCALES = (0.5, 2.0)
    samples = {repr(sample[:3]) for sample in stream(cfg, 3 * NUM_IMAGES)}
    assert len(samples) == 3 * NUM_IMAGES
    cfg.SEED = 6
    assert not samples & {repr(sample[:3]) for sample in stream(cfg, 3 * NUM_IMAGES)}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(cfg, workers):
    assert take(build(cfg, "DATALOADER.NUM_WORKERS", workers), 8) == take(build(cfg), 8)


@pytest.mark.parametrize("workers", [(0, 0), (2, 0), (0, 2)])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_resumed_run_takes_the_batches_that_were_next(cfg, workers, taken):
    before, after = workers
    uninterrupted = take(build(cfg), 12)
    interrupted = build(cfg, "DATALOADER.NUM_WORKERS", before)
    assert take(interrupted, taken) == uninterrupted[:taken]
    # Of another seed: the state's counts.
    resumed = build(cfg, "DATALOADER.NUM_WORKERS", after, "SEED", 99, state=interrupted.state_dict())
    assert take(resumed, 4) == uninterrupted[taken : taken + 4]
    again = build(cfg, state=resumed.state_dict())
    assert take(again, 3) == uninterrupted[taken + 4 : taken + 7]


def test_new_iteration_of_the_same_loader_continues(cfg):
    loader = build(cfg)
    assert take(loader, 3) + take(loader, 3) == take(build(cfg), 6)


def test_repeat_factors_are_detectron2s_and_resume(cfg, all_records):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(all_records, 0.9)
    assert factors.max() > 1
    indices = list(itertools.islice(RepeatFactorTrainingSampler(factors, seed=5), 40))
    assert [sample[0] for sample in stream(cfg, 40)] == [all_records[index]["file_name"] for index in indices]
    loader = build(cfg)
    uninterrupted = take(loader, 12)
    assert take(build(cfg, state={**loader.state_dict(), "batches": 7}), 5) == uninterrupted[7:]


def test_processes_share_one_stream(cfg, as_process):
    samples = stream(cfg, 24)
    for rank in range(3):
        as_process(rank, 3)
        batches = take(build(cfg, *UNGROUPED, total_batch_size=6), 4)
        assert list(itertools.chain(*batches)) == samples[rank::3]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_resumes_from_the_state_of_the_first(cfg, as_process, rank):
    as_process(rank, 2)
    uninterrupted = take(build(cfg, total_batch_size=4), 9)
    as_process(0, 2)
    first = build(cfg, total_batch_size=4)
    take(first, 5)
    as_process(rank, 2)
    resumed = build(cfg, "DATALOADER.NUM_WORKERS", 1, total_batch_size=4, state=first.state_dict())
    assert take(resumed, 4) == uninterrupted[5:]


def test_micro_batches_are_parts_of_one_stream(cfg):
    whole = take(build(cfg, *UNGROUPED, "SOLVER.IMS_PER_BATCH", 4), 3)
    parts = take(build(cfg, *UNGROUPED, "SOLVER.IMS_PER_BATCH", 4, total_batch_size=2), 6)
    assert [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)] == whole


def test_resuming_decodes_no_image_of_the_past(cfg):
    mapped = []

    def mapper(record):
        mapped.append(record["file_name"])
        return record

    loader = build(cfg, mapper=mapper)
    loader.load_state_dict({**loader.state_dict(), "batches": 1000})
    (batch,) = itertools.islice(loader, 1)
    assert mapped == [record["file_name"] for record in batch] and len(batch) == 3


def generators():
    kind, keys, position, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), position, *rest), torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_generators_of_the_process_are_left_alone_and_do_not_matter(cfg, workers):
    expected = take(build(cfg), 3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = generators()
    assert take(build(cfg, "DATALOADER.NUM_WORKERS", workers), 3) == expected
    assert generators() == before


def test_generators_are_restored_after_an_error(cfg):
    def broken(record):
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError("broken mapper")

    before = generators()
    with pytest.raises(RuntimeError, match="broken mapper"):
        next(iter(build(cfg, mapper=broken)))
    assert generators() == before


def test_all_three_generators_are_seeded(cfg):
    def mapper(record):
        return random.random(), np.random.rand(), torch.rand(1).item()

    def draws(**arguments):
        batches = itertools.islice(build(cfg, mapper=mapper, **arguments), 4)
        return list(itertools.chain(*batches))

    assert draws() == draws()
    assert len(set(draws())) == 12
    for numbers in zip(*draws(), strict=True):
        assert len(set(numbers)) == 12


def test_random_seed_is_kept_in_the_state(cfg):
    opts = ("SEED", -1)
    loader = build(cfg, *opts)
    uninterrupted = take(loader, 8)
    assert take(build(cfg, *opts), 8) != uninterrupted
    resumed = build(cfg, *opts, state={**loader.state_dict(), "batches": 5})
    assert take(resumed, 3) == uninterrupted[5:]


def test_state_survives_a_checkpoint(cfg, tmp_path):
    model = torch.nn.Linear(1, 1)
    loader = build(cfg)
    uninterrupted = take(loader, 6)
    early = build(cfg)
    take(early, 2)
    RevCheckpointer(model, str(tmp_path), data=early).save("model_0000001")
    resumed = build(cfg)
    RevCheckpointer(model, str(tmp_path), data=resumed).resume_or_load("", resume=True)
    assert resumed.state_dict() == early.state_dict()
    assert {type(value) for value in resumed.state_dict().values()} == {int}
    assert take(resumed, 4) == uninterrupted[2:]


def test_other_batch_size_goes_on_at_the_same_sample(cfg, caplog):
    samples = stream(cfg, 20)
    loader = build(cfg, *UNGROUPED)
    take(loader, 2)
    resumed = build(cfg, *UNGROUPED, "SOLVER.IMS_PER_BATCH", 4, state=loader.state_dict())
    assert "batch_size 3 (now 4)" in caplog.text and "sample 6" in caplog.text
    assert list(itertools.chain(*take(resumed, 2))) == samples[6:14]
    # And that run is resumed exactly.
    caplog.clear()
    again = build(cfg, *UNGROUPED, "SOLVER.IMS_PER_BATCH", 4, state=resumed.state_dict())
    assert take(again, 1)[0] == samples[14:18]
    assert "batch_size" not in caplog.text


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_other_number_of_processes_goes_on_at_the_same_turn(cfg, as_process, caplog, rank):
    samples = stream(cfg, 20)
    as_process(0, 2)
    loader = build(cfg, *UNGROUPED, total_batch_size=4)
    take(loader, 2)
    as_process(rank, 3)
    resumed = build(cfg, *UNGROUPED, total_batch_size=6, state=loader.state_dict())
    assert "processes 2 (now 3)" in caplog.text
    # Eight samples were taken; three processes have a turn begin at the sixth.
    assert take(resumed, 2) == [samples[6 + rank : 12 : 3], samples[12 + rank : 18 : 3]]


def test_other_number_of_images_is_reported(cfg, all_records, caplog):
    loader = build(cfg)
    take(loader, 2)
    DatasetCatalog.register("fewer", lambda: all_records[:6])
    resumed = build(cfg, "DATASETS.TRAIN", ("fewer",), state=loader.state_dict())
    assert "images 14 (now 6)" in caplog.text
    assert len(take(resumed, 3)) == 3


def test_declined_images_are_replaced_the_same_way_after_resuming(cfg):
    mapper = RevDatasetMapper(cfg, True)

    def choosy(record):
        return None if record["image_id"] % 2 else mapper(record)

    loader = build(cfg, mapper=choosy)
    uninterrupted = take(loader, 8)
    names = {os.path.basename(sample[0]) for batch in uninterrupted for sample in batch}
    assert len(names) > 3 and all(int(name[:-4]) % 2 == 0 for name in names)
    resumed = build(cfg, mapper=choosy, state={**loader.state_dict(), "batches": 4})
    assert take(resumed, 4) == uninterrupted[4:]


def test_mapper_that_declines_everything_is_an_error(cfg):
    with pytest.raises(ValueError, match=r"returned None for 100 training images in a row, .*\.png"):
        next(iter(build(cfg, mapper=lambda record: None)))


def test_undecodable_image_is_named(cfg, all_records, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not an image")
    DatasetCatalog.register("broken", lambda: [{**all_records[0], "file_name": str(path)}])
    with pytest.raises(ValueError, match=r"broken\.png .* cannot be decoded"):
        next(iter(build(cfg, "DATASETS.TRAIN", ("broken",))))


@pytest.mark.parametrize("processes,total", [(2, None), (4, 6), (1, 0)])
def test_batch_that_cannot_be_shared_is_an_error(cfg, as_process, processes, total):
    as_process(0, processes)
    with pytest.raises(ValueError, match=f"SOLVER.IMS_PER_BATCH is 3.* by {processes} processes"):
        build(cfg, total_batch_size=total)


@pytest.mark.parametrize("sampler", ["WeightedTrainingSampler", "RandomSubsetTrainingSampler", "Random"])
def test_sampler_that_cannot_be_resumed_is_an_error(cfg, sampler):
    with pytest.raises(ValueError, match=f"SAMPLER_TRAIN is '{sampler}'; allowed, .*'TrainingSampler'"):
        build(cfg, "DATALOADER.SAMPLER_TRAIN", sampler)


def test_dataset_without_instances_is_an_error(cfg, all_records):
    empty = [{**record, "annotations": []} for record in all_records]
    DatasetCatalog.register("empty", lambda: empty)
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is \('empty',\): No valid data found"):
        build(cfg, "DATASETS.TRAIN", ("empty",))
    loader = build(cfg, "DATASETS.TRAIN", ("empty",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert len(take(loader, 2)) == 2


def test_torch_dataset_is_an_error(cfg, all_records):
    DatasetCatalog.register("torch", lambda: torch.utils.data.Subset(all_records, [0, 1]))
    with pytest.raises(ValueError, match="gives a Subset; .*needs a list of dictionaries"):
        build(cfg, "DATASETS.TRAIN", ("torch",))


def test_unknown_sizes_are_an_error_only_for_grouping(cfg, all_records):
    record = {key: value for key, value in all_records[0].items() if key not in ("width", "height")}
    DatasetCatalog.register("unsized", lambda: [record])
    opts = ("DATASETS.TRAIN", ("unsized",))
    with pytest.raises(ValueError, match=r"0\.png has no width and height.*ASPECT_RATIO_GROUPING False"):
        build(cfg, *opts)
    assert take(build(cfg, *opts, *UNGROUPED), 1)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs signals of POSIX.1-2001")
class TestSignals:
    @pytest.fixture
    def worker(self, cfg):
        """A loader's iterator and its only worker."""
        others = set(multiprocessing.active_children())
        iterator = iter(build(cfg, "DATALOADER.NUM_WORKERS", 1))
        next(iterator)
        (worker,) = set(multiprocessing.active_children()) - others
        yield iterator, worker
        iterator.close()

    @pytest.mark.parametrize("name", ["TERM", "USR1"])
    def test_worker_survives_what_a_scheduler_sends_to_the_whole_job(self, worker, name):
        iterator, process = worker
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
        for _ in range(6):  # more than were prefetched
            next(iterator)
        assert process.is_alive()

    def test_worker_ends_when_the_training_process_says_so(self, worker):
        _, process = worker
        os.kill(process.pid, signal.SIGTERM)
        process.join(timeout=10)
        assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs signals of POSIX.1-2001")
def test_workers_are_born_deaf_to_signals_and_this_process_hears_again(cfg, monkeypatch):
    # Started as new programs, as in runs of several processes, they take seconds to come to our code.
    born = []
    start = multiprocessing.Process.start

    def watched(process):
        born.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", watched)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    next(iter(build(cfg, "DATALOADER.NUM_WORKERS", 1)))
    assert len(born) == 1 and {signal.SIGTERM, signal.SIGUSR1} <= born[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
