"""Runs that are stopped and resumed, and what they keep."""

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from rev_det.engine import Trainer, argument_parser, load_config
from rev_det.engine.train_step import NonFiniteError
from rev_det.stopping import STOP_SIGNALS, Interrupted, StopRequest, passing_on_to_children

# Drop path, flips and sampled RoIs: what is drawn at random must be drawn again.
SETTINGS = (
    "SOLVER.MAX_ITER",
    "6",
    "SEED",
    "5",
    "MODEL.REV_MVIT.DROP_PATH_RATE",
    "0.3",
    "DATASETS.TEST",
    "()",
)


class At(HookBase):
    """Does something after an iteration."""

    def __init__(self, iteration: int, action):
        self.iteration, self.action = iteration, action

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.action()


@pytest.fixture
def trainer(tiny_run, nano_mvit):
    """Makes trainers of six iterations, in the same folder unless told otherwise."""

    def make(*opts: str, resume: bool = False, at: int = -1, action=None) -> Trainer:
        args = argument_parser().parse_args(tiny_run(nano_mvit, *SETTINGS, *opts))
        # As Detectron2's default_setup does, for the weights of a new model.
        seed_all_rng(5)
        trainer = Trainer(load_config(args.config_file, args.opts, args.dataset))
        trainer.resume_or_load(resume=resume)
        # Before the hooks that save.
        trainer._hooks.insert(0, hook := At(at, action))
        hook.trainer = trainer
        return trainer

    return make


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as Python has it: in the background a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_that_is_asked_to_stop_and_resumed_ends_as_if_it_had_not_been(trainer, tmp_path, number):
    whole = tmp_path / "whole"
    trainer("OUTPUT_DIR", str(whole)).train()
    handlers = [signal.getsignal(n) for n in STOP_SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        # With worker processes that have already loaded ahead.
        trainer("DATALOADER.NUM_WORKERS", "1", at=1, action=send(number)).train()
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == handlers
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_0000002.pth"
    resumed = trainer(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    assert_equal(parameters(tmp_path / "output/model_final.pth"), parameters(whole / "model_final.pth"))


def test_a_resumed_run_without_a_seed_draws_what_it_would_have_drawn(trainer, tmp_path):
    first = trainer("SEED", "-1", "SOLVER.CHECKPOINT_PERIOD", "3")
    first.train()
    ended = parameters(tmp_path / "output/model_final.pth")
    (tmp_path / "output/last_checkpoint").write_text("model_0000002.pth")
    trainer("SEED", "-1", resume=True).train()
    assert_equal(parameters(tmp_path / "output/model_final.pth"), ended)


def test_a_run_that_accumulates_is_resumed_exactly(trainer, tmp_path):
    opts = ("SOLVER.ACCUMULATE", "2", "SOLVER.CHECKPOINT_PERIOD", "3")
    trainer(*opts).train()
    ended = parameters(tmp_path / "output/model_final.pth")
    (tmp_path / "output/last_checkpoint").write_text("model_0000002.pth")
    trainer(*opts, resume=True).train()
    assert_equal(parameters(tmp_path / "output/model_final.pth"), ended)


def test_while_nothing_has_to_be_saved_a_signal_ends_at_once():
    stop = StopRequest()
    with stop.listening(), pytest.raises(Interrupted) as ended:
        with stop.ending_at_once():
            send(signal.SIGTERM)()
            pytest.fail("went on")
    assert ended.value.code == 128 + signal.SIGTERM
    # One that came before ends it as well.
    with pytest.raises(Interrupted), stop.ending_at_once():
        pytest.fail("went on")


def test_what_fails_after_a_signal_has_ended_an_evaluation_does_not_hide_it():
    stop = StopRequest()
    with stop.listening(), pytest.raises(Interrupted), stop.ending_at_once():
        try:
            send(signal.SIGTERM)()
        finally:
            raise RuntimeError("DataLoader worker is killed by signal: Terminated")
    with pytest.raises(RuntimeError, match="of its own"), StopRequest().ending_at_once():
        raise RuntimeError("of its own")


def test_the_second_interrupt_is_not_waited_for_and_the_first_says_so(caplog):
    stop = StopRequest()
    with stop.listening():
        send(signal.SIGINT)()
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)()
    (message,) = caplog.messages
    assert "--resume" in message and "second Ctrl-C" in message


def test_under_torchrun_which_passes_them_on_interrupts_count_as_one(caplog):
    stop = StopRequest(second_ends=False)
    with stop.listening():
        send(signal.SIGINT)()
        send(signal.SIGINT)()
    assert stop() and "second" not in caplog.text


def test_interrupts_that_others_handle_or_ignore_are_left_to_them():
    stop, seen = StopRequest(), []
    for handler in (lambda *args: seen.append(args[0]), signal.SIG_IGN):
        signal.signal(signal.SIGINT, handler)
        with stop.listening():
            send(signal.SIGINT)()
        assert signal.getsignal(signal.SIGINT) is handler
    assert seen == [signal.SIGINT] and not stop()


def test_worker_processes_that_hear_of_an_interrupt_go_on(caplog):
    def work() -> None:
        send(signal.SIGINT)()
        os._exit(7 if not caplog.messages else 8)

    stop = StopRequest()
    with stop.listening(), stop.ending_at_once():
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join()
    assert worker.exitcode == 7


def test_other_threads_train_without_handling_signals(trainer):
    run = trainer("SOLVER.MAX_ITER", "1")
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert run.iter == 1


def test_a_signal_in_an_evaluation_costs_nothing_and_the_evaluation_is_done_on_resuming(
    trainer, tmp_path, monkeypatch
):
    opts = ("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3")
    whole = tmp_path / "whole"
    trainer(*opts, "OUTPUT_DIR", str(whole)).train()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "test", lambda *args: send(signal.SIGTERM)())
        with pytest.raises(SystemExit):
            trainer(*opts).train()
    # Saved before it was evaluated, though no checkpoint was due.
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_0000002.pth"
    trainer(*opts, resume=True).train()
    assert_equal(parameters(tmp_path / "output/model_final.pth"), parameters(whole / "model_final.pth"))
    results = [average_precisions(folder) for folder in (whole, tmp_path / "output")]
    assert [iteration for iteration, _ in results[0]] == [2, 6]
    np.testing.assert_array_equal(*results)


