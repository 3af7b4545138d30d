"""RevCheckpointer: Detectron2's interface, exact resuming, whole files."""

import logging
import os
import pickle

import detectron2.checkpoint
import numpy as np
import pytest
import torch
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import MultiStepParamScheduler
from tiny_weights import make_detector, make_mvit, make_vit, pyslowfast_container, same, snapshot
from torch import nn

from rev_det.checkpoint import RevCheckpointer, convert_state_dict, files


class Training:
    """A model with all that Detectron2's trainers keep beside it."""

    def __init__(self, folder, seed, **options):
        torch.manual_seed(seed)
        self.model = make_vit()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        schedule = MultiStepParamScheduler([1.0, 0.1], milestones=[3], num_updates=10)
        self.scheduler = LRMultiplier(self.optimizer, schedule, max_iter=10)
        self.iteration = 0
        self.checkpointer = RevCheckpointer(
            self.model,
            str(folder),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            trainer=self,
            **options,
        )

    def state_dict(self):
        return {"iteration": self.iteration, "hooks": {"Kept": {"best": 0.5, "names": ("a", None)}}}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]

    def step(self):
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(self.iteration))
        self.optimizer.zero_grad()
        self.model(image)["last_feat"].square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.iteration += 1


def test_a_resumed_run_goes_on_exactly_where_it_was(tmp_path):
    first = Training(tmp_path, seed=0)
    for _ in range(2):
        first.step()
    first.checkpointer.save("model_0000001", iteration=1)
    # Only resuming takes the optimizer along, and it is strict whatever the weights are.
    resumed = Training(tmp_path, seed=1, strict_weights=False)
    rest = resumed.checkpointer.resume_or_load("elsewhere.pth", resume=True)
    assert rest == {"iteration": 1}
    assert resumed.iteration == 2
    for training in (first, resumed):
        training.step()
        training.step()
    assert same(resumed.model.state_dict(), first.model.state_dict())
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    moments, expected = (t.optimizer.state_dict()["state"] for t in (resumed, first))
    assert all(same(moments[i], expected[i]) for i in expected)


def test_load_is_detectron2s(tmp_path):
    """load(path) takes all that is there, with checkpointables=[] the weights alone; load("") nothing."""
    first = Training(tmp_path, seed=0)
    first.step()
    first.checkpointer.save("model", iteration=7, note="kept")
    path = str(tmp_path / "model.pth")
    assert Training(tmp_path, seed=1).checkpointer.load(path) == {"iteration": 7, "note": "kept"}
    # What starts anew takes the weights alone.
    fine_tuned = Training(tmp_path, seed=1)
    rest = fine_tuned.checkpointer.resume_or_load(path, resume=False)
    assert set(rest) == {"iteration", "note", "optimizer", "scheduler", "trainer"}
    assert same(fine_tuned.model.state_dict(), first.model.state_dict())
    assert fine_tuned.iteration == 0 and not fine_tuned.optimizer.state
    assert Training(tmp_path, seed=1).checkpointer.load("") == {}
    # And Detectron2 itself reads what we write.
    model = make_vit()
    detectron2.checkpoint.DetectionCheckpointer(model).load(path)
    assert same(model.state_dict(), first.model.state_dict())


@pytest.mark.parametrize(
    "saved, resumed, words",
    [
        (make_vit(), make_vit(pretrain_img_size=96), r"pos_embed \(1, 16, 32\) float32 in the file"),
        (
            make_vit(),
            make_vit().double(),
            r"pos_embed \(1, 16, 32\) float32 in the file, \(1, 16, 32\) float64",
        ),
        (
            make_mvit(out_features=("scale3", "scale4")),
            make_mvit(),
            "missing in the file: scale2_norm.weight",
        ),
        (
            make_detector(classes=5),
            make_detector(classes=3),
            r"5 in the file, 3 .* \(MODEL.ROI_HEADS.NUM_CLA",
        ),
    ],
)
def test_resuming_another_model_is_an_error(tmp_path, saved, resumed, words):
    RevCheckpointer(saved, str(tmp_path)).save("model")
    before = snapshot(resumed)
    for strict in (True, False):
        with pytest.raises(ValueError, match=f"{words}.*Resume with the config"):
            RevCheckpointer(resumed, str(tmp_path), strict_weights=strict).resume_or_load("", resume=True)
    assert same(resumed.state_dict(), before)


def test_resuming_needs_the_state_of_everything(tmp_path):
    RevCheckpointer(make_vit(), str(tmp_path)).save("model_0000001")
    training = Training(tmp_path, seed=1)
    before = snapshot(training.model)
    with pytest.raises(ValueError, match="model_0000001.pth.*no state of optimizer, scheduler, trainer"):
        training.checkpointer.resume_or_load("", resume=True)
    assert same(training.model.state_dict(), before)


def last_checkpoints(folder):
    """A checkpointer with four checkpoints in a folder, model_3.pth the last."""
    checkpointer = RevCheckpointer(make_vit(), str(folder))
    for iteration in range(4):
        checkpointer.save(f"model_{iteration}")
        os.utime(folder / f"model_{iteration}.pth", (iteration, iteration))
    return checkpointer


