"""The parts of benchmarks/gpu.py, which runs each in a process of its own: what they measure."""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_run import PARTS, Run, describe, in_one_line, measured, part
from torch.profiler import ProfilerActivity, profile

from rev_det.comparison.cases import Case, Counting, Measuring, training_step
from rev_det.comparison.models import (
    CACHED,
    CHECKPOINT,
    CHECKPOINT_KEPT,
    DETECTRON2,
    MODELS,
    REVERSIBLE,
    REVERSIBLE_KEPT,
)
from rev_det.comparison.presets import PRESETS, memory_by_images, memory_per_image
from rev_det.devices import cudnn_attention
from rev_det.doctor import PROBLEM, examine
from rev_det.engine.metrics import read_metrics
from rev_det.engine.model_config import read_config
from rev_det.memory.measure import largest_batch, seconds_of
from rev_det.memory.table import Row, save_json

ROOT = Path(__file__).resolve().parents[1]
# The most important first: time may run out.
TRAININGS = (CACHED, REVERSIBLE_KEPT, CHECKPOINT_KEPT, CHECKPOINT, REVERSIBLE, DETECTRON2)
LIMITS = (16 * 10**9, 24 * 10**9, 8 * 10**9)  # bytes
# What a kernel is for, by the names of the operator that launched it and its own; the first that matches.
KINDS = (
    ("attention", r"attention|sdpa|flash|fmha"),
    ("NMS and RoIAlign", r"nms|roi_?align"),
    ("optimizer and clipping", r"adam|multi_tensor|_foreach"),
    ("norms", r"(layer|group|batch)_?norm|gammabeta"),
    ("convolution", r"conv|cudnn|[dw]grad|fprop"),
    ("matrix products", r"::(add|b|badd)?m[mv]\b|::linear|gemm|cutlass|cublas|nvjet|split_?k"),
    ("casts", r"^cast "),
    ("copies and fills", r"memcpy|memset|::(copy_|cat|fill_|zero_|clone|repeat)\b"),
    ("elementwise and all else", r""),
)
ANNOTATIONS = ("instances_train_used.json", "instances_train.json", "train.json", "annotations.json")
STEP = (
    *("mean", "throughput", "allocated", "in all, counted", "allocated, measured by counted"),
    *("peak memory", "peak memory, relative", "time, relative", "timed steps"),
)
STEP_NOTE = (
    "Mean: of the timed steps, as Detectron2 reports training. Allocated: `torch.cuda.max_memory_allocated`, "
    "beside the counted memory in all; peak memory: above what existed before the step. Relative: to cached."
)
BATCH_NOTE = (
    "Under a limit of PyTorch's allocator (`torch.cuda.set_per_process_memory_fraction`), found by trying; "
    "GB are 10^9 bytes. Throughput: of a single step after two others."
)
DATA_NOTE = (
    "One seed, evaluated on the images that were trained on. Losses apart: the largest relative difference "
    "of the two curves, which the file holds. The command's seconds have start and evaluation in them."
)


# ---- cases ----


def detectors(run: Run, *families: str) -> list[Case]:
    """Mask R-CNN with each family's backbone, in every way of training; 2 images."""
    cases = []
    for family in families:
        name, size = ("Rev-MViT", (800, 1344)) if family == "mvit" else ("Rev-ViT", (1024, 1024))
        file, opts = f"COCO-Detection/mask_rcnn_rev_{family}_b_fpn_3x.yaml", ["MODEL.WEIGHTS", ""]
        if run.quick:
            size, file = (128, 128), f"Quickstart/mask_rcnn_rev_{family}_nano_fpn.yaml"
            # The nano ViT has fewer channels than its groups, where Detectron2 makes it.
            opts += ["MODEL.FPN.NORM", ""]
        cfg = read_config(str(ROOT / "configs" / file), opts)
        title = f"Mask R-CNN, {name}-{'nano' if run.quick else 'B'}"
        cases += [Case(title, None, training, 2, size, "bf16", None, cfg) for training in TRAININGS]
    return cases


