#!/usr/bin/env python
"""Measure on a GPU what is owed, part by part, and write docs/gpu.md from the results.

    python benchmarks/gpu.py                              every part that is not finished (make gpu)
    python benchmarks/gpu.py --parts doctor tests         these parts (make gpu PARTS="doctor tests")
    python benchmarks/gpu.py --quick --device cpu         whether the parts run; nothing is measured
    python benchmarks/gpu.py --page                       docs/gpu.md, from benchmarks/results/gpu_*.json

Nothing is installed and no network is used. Each part runs in a process of its own with a time limit and is
saved when it ends, so one that fails, hangs or is interrupted takes no other with it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The checkout is measured, whether it is installed or not.
sys.path.insert(0, str(ROOT))
from gpu_parts import PARTS  # noqa: E402
from gpu_run import Part  # noqa: E402

from rev_det.memory.table import Figure, Row, common_labels, grid, label_text, save_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TRIALS = ROOT / "build" / "gpu"
PAGE = ROOT / "docs" / "gpu.md"
# Where a machine without a network is given images.
CARRIED_DATA = ROOT / ".gpu" / "coco_overfit12"
# A part is told to end these seconds before it is made to.
GRACE = 40
# What stands above it in docs/gpu.md is written by hand.
MARK = "<!-- Below: written by `python benchmarks/gpu.py --page` from gpu_*.json in the results. -->"
INTERRUPTED = "interrupted"
# What a process of a part runs.
PROCESS = "import json, sys, gpu_parts; sys.exit(gpu_parts.main(*json.loads(sys.argv[1])))"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--force", action="store_true", help="repeat what is finished")
    parser.add_argument("--minutes", type=float, default=8, help="no part gets more (default: %(default)s)")
    parser.add_argument("--data", help="folder with images and COCO's annotations (default: the one carried)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="try with small models; nothing is measured")
    parser.add_argument("--results", help="default: benchmarks/results, or build/gpu of what is only tried")
    parser.add_argument("--page", action="store_true", help="write docs/gpu.md and do nothing else")
    args = parser.parse_args(argv)
    if args.page:
        PAGE.write_text(page(read_results(RESULTS)), encoding="utf-8")
        return 0
    try:
        return run_parts(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def run_parts(args: argparse.Namespace) -> int:
    """Run those parts that are wanted and not finished.

    Returns:
        0; 1 if a part failed, 130 if this was interrupted.

    Raises:
        ValueError: there is no such device, or what is only tried would be saved among the measurements.
    """
    machine, failure = in_a_process("describe", args, seconds=120)
    if failure:
        raise ValueError(f"{args.device} cannot be used ({failure})")
    # A stand-in for the CUDA driver computes nothing, and calls itself so.
    is_trial = args.quick or machine.get("gpu", "stub").startswith("stub")
    folder = Path(args.results or (TRIALS if is_trial else RESULTS))
    if is_trial and folder.resolve() == RESULTS:
        raise ValueError(f"{folder} is for measurements on a GPU, and this is a trial: give other --results")
    folder.mkdir(parents=True, exist_ok=True)
    data = args.data or (str(CARRIED_DATA) if CARRIED_DATA.is_dir() else "")

    todo, outcomes = [], {}
    for name in dict.fromkeys(args.parts):
        known = read_results(folder, trials=True).get(name)
        if known and not known["error"] and not args.force:
            of = known["machine"].get("gpu", "a CPU")
            when = known["date"][:10]
            outcomes[name] = f"finished on {when} on {of}; FORCE=1 (--force) repeats it"
        elif PARTS[name].needs_data and not data:
            outcomes[name] = "skipped: it needs images, GPU_DATA=FOLDER (--data)"
        else:
            todo.append(name)
    minutes = {name: min(PARTS[name].minutes, args.minutes) for name in todo}
    say(f"{len(todo)} parts, {sum(minutes.values()):g} minutes at most: {' '.join(todo)}")
    how = "a trial, nothing is measured, on" if is_trial else "on"
    say(f"{how} {machine.get('gpu', machine['cpu'])}; saved in {folder}")
    failed = False
    for name in todo:
        say(f"\n== {name}: {PARTS[name].title}; at most {minutes[name]:g} minutes")
        start = time.monotonic()
        content, error = in_a_process(name, args, 60 * minutes[name], data)
        error = error or content.get("error", "")
        words = ["python", "benchmarks/gpu.py", "--parts", name, *(["--quick"] if args.quick else [])]
        about = {
            "title": PARTS[name].title,
            "command": shlex.join(words),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "minutes": round((time.monotonic() - start) / 60, 2),
            "is_trial": is_trial,
            "machine": machine,
        }
        save_json(str(folder / f"gpu_{name}.json"), about | content | {"error": error})
        outcomes[name] = f"failed: {error}" if error else f"done in {time.monotonic() - start:.0f} s"
        failed |= bool(error)
        if error == INTERRUPTED:
            break
    say("")
    for name, outcome in outcomes.items():
        say(f"{name:12} {outcome}")
    return 130 if INTERRUPTED in str(outcomes.get(name)) else int(failed)


def in_a_process(
    name: str, args: argparse.Namespace, seconds: float, data: str = ""
) -> tuple[dict[str, Any], str]:
    """Run a part of gpu_parts.py.

    Returns:
        what it saved, whole or not; and in one line what ended it before its end, if anything did.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "part.json")
        words = (name, path, args.device, args.quick, max(1, seconds - GRACE), data)
        search = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
        failure = ""
        with interruptible():
            command = [sys.executable, "-c", PROCESS, json.dumps(words)]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            try:
                code = process.wait(seconds)
                # Of its own failure a part tells itself.
                if code < 0 or (code and not os.path.exists(path)):
                    failure = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            except subprocess.TimeoutExpired:
                failure = f"stopped after {seconds / 60:g} minutes"
            except KeyboardInterrupt:
                failure = INTERRUPTED
            finally:
                # With all that it has started.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not os.path.exists(path):
            return {"rows": [], "remarks": []}, failure
        return json.loads(Path(path).read_text(encoding="utf-8")), failure


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, too, raises KeyboardInterrupt: what runs is to be stopped and saved."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_results(folder: Path, trials: bool = False) -> dict[str, dict[str, Any]]:
    """What the files ``gpu_*.json`` of a folder hold, by part; trials are left out unless wanted."""
    found = {}
    for name in PARTS:
        path = folder / f"gpu_{name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if trials or not content["is_trial"]:
                found[name] = content
    return found


