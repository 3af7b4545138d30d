"""Memory, FLOPs and time of a training step, ours beside its peers.

Without --device the figures are counted: exactly, for any size, without a GPU. With it they are measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..comparison.cases import Case
    from ..comparison.presets import Preset


_DEFINITIONS = {
    "counted": (
        "Counted, without running the step on a device, by the rules of {rules}: peak memory has gradients "
        "in it, but not weights, inputs and optimizer state (AdamW's unless a config says otherwise); in all "
        "is with them. FLOPs: 2 for a multiplication and addition. Bytes moved: operands and results of all "
        "operators, once each. Estimated time: for every operator the longer of FLOPs and bytes at {rates}."
    ),
    "measured": (
        "Measured: median, quartiles and mean over the timed steps, the device having finished each. Peak "
        "memory is above what existed before the step (weights, inputs, optimizer state); allocated is "
        "torch.cuda.max_memory_allocated. Warm-up is what came before, to load and choose kernels."
    ),
}
# In the order in which a command line is written down.
_CASE_OPTIONS = ("activations", "keep_attention", "peers", "depth", "size", "batch", "dtype", "max_batch")
_OPTIONS = (
    *("model", "config_file", "preset", *_CASE_OPTIONS, "memory_limit"),
    *("count", "device_rules", "device", "warm_up", "steps", "json", "csv", "plot", "opts"),
)


def run(args: argparse.Namespace) -> int:
    """Count or measure, and show, save and draw the result.

    Raises:
        ValueError, FileNotFoundError: arguments or a config that cannot be run.
    """
    from ..comparison import presets
    from ..comparison.cases import Counting, Measuring, run_cases, without_baselines
    from ..comparison.plots import save_plot
    from ..memory.counting import GIB
    from ..memory.table import describe_machine, print_peaks, print_rows, save_csv, save_json

    preset = presets.PRESETS[args.preset] if args.preset else None
    device = _device(args.device)
    limit = parse_memory(args.memory_limit) if args.memory_limit else preset and preset.memory_limit
    _check(args, device, limit, preset)
    cases, left_out = without_baselines(preset.cases if preset else _cases(args))
    _check_cases(cases, device)
    make_row = preset.make_row if preset else presets.largest_batch if args.max_batch else presets.step

    console = make_console()
    if left_out:
        console.print(left_out)
    with progress_bar(console, len(cases)) as (done, tick):
        if device is None:
            runner = Counting(args.device_rules or "cuda", listed=max(12, args.at_peak or 0))
            text = _DEFINITIONS["counted"].format(rules=runner.device_rules, rates=runner.rates)
        else:
            # Detectron2 reports training time as the mean over iterations 100 to 500.
            warm_up, steps = (100, 400) if args.config_file else (5, 20)
            runner = Measuring(device, args.warm_up or warm_up, args.steps or steps, limit, tick)
            text = _DEFINITIONS["measured"]
        rows = run_cases(cases, lambda case: make_row(runner, case, limit), done)
    definitions = [text]
    if limit is not None:
        definitions.append(f"Memory limit: {limit / GIB:.2f} GiB, for all but CUDA's own context.")
    title = preset.title if preset else "Training step"
    print_rows(console, title, rows)
    for line in definitions:
        console.print(line, style="dim", highlight=False)
    print_peaks(console, rows, args.at_peak if args.at_peak is not None else 0 if len(rows) > 6 else 5)
    if args.json:
        content = {
            "title": title,
            "command": command_line(["rev-det", "bench"], args, _OPTIONS),
            "rows": rows,
            "machine": describe_machine(device),
            "definitions": definitions,
        }
        save_json(args.json, content)
    if args.csv:
        save_csv(args.csv, rows)
    if args.plot:
        save_plot(title, rows, args.plot, preset and preset.against)
    return 0


def parse_size(text: str, most_pixels: int) -> tuple[int, int]:
    """ "800x1344" as (height, width) in pixels."""
    match = re.fullmatch(r"([1-9]\d{0,9})x([1-9]\d{0,9})", text)
    if match is None:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 800x1344; got {text!r}")
    height, width = int(match[1]), int(match[2])
    if height * width > most_pixels:
        raise ValueError(f"--size {text} has more than {most_pixels // 10**6} million pixels")
    return height, width


def parse_memory(text: str) -> int:
    """ "16GB" (10^9 bytes each) or "16GiB" (2^30) as bytes."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text)
    if match is None or not float(match[1]):
        raise ValueError(f"--memory-limit must be a number of GB, GiB, MB or MiB, such as 16GB; got {text!r}")
    units = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
    return int(float(match[1]) * units[match[2]])


def check_files(args: argparse.Namespace) -> None:
    """Find before minutes of work what would keep the results from being saved, or one from the other.

    Raises:
        ValueError, FileNotFoundError: a file cannot be written, or would be overwritten by the next.
    """
    from ..comparison.plots import SUFFIXES
    from ..files import check_output

    config = getattr(args, "config", None) or getattr(args, "config_option", None) or args.config_file
    files = {"the config": config, "--json": args.json, "--csv": args.csv, "--plot": args.plot}
    for name in list(files)[1:]:
        check_output(files[name], SUFFIXES if name == "--plot" else (), name)
    given = {name: os.path.realpath(path) for name, path in files.items() if path}
    for (one, path), (other, same) in itertools.combinations(given.items(), 2):
        if path == same:
            raise ValueError(f"{one} and {other} are one file, {files[other]}: give each a name of its own")