def backbones(run: Run, *dtypes: str) -> list[Case]:
    cases = []
    for dtype in dtypes:
        for key, size, shallow in (("rev_mvit_b", (800, 1344), 7), ("rev_vit_b", (1024, 1024), 2)):
            model, depth = MODELS[key], None
            if run.quick:
                size, depth = (64, 64), shallow
            cases += [Case(model.title, model, training, 2, size, dtype, depth) for training in TRAININGS]
    return cases


# ---- parts ----


@part(2, "The installation (`rev-det doctor`)")
def doctor(run: Run) -> None:
    for finding in examine():
        # Where things lie on this machine concerns nobody.
        detail = re.sub(r"[,;]? ?(?<![\w.])/[^\s,;:]+", "", finding.detail)
        note = f"failed: {detail}" if finding.status == PROBLEM else detail
        run.add(Row({"what": finding.what, "status": finding.status}, note=note))


@part(8, "The tests that need a GPU (`pytest -m gpu`)")
def tests(run: Run) -> None:
    class Outcomes:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                self.pytest_collectreport(report)

        def pytest_collectreport(self, report):
            when = getattr(report, "when", "collect")
            if when == "collect" and not report.failed:
                return
            outcome = "error" if report.failed and when != "call" else report.outcome
            lines = [line[4:] for line in report.longreprtext.splitlines() if line.startswith("E   ")]
            note = f"failed: {''.join(lines[:1])}" if report.failed else ""
            seconds = {"time": measured(getattr(report, "duration", 0.0), "s")}
            run.add(Row({"test": report.nodeid, "outcome": outcome}, seconds, note=note))

    where = "tests/engine/test_amp.py" if run.quick else "tests"
    chosen = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*chosen, str(ROOT / where)], [Outcomes()])
    counts = Counter(row.labels["outcome"] for row in run.rows)
    run.further["counts"] = dict(counts)
    run.remarks.append(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not counts["error"]:
        raise RuntimeError(f"pytest ended with exit code {int(code)}")


def beside_the_count(run: Run, case: Case, share: float) -> Row:
    """Measure a step; its warm-up and steps are fewer than Detectron2's 100 and 400 where time is short."""
    start = time.monotonic()
    counted = Counting().step(case).figures
    row = Measuring(run.device, 2, 3).step(case)
    if row.figures:
        steps = (share - (time.monotonic() - start)) / (1.1 * row.figures["mean"].value)
        most = 2 if run.quick else 400 if case.model is None else 40
        steps = min(most, max(2, int(0.8 * steps)))
        row = Measuring(run.device, max(1, steps // 4), steps).step(case)
        row.figures["timed steps"] = measured(steps, "steps")
    for ours, theirs in (("peak memory", "peak memory"), ("allocated", "in all")):
        if ours in row.figures:
            ratio = row.figures[ours].value / counted[theirs].value
            row.figures[f"{ours}, measured by counted"] = measured(ratio, "x counted")
    row.figures |= {f"{name}, counted": figure for name, figure in counted.items()}
    return row


@part(
    8,
    "Training step of Mask R-CNN with Rev-MViT-B, AdamW included: 2 images of 800x1344",
    STEP_NOTE,
    columns=STEP,
)
def step_mvit(run: Run) -> None:
    run.compare(detectors(run, "mvit"), beside_the_count)


@part(
    8,
    "Training step of Mask R-CNN with Rev-ViT-B, AdamW included: 2 images of 1024x1024",
    STEP_NOTE,
    columns=STEP,
)
def step_vit(run: Run) -> None:
    run.compare(detectors(run, "vit"), beside_the_count)


@part(
    8,
    "Time by kind of kernel",
    "One step under torch's profiler. Step, processor (all threads) and idle (the share of a step in which "
    "no kernel runs) are of steps without it.",
)
def kernels(run: Run) -> None:
    # Detectors first; of the backbones the estimate is wanted beside the measured time.
    run.compare([*detectors(run, "mvit", "vit"), *backbones(run, "bf16")], kernel_row)


@cudnn_attention(False)  # as the trainer has it
def kernel_row(run: Run, case: Case, share: float) -> Row:
    """Milliseconds of a step by kind of kernel, of the processor, and without any kernel."""
    row, steps = Row(case.labels), 2 if run.quick else 10
    counted = Counting().step(case).figures if case.model is not None else {}
    step = training_step(case, str(run.device))
    step.settle()
    for _ in range(steps):
        step.run()
    processor = time.process_time()
    wall = 1e3 * seconds_of(lambda: [step.run() for _ in range(steps)], run.device) / steps
    processor = 1e3 * (time.process_time() - processor) / steps
    with tempfile.TemporaryDirectory() as folder:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])]
        with profile(activities=activities, record_shapes=True) as profiler:
            seconds_of(step.run, run.device)
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        times, launches = kernel_times(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    row.figures = {kind: measured(ms, "ms") for kind, ms in times.items()}
    busy = sum(times.values())
    row.figures |= {
        "all kernels": measured(busy, "ms"),
        "step": measured(wall, "ms"),
        "idle": measured(100 * max(0.0, 1 - busy / wall), "% of the step"),
        "processor": measured(processor, "ms"),
        "kernels launched": measured(launches, "kernels"),
    }
    row.figures |= {f"{name}, counted": figure for name, figure in counted.items()}
    return row


def kernel_times(events: Sequence[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """Add up a trace of torch's profiler.

    Args:
        events: ``traceEvents`` of its Chrome format, recorded with shapes.

    Returns:
        milliseconds by kind of `KINDS`; and how many kernels there were, copies and fills by the driver not
        counted.

    Raises:
        RuntimeError: there is no kernel in the trace.
    """
    operators = {e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op"}
    times, launches = {kind: 0.0 for kind, _ in KINDS}, 0
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launches += event["cat"] == "kernel"
        operator = operators.get(event.get("args", {}).get("External id"), {"name": "", "args": {}})
        types = [x for x in operator["args"].get("Input type", []) if x]
        is_cast = operator["name"] == "aten::copy_" and len(set(types[:2])) == 2
        text = f"{'cast ' if is_cast else ''}{operator['name']} {event['name']}".lower()
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, text))
        times[kind] += event["dur"] / 1e3
    if not launches:
        raise RuntimeError("torch's profiler saw no kernel: CUPTI may be missing, or not be permitted here")
    return times, launches


@part(
    6,
    "Training step of Mask R-CNN with images of changing shapes",
    "New shapes: none has been seen before; then the same once more. The difference is what is lost to "
    "choosing kernels and making room.",
)
def shapes(run: Run) -> None:
    cases = [case for case in detectors(run, "mvit", "vit") if case.training in (CACHED, REVERSIBLE_KEPT)]
    run.compare(cases, shapes_row)


def shapes_row(run: Run, case: Case, share: float) -> Row:
    """Seconds of a step with one shape, with shapes never seen before, and with these again."""
    row = Row(case.labels)
    step = training_step(case, str(run.device))
    step.settle()

    def mean(sizes: Sequence[tuple[int, int]]) -> float:
        seconds = []
        for size in sizes:
            step.resize(size)
            seconds.append(seconds_of(step.run, run.device))
        return statistics.fmean(seconds)

    trial = mean([case.size] * 3)
    # 2 settings, of 4 runs each.
    count = 2 if run.quick else max(5, min(50, int(share / 9 / trial)))
    # None twice: the convolutions' kernels, too, are chosen when a shape is new.
    new = multi_scale_shapes(2 * count, 256 if run.quick else case.cfg.INPUT.MAX_SIZE_TRAIN)
    for is_on, sizes in ((False, new[::2]), (True, new[1::2])):
        with cudnn_attention(is_on):
            mean([case.size] * 3)
            one, first, again = mean([case.size] * count), mean(sizes), mean(sizes)
        suffix = f", cuDNN attention {'on' if is_on else 'off'}"
        row.figures |= {
            f"one shape{suffix}": measured(one, "s"),
            f"new shapes{suffix}": measured(first, "s"),
            f"the same again{suffix}": measured(again, "s"),
            f"lost by a new shape{suffix}": measured(1e3 * (first - again), "ms"),
        }
    row.figures["steps of each"] = measured(count, "steps")
    return row


def multi_scale_shapes(count: int, longest: int) -> list[tuple[int, int]]:
    """Image sizes as multi-scale training has them, each of its own once padded to 32."""
    draw, found = random.Random(0), {}
    while len(found) < count:
        short = round(longest * draw.uniform(0.36, 0.6))
        long = min(longest, round(short * draw.uniform(1, 1.8)))
        size = (short, long) if draw.random() < 0.8 else (long, short)
        found.setdefault(tuple(math.ceil(x / 32) for x in size), size)
    return list(found.values())


@part(8, "Training step of the backbones alone, in bfloat16 and float32", STEP_NOTE)
def backbone(run: Run) -> None:
    run.compare(backbones(run, "bf16", "fp32"), beside_the_count)


@part(8, "Training step of Rev-MViT-B of growing depth: 2 images of 800x1344", STEP_NOTE, columns=STEP)
def depth(run: Run) -> None:
    cases = PRESETS["depth"].cases
    if run.quick:
        cases = [replace(case, depth=depth, size=(64, 64)) for depth in (7, 9) for case in cases[:3]]
    run.compare(cases, beside_the_count)


@part(8, "Largest batch: Mask R-CNN with Rev-MViT-B, 800x1344", BATCH_NOTE)
def batch_mvit(run: Run) -> None:
    run.compare(detectors(run, "mvit"), largest_row)


@part(8, "Largest batch: Mask R-CNN with Rev-ViT-B, 1024x1024", BATCH_NOTE)
def batch_vit(run: Run) -> None:
    run.compare(detectors(run, "vit"), largest_row)


def largest_row(run: Run, case: Case, share: float, limits: Sequence[int] = LIMITS) -> Row:
    """The largest batch of a case under each limit, and the images in a second of such steps."""
    if run.device.type != "cuda":
        raise ValueError("the largest batch is found under a limit of a CUDA device's memory")
    row = case.row()
    one, each = memory_by_images(case)
    for limit in limits:
        limit //= 8 if run.quick else 1
        found: dict[int, Any] = {}

        def fits(batch: int, limit=limit, found=found) -> bool:
            runner = Measuring(run.device, 1, 1, limit)
            found[batch] = runner.try_measure(replace(case, batch=batch), 1, 1)
            return found[batch] is not None

        # The allocator cannot use quite all: its blocks do not lie without gaps.
        batch = largest_batch(fits, 1 + int((0.97 * limit - one) / each))
        name = f"{limit / 1e9:g} GB"
        row.figures[f"largest batch in {name}"] = measured(batch, "images")
        if batch:
            speed = found[batch].images_per_second
            row.figures[f"throughput in {name}"] = measured(speed, "images/s")
    return row


@part(
    8,
    "Mask R-CNN with Rev-MViT-B trained on real images, full size, from random weights",
    DATA_NOTE,
    needs_data=True,
)
def train(run: Run) -> None:
    file, opts = "COCO-Detection/mask_rcnn_rev_mvit_b_fpn_3x.yaml", ["MODEL.WEIGHTS", ""]
    # A schedule for hundreds of iterations from random weights, not for 36 epochs from pretrained ones.
    opts += ["SOLVER.REFERENCE_IMS_PER_BATCH", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0001"]
    opts += ["SOLVER.WARMUP_ITERS", "50", "SOLVER.STEPS", "()", "MODEL.REV_MVIT.DROP_PATH_RATE", "0.0"]
    if run.quick:
        file = "Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml"
        opts += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    learn(run, file, 4 if run.quick else 400, opts)


@part(8, "The nano Mask R-CNN trained on real images", DATA_NOTE, needs_data=True)
def nano(run: Run) -> None:
    side, iterations = (64, 4) if run.quick else (320, 1500)
    opts = ["INPUT.MIN_SIZE_TRAIN", f"({side},)", "INPUT.MAX_SIZE_TRAIN", str(2 * side)]
    opts += ["INPUT.MIN_SIZE_TEST", str(side), "INPUT.MAX_SIZE_TEST", str(2 * side)]
    learn(run, "Quickstart/mask_rcnn_rev_mvit_nano_fpn.yaml", iterations, opts)


def learn(run: Run, file: str, iterations: int, opts: Sequence[str]) -> None:
    """Train on the images with one seed, reversible and cached, and evaluate on the same images."""
    found = [path for name in ANNOTATIONS if (path := Path(run.data) / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{run.data} has none of the files {', '.join(ANNOTATIONS)}")
    curves: dict[str, dict[int, float]] = {}
    run.further |= {"data": f"{Path(run.data).name}/{found[0].name}", "losses": curves}

    def work(mode: str) -> Row:
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, str(ROOT / "train_net.py")]
            command += ["--config-file", str(ROOT / "configs" / file)]
            command += ["--dataset", f"real={found[0]}:{found[0].parent / 'images'}", *opts]
            command += ["DATASETS.TRAIN", "('real',)", "DATASETS.TEST", "('real',)", "SEED", "1"]
            command += ["SOLVER.MAX_ITER", str(iterations), "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", output]
            command += ["MODEL.DEVICE", str(run.device), "MODEL.REV.ACTIVATIONS", mode]
            start = time.monotonic()
            code = subprocess.run(command).returncode
            seconds = time.monotonic() - start
            if code:
                raise RuntimeError(f"train_net.py ended with exit code {code}, see its output above")
            records = read_metrics(os.path.join(output, "metrics.json"))
        curves[mode] = {int(r["iteration"]): r["total_loss"] for r in records if "total_loss" in r}
        last = {name: value for record in records for name, value in record.items()}
        row = Row({"model": Path(file).stem, "training": mode, "iterations": iterations})
        row.figures = {
            "box AP": measured(last["bbox/AP"], "%"),
            "mask AP": measured(last["segm/AP"], "%"),
            "first loss": measured(next(iter(curves[mode].values())), "total loss"),
            "last loss": measured(last["total_loss"], "total loss"),
            "command": measured(seconds, "s"),
        }
        if len(curves) == 2:
            ours, theirs = curves.values()
            apart = max(abs(ours[i] / theirs[i] - 1) for i in ours.keys() & theirs.keys())
            row.figures["losses apart"] = measured(100 * apart, "% at most")
        return row

    for mode in ("reversible", "cached"):
        run.attempt({"training": mode}, lambda mode=mode: work(mode))


@part(5, "The paper's Table 1: memory of each further image, 224x224, float32")
def table1(run: Run) -> None:
    cases = PRESETS["figure1"].cases
    runner = Measuring(run.device, 1, 2)
    run.compare(
        cases[1:4] if run.quick else cases, lambda run, case, share: memory_per_image(runner, case, None)
    )


@part(8, "The paper's figures 3b and 3c: ViT-B of growing depth, 224x224, float32", BATCH_NOTE)
def figure3b(run: Run) -> None:
    # The depth that the paper's text speaks of first; the deepest takes longest.
    depths = (2,) if run.quick else (24, 12, 80, 48)
    cases = [replace(case, depth=depth) for depth in depths for case in PRESETS["figure3b"].cases[:3]]
    run.compare(cases, lambda run, case, share: largest_row(run, case, share, LIMITS[:1]))


def main(name: str, path: str, device: str, quick: bool, seconds: float, data: str) -> int:
    """Run a part, or "describe" the machine, and save the result; how, see `Run`. Returns the exit code."""
    if name == "describe":
        try:
            save_json(path, describe(torch.device(device)))
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        return 0
    run = Run(path, torch.device(device), quick, time.monotonic() + seconds, data)
    error = ""
    try:
        PARTS[name].work(run)
    except Exception as problem:
        traceback.print_exc(limit=-3)
        error = in_one_line(problem)
    failed = [row for row in run.rows if row.note.startswith("failed")]
    if failed and not error:
        error = f"{len(failed)} of {len(run.rows)} rows; the first {failed[0].note}"
    run.save(error)
    return 1 if error else 0