@pytest.mark.parametrize(
    "content",
    [b"../model.pth", b"/etc/hostname", b"/run/model_0000001.pth", b"", b"\x80\x02}q", b"a\nb", b"x" * 300]
    + ["a folder", "a link to a file", "a link to nowhere"],
)
def test_a_last_checkpoint_in_another_folder_is_neither_followed_nor_quoted(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    note, outside = folder / "last_checkpoint", tmp_path / "secret"
    outside.write_text("of somebody else")
    checkpointer = last_checkpoints(folder)
    note.unlink()
    if isinstance(content, bytes):
        note.write_bytes(content)
    elif content == "a folder":
        note.mkdir()
    else:
        note.symlink_to(outside if content == "a link to a file" else "nowhere")
    whole = "model_3.pth beside it is whole: write this name into last_checkpoint"
    message = f"run/last_checkpoint does not hold the name of a checkpoint beside it; {whole}"
    with pytest.raises(ValueError, match=message) as caught:
        checkpointer.resume_or_load("", resume=True)
    assert "somebody" not in str(caught.value)
    assert not content or not isinstance(content, bytes) or content.decode("latin-1") not in str(caught.value)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def diverged(path):
    data = torch.load(path, weights_only=True)
    data["model"]["norm.bias"][0] = torch.nan
    torch.save(data, path)


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (truncated, ValueError, "model_3.pth is damaged"),
        (diverged, ValueError, "model_3.pth holds NaN"),
        (os.unlink, FileNotFoundError, "model_3.pth does not exist"),
        (lambda path: (path.unlink(), path.mkdir()), ValueError, "model_3.pth is a directory"),
    ],
)
def test_of_a_damaged_last_checkpoint_the_newest_that_is_whole_is_named(tmp_path, damage, error, words):
    checkpointer = last_checkpoints(tmp_path)
    damage(tmp_path / "model_3.pth")
    truncated(tmp_path / "model_2.pth")
    with pytest.raises(error, match=f"{words}.*; model_1.pth beside it is whole"):
        checkpointer.resume_or_load("", resume=True)
    for iteration in (0, 1):
        diverged(tmp_path / f"model_{iteration}.pth")
    with pytest.raises(error, match=f"{words}.*; no other checkpoint is whole"):
        checkpointer.resume_or_load("", resume=True)


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = make_vit()
    checkpointer = RevCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    saved = snapshot(model)

    def full_disk(data, f):
        f.write(b"PK\x03\x04 half of it")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        for name in ("model", "model_next"):
            with pytest.raises(OSError, match="No space left"):
                checkpointer.save(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    nn.init.zeros_(model.pos_embed)
    checkpointer.resume_or_load("", resume=True)
    assert same(model.state_dict(), saved)


@pytest.mark.parametrize("state, words", [(np.zeros(2), "numpy"), (nn.Linear(1, 1), "Linear")])
def test_state_that_could_not_be_loaded_is_not_saved(tmp_path, state, words):
    checkpointer = RevCheckpointer(make_vit(), str(tmp_path))
    with pytest.raises(ValueError, match=f"model.pth was not written.*{words}"):
        checkpointer.save("model", more={"inside": [state]})
    assert list(tmp_path.iterdir()) == []


def test_only_the_process_that_is_to_save_does(tmp_path):
    RevCheckpointer(make_vit(), str(tmp_path), save_to_disk=False).save("model")
    RevCheckpointer(make_vit()).save("model")
    assert list(tmp_path.iterdir()) == []


def test_published_weights_go_into_a_detector_which_cannot_be_evaluated_with_them(
    official_mvit, tmp_path, caplog
):
    path = str(tmp_path / "REV_MVIT_B.pyth")
    torch.save(pyslowfast_container(official_mvit, num_heads=1), path)
    model = make_detector()
    training = RevCheckpointer(model, str(tmp_path), optimizer=torch.optim.AdamW(model.parameters()))
    # Their optimizer and epoch are not ours.
    assert training.resume_or_load(path, resume=True) == {}
    expected = convert_state_dict(official_mvit)
    state = model.state_dict()
    assert all(torch.equal(state[f"backbone.bottom_up.{key}"], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="REV_MVIT_B.pyth.*no detection heads"):
        RevCheckpointer(model, evaluation=True).resume_or_load(path, resume=False)
    with pytest.raises(ValueError, match="no weights to evaluate: set MODEL.WEIGHTS"):
        RevCheckpointer(model, evaluation=True).load("")
    with caplog.at_level(logging.WARNING, "rev_det"):
        RevCheckpointer(model, evaluation=True, strict_weights=False).load(path)
    assert "random" in caplog.text


def test_evaluation_of_a_trained_detector(tmp_path, caplog):
    source, target = make_detector(classes=5), make_detector(classes=5)
    RevCheckpointer(source, str(tmp_path)).save("model_final")
    path = str(tmp_path / "model_final.pth")
    RevCheckpointer(target, evaluation=True).load(path)
    assert same(target.state_dict(), source.state_dict())
    with pytest.raises(ValueError, match="5 in the file, 3 in the model"):
        RevCheckpointer(make_detector(classes=3), evaluation=True).load(path)
    with caplog.at_level(logging.WARNING, "rev_det"):
        RevCheckpointer(make_detector(classes=3)).load(path)
    assert "start anew" in caplog.text


def test_an_r50_file_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"R-50.pkl is of Detectron2's model zoo.*MODEL.WEIGHTS"):
        RevCheckpointer(make_detector()).load("detectron2://ImageNetPretrained/MSRA/R-50.pkl")


# Models with other backbones.


class Other(nn.Module):
    def __init__(self, outputs=2):
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.head = nn.Linear(4, outputs)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo pickle, as detectron2://zoo/R-50.pkl, and its path."""
    weights = {key: value.numpy() for key, value in Other().state_dict().items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "zoo"}))
    original = files.PathManager.get_local_path

    def get_local_path(name, **kwargs):
        return str(path) if name == "detectron2://zoo/R-50.pkl" else original(name, **kwargs)

    monkeypatch.setattr(files.PathManager, "get_local_path", get_local_path)
    return path, weights