# ---- the page ----


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/gpu.md: its introduction, what has been measured, then what is owed."""
    lines = [PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n"]
    owed = [name for name in PARTS if name not in results or results[name]["error"]]
    if not results:
        lines.append("**No figure has been measured on a GPU yet.**\n")
    for name, result in results.items():
        lines += [f"## {result['title']}\n", *_section(PARTS[name], result)]
    if owed:
        lines += ["## What is owed\n", "| part | what it measures | minutes at most |", "|---|---|---|"]
        lines += [f"| {name} | {PARTS[name].title} | {PARTS[name].minutes:g} |" for name in owed]
        total = sum(PARTS[name].minutes for name in owed)
        lines.append(f"| **in all** | | {total:g} |")
    return "\n".join(lines).rstrip() + "\n"


def _section(part: Part, result: Mapping[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    versions = [
        f"{name} {machine[name]}" for name in ("driver", "torch", "cuda", "cudnn") if machine.get(name)
    ]
    yield f"{', '.join([machine['gpu'], *versions])}; {result['date'][:10]}: `{result['command']}`\n"
    if result["error"]:
        yield f"**Not complete**: {result['error']}.\n"
    rows = [
        Row(row["labels"], {name: Figure(**x) for name, x in row["figures"].items()}, note=row["note"])
        for row in result["rows"]
    ]
    for row in rows:
        row.figures = {n: f for n, f in row.figures.items() if n in (part.columns or row.figures)}
        row.labels |= {"note": row.note} if any(r.note for r in rows) else {}
    if rows:
        same = common_labels(rows) if len(rows) > 1 else {}
        yield ", ".join(label_text(*label) for label in same.items()) + "\n"
        header, *lines = ([cell.replace("|", " ") for cell in line] for line in grid(rows))
        for line in (header, ["---"] * len(header), *lines):
            yield f"| {' | '.join(line)} |"
        yield ""
    for remark in filter(None, [part.note, *result["remarks"]]):
        yield f"{remark}\n"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
