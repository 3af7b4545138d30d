"""Memory, FLOPs and time of a training step, ours beside its peers.

Without --device the figures are counted: exactly, for any size, without a GPU. With it they are measured.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..analysis.cases import Case, Counting, Measuring


# Those that look for the largest batch.
_LIMITED_PRESETS = ("table1", "figure3b", "figure3c")
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
# Of a step that is counted, some minutes' work: 249 images of 800x1344.
_MOST_PIXELS = 2**28
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
    from rich.console import Console

    from ..analysis.cases import run_cases, without_baselines
    from ..analysis.counting import GIB
    from ..analysis.plots import save_plot, save_scatter
    from ..analysis.presets import PRESETS, largest_batches
    from ..analysis.report import Report, describe_machine

    preset = PRESETS[args.preset] if args.preset else None
    device = _device(args.device)
    limit = parse_memory(args.memory_limit) if args.memory_limit else preset.memory_limit if preset else None
    _check(args, device, limit, measured_only=bool(preset and preset.measured_only))
    cases, left_out = without_baselines(preset.cases if preset else _cases(args))
    _check_precision(cases, device)
    if device is None:
        _check_countable(cases)

    # A file or pipe has no width of its own, and narrow tables are unreadable.
    console = Console(width=None if Console().is_terminal else 200)
    if left_out:
        console.print(left_out)
    with progress_bar(console, len(cases)) as (done, tick):
        runner = _runner(args, device, limit, tick)
        if preset:
            rows = preset.run(cases, runner, limit, done)
        elif args.max_batch:
            rows = largest_batches(cases, runner, limit, done)
        else:
            rows = run_cases(cases, runner, done)
    definitions = [_definition(runner)]
    if limit is not None:
        definitions.append(f"Memory limit: {limit / GIB:.2f} GiB, for all but CUDA's own context.")
    report = Report(
        title=preset.title if preset else "Training step",
        command=command_line(["rev-det", "bench"], args, _OPTIONS),
        rows=rows,
        machine=describe_machine(device),
        definitions=definitions,
    )
    report.print(console)
    report.print_peaks(console, args.at_peak if args.at_peak is not None else 0 if len(rows) > 6 else 5)
    if args.json:
        report.save_json(args.json)
    if args.csv:
        report.save_csv(args.csv)
    if args.plot and preset and preset.scatter:
        save_scatter(report, args.plot, *preset.scatter)
    elif args.plot:
        save_plot(report, args.plot)
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """ "800x1344" as (height, width) in pixels."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 800x1344; got {text!r}")
    height, width = int(match[1]), int(match[2])
    if height * width > _MOST_PIXELS:
        raise ValueError(f"--size {text} has more than {_MOST_PIXELS // 10**6} million pixels")
    return height, width


def parse_memory(text: str) -> int:
    """ "16GB" (10^9 bytes each) or "16GiB" (2^30) as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text)
    if match is None or not float(match[1]):
        raise ValueError(f"--memory-limit must be a number of GB, GiB, MB or MiB, such as 16GB; got {text!r}")
    units = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
    return int(float(match[1]) * units[match[2]])


def _check(
    args: argparse.Namespace, device: torch.device | None, limit: int | None, measured_only: bool
) -> None:
    """Find before minutes of counting what would stop the command after them."""
    from ..analysis.plots import SUFFIXES
    from ..files import check_output

    if args.preset:
        given = [_flag(name) for name in _CASE_OPTIONS if getattr(args, name) not in (None, False)]
        if given:
            raise ValueError(f"--preset {args.preset} says what is run; leave out {', '.join(given)}")
    if measured_only and device is None:
        raise ValueError(f"--preset {args.preset} is about time, which cannot be counted: give a --device")
    if device is None and (args.steps or args.warm_up):
        raise ValueError("--steps and --warm-up are of a measurement: give a --device")
    if args.device_rules and device is not None:
        raise ValueError("--device-rules is of a count: leave out --device")
    if args.max_batch and limit is None and (device is None or device.type == "cpu"):
        raise ValueError("--max-batch needs a --memory-limit, such as 16GB, unless it is tried on a GPU")
    if args.max_batch and args.batch:
        raise ValueError("--max-batch finds the batch; leave out --batch")
    if limit is not None and device is not None and device.type == "cpu":
        raise ValueError("--memory-limit is enforced on CUDA devices; leave out --device to count instead")
    if args.memory_limit and device is None and not (args.max_batch or args.preset in _LIMITED_PRESETS):
        raise ValueError("--memory-limit changes nothing here: give --max-batch, or a --device")
    if args.opts and not args.config_file:
        raise ValueError("--opts needs a --config-file")
    for name in ("depth", "batch", "steps", "warm_up"):
        values = getattr(args, name) or []
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
    for path, suffixes in ((args.json, ()), (args.csv, ()), (args.plot, SUFFIXES)):
        check_output(path, suffixes)


def _check_countable(cases: Sequence[Case]) -> None:
    """Each operation is run through, on tensors without values: more parts and blocks take longer."""
    from ..analysis.cases import MOST_COUNTED

    for case in cases:
        height, width = case.size
        pixels = case.batch * height * width
        if max(case.batch, case.depth or 0) > MOST_COUNTED or pixels > _MOST_PIXELS:
            depth = f" at depth {case.depth}" if case.depth else ""
            raise ValueError(
                f"{case.batch} images of {height}x{width}{depth} would take very long to count: a step may "
                f"have {MOST_COUNTED} images or blocks at most, and {_MOST_PIXELS // 10**6} million pixels. "
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


def _check_precision(cases: Sequence[Case], device: torch.device | None) -> None:
    """Older GPUs emulate bfloat16: neither their time nor their memory would be what was asked for."""
    from ..devices import computes_in_bfloat16

    on_gpu = device is not None and device.type == "cuda"
    if on_gpu and any(case.dtype == "bf16" for case in cases) and not computes_in_bfloat16(device):
        raise ValueError("this GPU does not compute in bfloat16: give --dtype fp32 or another GPU")


def _cases(args: argparse.Namespace) -> list[Case]:
    from ..analysis.cases import Case, read_config, reversible_family
    from ..analysis.peers import AS_CONFIGURED, MODELS, schemes

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
        chosen = schemes(activations, args.keep_attention, args.peers)
    return [
        Case(title, model, scheme, batch, parse_size(size), dtype, depth, cfg)
        for depth in args.depth or [None]
        for size in args.size or ["800x1344"]
        for batch in args.batch or [2]
        for scheme in chosen
    ]


def _runner(
    args: argparse.Namespace, device: torch.device | None, limit: int | None, tick: Callable[[], None]
) -> Counting | Measuring:
    from ..analysis.cases import Counting, Measuring

    if device is None:
        return Counting(args.device_rules or "cuda")
    # Detectron2 reports training time as the mean over iterations 100 to 500.
    warm_up, steps = (100, 400) if args.config_file else (5, 20)
    return Measuring(device, args.warm_up or warm_up, args.steps or steps, limit, tick)


def _definition(runner: Counting | Measuring) -> str:
    text = _DEFINITIONS[runner.method]
    return text.format(rules=runner.device_rules, rates=runner.rates) if runner.method == "counted" else text


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