def test_other_models_read_detectron2s_zoo_from_its_address_only(zoo):
    path, weights = zoo
    model = Other()
    RevCheckpointer(model).load("detectron2://zoo/R-50.pkl")
    assert same(model.state_dict(), {key: torch.from_numpy(value) for key, value in weights.items()})
    with pytest.raises(ValueError, match="R-50.pkl is a pickle.*detectron2://"):
        RevCheckpointer(Other()).load(str(path))


def test_other_models_load_as_in_detectron2_but_safely(tmp_path):
    source, target = Other(), Other()
    RevCheckpointer(source, str(tmp_path)).save("model", iteration=4)
    path = tmp_path / "model.pth"
    assert RevCheckpointer(target).load(str(path)) == {"iteration": 4}
    assert same(target.state_dict(), source.state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        RevCheckpointer(target).load(str(path))
    with pytest.raises(ValueError, match="expected 0000"):
        RevCheckpointer(target).load(f"{path}#sha256={'0' * 64}")
    with pytest.raises(FileNotFoundError, match="gone.pth does not exist"):
        RevCheckpointer(target).load(str(tmp_path / "gone.pth"))


@pytest.mark.parametrize(
    "key, name", [("model_state", "a.pyth"), ("model", "a.pth?matching_heuristics=True")]
)
def test_detectron2_matches_other_names_by_their_ends_in_pycls_files_and_where_asked(tmp_path, key, name):
    source, target = Other(), Other()
    path = tmp_path / name.partition("?")[0]
    torch.save({key: dict(source.backbone.state_dict()), "epoch": 3}, path)
    RevCheckpointer(target).load(str(tmp_path / name))
    assert same(target.backbone.state_dict(), source.backbone.state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged or truncated"):
        RevCheckpointer(target).load(str(tmp_path / name))


@pytest.mark.parametrize("evaluation", [True, False])
def test_a_reversible_models_weights_are_refused_for_other_models(official_vit, tmp_path, evaluation):
    published, own = tmp_path / "REV_VIT_S.pyth", tmp_path / "own.pth"
    torch.save(pyslowfast_container(official_vit), published)
    torch.save({"model": make_detector().state_dict()}, own)
    for path in (str(published), str(own)):
        with pytest.raises(ValueError, match=r"Rev-MViT's, but the model's backbone is not .*BACKBONE\.NAME"):
            RevCheckpointer(Other(), evaluation=evaluation).load(path)
        RevCheckpointer(Other(), evaluation=evaluation, strict_weights=False).load(path)


def test_other_models_are_evaluated_and_resumed_whole_or_not_at_all(tmp_path):
    backbone = {f"backbone.{key}": value for key, value in Other().backbone.state_dict().items()}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    (tmp_path / "last_checkpoint").write_text("backbone.pth")
    path = str(tmp_path / "backbone.pth")
    RevCheckpointer(Other()).load(path)
    RevCheckpointer(Other(), evaluation=True, strict_weights=False).load(path)
    with pytest.raises(ValueError, match="lack 2 tensors of the model.*head"):
        RevCheckpointer(Other(), evaluation=True).load(path)
    with pytest.raises(ValueError, match="lack 2 tensors of the model.*head"):
        RevCheckpointer(Other(), str(tmp_path)).resume_or_load("", resume=True)
    with pytest.raises(ValueError, match="no state of scheduler"):
        RevCheckpointer(Other(), str(tmp_path), scheduler=nn.Identity()).resume_or_load("", resume=True)
    RevCheckpointer(Other(outputs=5), str(tmp_path)).save("model")
    with pytest.raises(ValueError, match="lack 2 tensors of the model.*head"):
        RevCheckpointer(Other(outputs=2), evaluation=True).load(str(tmp_path / "model.pth"))