def _check(
    args: argparse.Namespace, device: torch.device | None, limit: int | None, preset: Preset | None
) -> None:
    """Find before minutes of counting what would stop the command after them."""
    given = [_flag(name) for name in _CASE_OPTIONS if getattr(args, name) not in (None, False)]
    if preset and given:
        raise ValueError(f"--preset {args.preset} says what is run; leave out {', '.join(given)}")
    if preset and preset.measured_only and device is None:
        raise ValueError(f"--preset {args.preset} is about time, which cannot be counted: give a --device")
    if device is None and (args.steps, args.warm_up) != (None, None):
        raise ValueError("--steps and --warm-up are of a measurement: give a --device")
    if args.device_rules and device is not None:
        raise ValueError("--device-rules is of a count: leave out --device")
    if args.at_peak is not None and (device is not None or args.at_peak < 0):
        raise ValueError(f"--at-peak is of a count, and at least 0, got {args.at_peak}: leave it out")
    if args.max_batch and limit is None and (device is None or device.type == "cpu"):
        raise ValueError("--max-batch needs a --memory-limit, such as 16GB, unless it is tried on a GPU")
    if args.max_batch and args.batch:
        raise ValueError("--max-batch finds the batch; leave out --batch")
    if limit is not None and device is not None and device.type == "cpu":
        raise ValueError("--memory-limit is enforced on CUDA devices; leave out --device to count instead")
    limited = args.max_batch or (preset and preset.memory_limit)
    if args.memory_limit and device is None and not limited:
        raise ValueError("--memory-limit changes nothing here: give --max-batch, or a --device")
    if args.opts and not args.config_file:
        raise ValueError("--opts needs a --config-file")
    for name in ("depth", "batch", "steps", "warm_up"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if number < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {number}")
    check_files(args)


def _check_cases(cases: Sequence[Case], device: torch.device | None) -> None:
    from ..comparison.cases import MOST_COUNTED, MOST_PIXELS
    from ..devices import computes_in_bfloat16

    if device is not None and device.type == "cuda" and any(case.dtype == "bf16" for case in cases):
        # Older GPUs emulate it: neither their time nor their memory would be what was asked for.
        if not computes_in_bfloat16(device):
            raise ValueError("this GPU does not compute in bfloat16: give --dtype fp32 or another GPU")
    for case in cases if device is None else ():
        # Each operation is run through, on tensors without values: more parts and blocks take longer.
        height, width = case.size
        pixels = case.batch * height * width
        if max(case.batch, case.depth or 0) > MOST_COUNTED or pixels > MOST_PIXELS:
            depth = f" at depth {case.depth}" if case.depth else ""
            raise ValueError(
                f"{case.batch} images of {height}x{width}{depth} would take very long to count: a step may "
                f"have {MOST_COUNTED} images or blocks at most, and {MOST_PIXELS // 10**6} million pixels. "
                "Memory grows in a straight line with either, so that two smaller numbers tell it"
            )


def _device(name: str | None) -> torch.device | None:
    import torch

    from ..devices import check_device

    if name is None:
        return None
    try:
        device = torch.device(check_device("--device", name))
    except ValueError as error:
        raise ValueError(f"{error}; without --device the step is counted instead") from error
    # torch wants the number where it limits the memory.
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def _cases(args: argparse.Namespace) -> list[Case]:
    from ..comparison.cases import MOST_PIXELS, Case, reversible_family
    from ..comparison.models import AS_CONFIGURED, MODELS, trainings
    from ..engine.model_config import read_config

    model = cfg = None
    if args.config_file:
        cfg = read_config(args.config_file, args.opts, args.device or "cpu")
        title = os.path.splitext(os.path.basename(args.config_file))[0]
        dtype = args.dtype or ("bf16" if cfg.SOLVER.AMP.ENABLED else "fp32")
        plain = reversible_family(cfg) is None
        if plain and (args.activations or args.peers or args.keep_attention is not None):
            raise ValueError(
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} is not reversible: leave out --activations, "
                "--keep-attention and --peers"
            )
    else:
        model, plain = MODELS[args.model or "rev_mvit_b"], False
        title, dtype = model.title, args.dtype or "bf16"
    chosen = [AS_CONFIGURED]
    if not plain:
        activations = args.activations or ("cached", "checkpoint", "reversible")
        chosen = trainings(activations, args.keep_attention, args.peers)
    return [
        Case(title, model, training, batch, parse_size(size, MOST_PIXELS), dtype, depth, cfg)
        for depth in args.depth or [None]
        for size in args.size or ["800x1344"]
        for batch in args.batch or [2]
        for training in chosen
    ]


def make_console() -> Console:
    """A file or pipe has no width of its own, and narrow tables are unreadable."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 200)


@contextmanager
def progress_bar(console: Console, cases: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Show progress; gives what to call after every case, and after every step of a measurement."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("cases", total=cases)
        steps = progress.add_task("steps", total=None, visible=False)

        def tick() -> None:
            progress.update(steps, advance=1, visible=True)

        yield lambda: progress.advance(bar), tick


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def command_line(words: Sequence[str], args: argparse.Namespace, options: Sequence[str]) -> str:
    """The command line again, as it is to be typed: the first words, then those options that were given."""
    words = list(words)
    for name in options:
        value, flag = getattr(args, name), _flag(name)
        if value is False and name == "keep_attention":
            words.append("--no-keep-attention")
        elif value is True:
            words.append(flag)
        elif value not in (None, False, []):
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