def average_precisions(folder: Path) -> list[tuple[int, float]]:
    """Iteration and box AP of every evaluation."""
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(record["iteration"], record["bbox/AP"]) for record in records if "bbox/AP" in record]


def test_a_loss_that_is_not_finite_leaves_a_report_and_the_state_before_it(trainer, tmp_path):
    run = trainer()
    ruin = At(
        2, lambda: run.model.roi_heads.box_predictor.cls_score.weight.register_hook(lambda g: g * np.nan)
    )
    run.register_hooks([ruin])
    with pytest.raises(NonFiniteError, match=r"iteration 3: .*images/.*non_finite.json; --resume") as caught:
        run.train()
    output = tmp_path / "output"
    report = json.loads((output / "non_finite.json").read_text())
    assert report == caught.value.report
    assert report["iteration"] == 3 and len(report["processes"][0]["images"][0]) == 2
    assert report["processes"][0]["gradient_norm"] == "nan"
    assert (output / "last_checkpoint").read_text() == "model_last_good.pth"
    # Resumed, it repeats the step that failed, which now does not.
    resumed = trainer(resume=True)
    assert resumed.start_iter == 3
    resumed.train()
    trainer("OUTPUT_DIR", str(tmp_path / "whole")).train()
    assert_equal(parameters(output / "model_final.pth"), parameters(tmp_path / "whole/model_final.pth"))


