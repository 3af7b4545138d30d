"""Corrupted files never load silently wrong, never end in an unexplained error, and never run code."""

import contextlib
import copy
import hashlib
import os
import random
import string
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_weights import (
    make_detector,
    make_mvit,
    make_vit,
    mmpretrain_state,
    official_state,
    pyslowfast_container,
    same,
    snapshot,
)

from rev_det.checkpoint import RevCheckpointer, convert_state_dict, inspect_weights, load_pretrained

FILES_OF_EACH_KIND = 25


class Source:
    """A container, the model that it is for, and what that model must hold once it is loaded."""

    def __init__(self, model, container, key, expected):
        self.model, self.container, self.key, self.expected = model, container, key, expected

    def tensors(self):
        return {name: value.clone() for name, value in self.container[self.key].items()}


@pytest.fixture(scope="module")
def sources():
    """One of every layout."""
    vit, mvit, detector = official_state("tiny_rev_vit"), official_state("tiny_rev_mvit"), make_detector()
    ours, whole = convert_state_dict(vit), snapshot(detector)
    last = make_mvit(out_features=("scale4",))
    return [
        Source(make_vit(), pyslowfast_container(vit), "model_state", ours),
        Source(last, pyslowfast_container(mvit, num_heads=1), "model_state", convert_state_dict(mvit)),
        Source(make_vit(), {"state_dict": mmpretrain_state(vit), "meta": {}}, "state_dict", ours),
        Source(make_vit(), {"model": ours, "iteration": 3}, "model", ours),
        Source(detector, {"model": whole, "iteration": 3}, "model", whole),
    ]


def load(model, path):
    """The report, or None if the file is refused with its name and a reason and the model is untouched."""
    for value in model.state_dict().values():
        value.zero_()
    report = None
    try:
        report = load_pretrained(model, path, evaluation=True)
    except ValueError as error:
        assert os.path.basename(path).partition("#")[0] in str(error)
        assert len(str(error)) > len(path) + 10
        assert not any(value.any() for value in model.state_dict().values())
    else:
        assert report.loaded == report.expected
    # Whatever else reads files ends in the same errors, or in none.
    for read in (inspect_weights, RevCheckpointer(copy.deepcopy(model), strict_weights=False).load):
        with contextlib.suppress(ValueError):
            read(path)
    return report


# Corruptions of the tensors, before the file is written: rng, state -> None.


def rename_keys(rng, state):
    for key in rng.sample(sorted(state), rng.randint(1, 3)):
        i = rng.randrange(len(key))
        state[key[:i] + rng.choice(string.ascii_lowercase + "._0") + key[i + rng.randint(0, 1) :]] = (
            state.pop(key)
        )


def delete_keys(rng, state):
    for key in rng.sample(sorted(state), rng.randint(1, 3)):
        del state[key]


def exchange_keys(rng, state):
    """The values of two keys of different shapes."""
    one = rng.choice(sorted(state))
    other = rng.choice(sorted(key for key in state if state[key].shape != state[one].shape))
    state[one], state[other] = state[other], state[one]


def change_shapes(rng, state):
    key = rng.choice(sorted(state))
    value = state[key]
    changed = [
        value[:-1],
        torch.cat([value, value]),
        value[None],
        value.flatten()[1:],
        value.sum(),
        value[:0],
    ]
    state[key] = rng.choice(changed)


def change_dtypes(rng, state):
    dtypes = ["int8", "int64", "bool", "complex64", "float16", "bfloat16", "float64"]
    for key in rng.sample(sorted(state), rng.choice([1, len(state)])):
        state[key] = state[key].to(getattr(torch, rng.choice(dtypes)))


def put_nan_inside(rng, state):
    value = state[rng.choice(sorted(state))]
    value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])


# Corruptions of the file: rng, bytes -> bytes.


def truncate(rng, content):
    return content[: rng.randrange(len(content))]


def flip_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        # Where structure is dense, too: the directory at the end, the pickle at the start.
        start, end = rng.choice([(0, len(content)), (0, 2000), (len(content) - 4000, len(content))])
        content[rng.randrange(max(start, 0), end)] ^= rng.randint(1, 255)
    return bytes(content)


def overwrite_a_piece(rng, content):
    start, size = rng.randrange(len(content)), rng.randint(1, 3000)
    return content[:start] + rng.choice([bytes(size), rng.randbytes(size)]) + content[start + size :]


@pytest.mark.parametrize(
    "corrupt", [rename_keys, delete_keys, exchange_keys, change_shapes, change_dtypes, put_nan_inside]
)
def test_corrupted_tensors_are_refused_or_of_no_use_to_the_model(corrupt, sources, tmp_path):
    refused = 0
    for seed in range(FILES_OF_EACH_KIND):
        source = sources[seed % len(sources)]
        tensors = source.tensors()
        corrupt(random.Random(seed), tensors)
        path = str(tmp_path / f"weights{seed}.pth")
        torch.save({**source.container, source.key: tensors}, path)
        report = load(source.model, path)
        refused += report is None
        # What loads is a corrupted classifier's head, which is dropped, or values rounded to another type.
        if report and any("converted" in note for note in report.notes):
            expected = convert_state_dict(tensors) if source.key != "model" else tensors
            assert same(source.model.state_dict(), {key: value.float() for key, value in expected.items()})
        elif report:
            assert same(source.model.state_dict(), source.expected)
    assert refused > FILES_OF_EACH_KIND / 2


@pytest.mark.parametrize("corrupt", [truncate, flip_bytes, overwrite_a_piece])
def test_corrupted_files_are_refused_or_lose_nothing(corrupt, sources, tmp_path):
    refused = 0
    for seed in range(FILES_OF_EACH_KIND):
        source = sources[seed % len(sources)]
        path = str(tmp_path / f"weights{seed}.pth")
        torch.save(source.container, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(corrupt(random.Random(seed), content))
        report = load(source.model, path)
        refused += report is None
        if report:  # corrupted in the padding between tensors
            assert same(source.model.state_dict(), source.expected)
    assert refused > FILES_OF_EACH_KIND / 2


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("form", ["legacy", "safetensors"])
@pytest.mark.parametrize("corrupt", [truncate, flip_bytes, overwrite_a_piece])
def test_formats_without_checksums_are_protected_by_a_digest(form, corrupt, sources, tmp_path):
    source = sources[3]
    path = tmp_path / "weights"
    if form == "safetensors":
        safetensors.torch.save_file(source.tensors(), path)
    else:
        torch.save(source.container, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for seed in range(8):
        corrupted = corrupt(random.Random(seed), content)
        path.write_bytes(corrupted)
        # Without the digest it may load wrong, but it ends in nothing but our errors.
        load(source.model, str(path))
        report = load(source.model, f"{path}#sha256={digest}") if corrupted != content else None
        assert report is None


def test_a_forged_pickle_with_right_checksums_ends_in_our_errors_only(sources, tmp_path):
    source = sources[3]
    torch.save(source.container, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "weights.pth"
    refused = 0
    for seed in range(FILES_OF_EACH_KIND):
        rng = random.Random(seed)
        corrupt = rng.choice([truncate, flip_bytes, overwrite_a_piece])
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, corrupt(rng, content) if name.endswith("data.pkl") else content)
        refused += load(source.model, str(path)) is None
    assert refused > FILES_OF_EACH_KIND / 2