def test_the_last_checkpoints_and_the_best_are_kept(trainer, tmp_path, monkeypatch):
    results = iter([{"bbox": {"AP": ap}} for ap in (float("nan"), 30.0, 50.0, 40.0, float("nan"), 45.0)])
    monkeypatch.setattr(Trainer, "test", lambda *args: next(results))
    opts = ("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "1")
    monkeypatch.setattr("rev_det.engine.trainer.show_predictions", lambda trainer: None)
    output = tmp_path / "output"
    output.mkdir()
    (output / "model_0000009.pth").write_text("of a longer run before")
    (output / ".part-model_0000001.pth").write_text("of a run that was killed")
    trainer(*opts, "SOLVER.CHECKPOINT_KEEP", "2").train()
    assert sorted(path.name for path in output.glob("*.pth")) == [
        "model_0000003.pth",
        "model_0000004.pth",
        "model_0000009.pth",
        "model_best.pth",
        "model_final.pth",
    ]
    assert torch.load(output / "model_best.pth", weights_only=True)["iteration"] == 2
    summary = json.loads((output / "summary.json").read_text())
    assert summary["best"] == {"value": 50.0, "iteration": 2, "file": "model_best.pth"}
    assert summary["metrics"] == {"bbox/AP": 45.0}


def test_a_checkpoint_that_is_the_best_twice_leaves_nothing_behind(trainer, tmp_path, monkeypatch):
    # Evaluated, then resumed from a time before that and evaluated again.
    monkeypatch.setattr(Trainer, "test", lambda *args: {"bbox": {"AP": 30.0}})
    monkeypatch.setattr("rev_det.engine.trainer.show_predictions", lambda trainer: None)
    opts = ("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3", "SOLVER.MAX_ITER", "4")
    trainer(*opts).train()
    (tmp_path / "output/last_checkpoint").write_text("model_0000002.pth")
    trainer(*opts, resume=True).train()
    best = tmp_path / "output/model_best.pth"
    assert best.samefile(tmp_path / "output/model_0000002.pth")
    assert not list((tmp_path / "output").glob(".part*"))


def test_what_was_best_is_remembered_by_a_resumed_run(trainer, tmp_path, monkeypatch):
    results = iter([{"bbox": {"AP": ap}} for ap in (30.0, 50.0, 20.0, 20.0, 40.0, 45.0)])
    monkeypatch.setattr(Trainer, "test", lambda *args: next(results))
    monkeypatch.setattr("rev_det.engine.trainer.show_predictions", lambda trainer: None)
    opts = ("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "1")
    with pytest.raises(SystemExit):
        trainer(*opts, at=2, action=send(signal.SIGTERM)).train()
    assert trainer(*opts, resume=True).train() is None
    assert torch.load(tmp_path / "output/model_best.pth", weights_only=True)["iteration"] == 1


def test_a_disk_that_is_full_is_told_and_the_last_checkpoint_stays(trainer, tmp_path, monkeypatch):
    opts = ("SOLVER.CHECKPOINT_PERIOD", "2")
    run = trainer(*opts)
    save = torch.save

    def fail_later(data, file):
        if data["iteration"] < 3:
            return save(data, file)
        file.write(b"half")
        with open("/dev/full", "wb") as full:
            save(data, full)

    monkeypatch.setattr(torch, "save", fail_later)
    with pytest.raises(OSError, match=r"model_0000003.pth .*No space left.* free.*model_0000001.pth"):
        run.train()
    monkeypatch.undo()
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_0000001.pth"
    assert not list((tmp_path / "output").glob(".part*"))
    assert trainer(*opts, resume=True).start_iter == 2


@pytest.mark.parametrize("write", ["metrics.json", "model_best.pth"])
def test_a_disk_that_is_full_when_anything_else_is_written_is_told_as_well(
    trainer, tmp_path, monkeypatch, write
):
    monkeypatch.setattr(Trainer, "test", lambda *args: {"bbox": {"AP": 30.0}})
    monkeypatch.setattr("rev_det.engine.trainer.show_predictions", lambda trainer: None)
    opts = ("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3")
    run = trainer(*opts)

    def fail(*args):
        raise OSError(28, "No space left on device")

    if write == "model_best.pth":
        monkeypatch.setattr("os.link", fail)
        monkeypatch.setattr("shutil.copyfile", fail)
    else:
        monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", fail)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left.* last checkpoint is .*/model_"):
        run.train()
    monkeypatch.undo()
    assert trainer(*opts, resume=True).start_iter >= 3


def test_a_state_before_a_failed_step_that_cannot_be_saved_does_not_hide_the_failure(trainer, monkeypatch):
    run = trainer()
    ruin = At(
        2, lambda: run.model.roi_heads.box_predictor.cls_score.weight.register_hook(lambda g: g * np.nan)
    )
    run.register_hooks([ruin])

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(NonFiniteError, match=r"iteration 3: .*images/.* cannot be written: .*No space left"):
        run.train()


def test_no_process_ends_before_the_first_has_saved(trainer, tmp_path, monkeypatch):
    # The one that ends takes the others with it, even in the middle of writing.
    output, seen = tmp_path / "output", []
    monkeypatch.setattr(
        "detectron2.utils.comm.synchronize",
        lambda: seen.append(sorted(path.name for path in output.glob("*.pth"))),
    )
    monkeypatch.setattr(Trainer, "test", lambda *args: send(signal.SIGTERM)())
    with pytest.raises(Interrupted):
        trainer("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3").train()
    assert seen == [["model_0000002.pth"]]
    resumed = trainer("SOLVER.CHECKPOINT_PERIOD", "9", resume=True)
    resumed.model.roi_heads.box_predictor.cls_score.weight.register_hook(lambda g: g * np.nan)
    with pytest.raises(NonFiniteError):
        resumed.train()
    assert seen[1:] == [["model_0000002.pth", "model_last_good.pth"]]


def test_a_run_that_is_resumed_at_its_end_is_evaluated_and_no_iteration_is_added(trainer, tmp_path):
    opts = ("DATASETS.TEST", "('tiny',)")
    trainer(*opts).train()
    output = tmp_path / "output"
    first = json.loads((output / "summary.json").read_text())
    trainer(*opts, resume=True).train()
    results = average_precisions(output)
    assert results[0][0] == 6
    np.testing.assert_array_equal(results[0], results[1])
    second = json.loads((output / "summary.json").read_text())
    assert second["best"] == first["best"] and second["last_losses"] == first["last_losses"]


def test_a_run_that_is_resumed_beyond_a_shorter_schedule_ends_with_its_last_state(trainer, tmp_path, caplog):
    with pytest.raises(SystemExit):
        trainer(at=2, action=send(signal.SIGTERM)).train()
    opts = ("SOLVER.MAX_ITER", "2", "DATASETS.TEST", "('tiny',)")
    trainer(*opts, resume=True).train()
    (said,) = [record for record in caplog.records if "nothing is left to train" in record.getMessage()]
    assert said.levelname == "WARNING" and "at iteration 4, SOLVER.MAX_ITER is 2" in said.getMessage()
    final = torch.load(tmp_path / "output/model_final.pth", weights_only=True)
    assert final["iteration"] == 3
    assert_equal(final["model"], parameters(tmp_path / "output/model_0000003.pth"))


def test_a_run_that_is_resumed_with_other_batches_or_rates_says_what_is_kept(trainer, caplog):
    with pytest.raises(SystemExit):
        trainer(at=2, action=send(signal.SIGTERM)).train()
    caplog.clear()
    trainer(resume=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    # Rescaled, the learning rate is another one.
    opts = ("SOLVER.REFERENCE_IMS_PER_BATCH", "2", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE", "2")
    resumed = trainer(*opts, resume=True)
    assert "was made with " in caplog.text and "SOLVER.IMS_PER_BATCH 2, now 4" in caplog.text
    assert "at most 0.0015, are kept, and not those of this config, at most 0.00212132" in caplog.text
    assert {group["initial_lr"] for group in resumed.optimizer.param_groups} == {0.0015}


def test_a_run_that_is_resumed_on_other_data_says_so(trainer, tiny_dataset, caplog):
    with pytest.raises(SystemExit):
        trainer(at=2, action=send(signal.SIGTERM)).train()
    annotations, _, images = tiny_dataset.partition("=")[2].partition(":")
    other = ("DATASETS.COCO_JSON", repr([["other", annotations, images]]), "DATASETS.TRAIN", "('other',)")
    trainer(*other, "DATASETS.TEST", "('tiny',)", resume=True)
    assert "was made with DATASETS.TRAIN ['tiny'], now ['other']" in caplog.text


def test_a_checkpoint_of_an_older_version_brings_what_was_best(trainer, tmp_path):
    # Detectron2 keeps the state of a hook under the name of its class, which was another.
    run = trainer()
    best = {"best": {"value": 50.0, "iteration": 1}}
    run.load_state_dict(run.state_dict() | {"hooks": {"Evaluation": best}})
    assert run.state_dict()["hooks"]["Evaluation"] == best


def test_processes_that_find_different_checkpoints_do_not_train(trainer, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda start: [4, start])
    with pytest.raises(ValueError, match="resume at iterations 4, 0: OUTPUT_DIR, .*output, must be the same"):
        trainer(resume=True)


def test_a_new_run_in_the_folder_of_an_earlier_one_says_so(trainer, caplog):
    with pytest.raises(SystemExit):
        trainer(at=2, action=send(signal.SIGTERM)).train()
    assert "earlier run" not in caplog.text
    assert trainer().start_iter == 0
    assert "/output, holds checkpoints of an earlier run" in caplog.text


def test_a_best_metric_that_is_not_measured_is_told_once_with_those_that_are(
    trainer, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Trainer, "test", lambda *args: {"bbox": {"AP": 30.0, "AP-cat": 1.0, "AP50": 2.0}})
    monkeypatch.setattr("rev_det.engine.trainer.show_predictions", lambda trainer: None)
    opts = ("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "2", "TEST.BEST_METRIC", "segm/AP")
    trainer(*opts).train()
    (message,) = [record.getMessage() for record in caplog.records if "BEST_METRIC" in record.getMessage()]
    assert "TEST.BEST_METRIC is 'segm/AP'" in message and message.endswith("there are bbox/AP, bbox/AP50")
    assert not (tmp_path / "output/model_best.pth").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_there_are_processes_to_pass_it_on_to_ends_the_run(number):
    with pytest.raises(Interrupted) as ended, passing_on_to_children():
        send(number)()
        pytest.fail("went on")
    assert ended.value.code == 128 + number
