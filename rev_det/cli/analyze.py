"""What a detector costs: parameters and FLOPs of its modules, and how many images a GPU trains on.

Everything is counted on this computer, without a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from rich.console import Console

    from ..memory.table import Row


# In the order in which a command line is written down.
_OPTIONS = ("size", "depth", "no_flops", "no_fits", "inversion", "json", "csv", "plot", "opts")
# Of an image whose FLOPs are traced: every operation is computed.
_MOST_PIXELS = 2**24


def run(args: argparse.Namespace) -> int:
    """Analyze, show, and save.

    Raises:
        ValueError, FileNotFoundError: arguments or a config that cannot be analyzed.
    """
    from ..comparison.plots import save_plot
    from ..engine.model_config import read_config
    from ..memory.table import describe_machine, save_csv, save_json
    from .bench import check_files, command_line, make_console, parse_size

    if args.depth < 1:
        raise ValueError(f"--depth must be at least 1, got {args.depth}")
    if args.plot and args.no_fits:
        raise ValueError("--plot draws the images that fit: leave out --no-fits")
    if args.config and args.config_option:
        raise ValueError("CONFIG and --config-file mean the same; give one of them")
    config = args.config or args.config_option
    if not config:
        raise ValueError("CONFIG is missing; name a YAML file, or a model of the zoo")
    check_files(args)
    cfg = read_config(config, args.opts)
    # The largest padded size that images are tested at, unless it is given.
    longer = cfg.INPUT.MAX_SIZE_TEST
    size = (cfg.INPUT.MIN_SIZE_TEST or longer, -(-longer // 32) * 32)
    size = parse_size(args.size or f"{size[0]}x{size[1]}", _MOST_PIXELS)
    console = make_console()
    parts: dict[str, list[Row]] = {}
    if not args.no_flops:
        parts["modules"] = _flops(cfg, size, args.depth, console)
    if not args.no_fits:
        parts["fits"] = _fits(cfg, Path(config).stem, size, console)
    if args.inversion:
        parts["inversion"] = _inversion(cfg, size, console)
    if args.json:
        content = {
            "command": command_line(["rev-det", "analyze", config], args, _OPTIONS),
            "config": config,
            "options": args.opts,
            "size": list(size),
            "machine": describe_machine(None),
        }
        save_json(args.json, content | parts)
    if args.csv:
        tables = ((name, row) for name, rows in parts.items() for row in rows)
        save_csv(args.csv, [replace(row, labels={"table": name} | row.labels) for name, row in tables])
    if args.plot:
        save_plot("Images in a training step that fit on a GPU", _by_card(parts["fits"]), args.plot)
    return 0


def _flops(cfg: CfgNode, size: tuple[int, int], depth: int, console: Console) -> list[Row]:
    from rich.table import Table

    from ..engine import build_detector
    from ..memory.flops import DEFINITION, FULL_HEADS, analyze_detector

    cfg = cfg.clone()
    cfg.merge_from_list(list(FULL_HEADS))
    with console.status("tracing the detector"):
        rows = analyze_detector(build_detector(cfg), size, depth)
    table = Table(title=f"one image of {size[0]}x{size[1]}, inference", title_justify="left")
    for header in ("module", "class"):
        table.add_column(header, overflow="fold")
    for header in ("parameters\n(M, counted)", "FLOPs\n(GMAC, counted)"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        *parents, name = row.labels["module"].split(".")
        indented = f"{'  ' * (len(parents) + 1)}{name}" if name else "(whole model)"
        parameters, flops = (figure.value for figure in row.figures.values())
        numbers = f"{parameters / 1e6:.3f}", f"{flops / 1e9:.2f}" if flops else "-"
        table.add_row(indented, row.labels["class"], *numbers)
    console.print(table)
    console.print(DEFINITION, style="dim", highlight=False)
    return rows


def _fits(cfg: CfgNode, title: str, size: tuple[int, int], console: Console) -> list[Row]:
    from ..comparison.cases import Case, reversible_family
    from ..comparison.models import AS_CONFIGURED, trainings
    from ..comparison.presets import FITS, images_that_fit
    from ..memory.table import print_rows
    from .bench import progress_bar

    chosen = [AS_CONFIGURED]
    if reversible_family(cfg) is not None:
        chosen = trainings(("cached", "checkpoint", "reversible"), cfg.MODEL.REV.KEEP_ATTENTION, peers=False)
    dtype, rows = "bf16" if cfg.SOLVER.AMP.ENABLED else "fp32", []
    with progress_bar(console, len(chosen)) as (done, _):
        for training in chosen:
            rows.append(images_that_fit(Case(title, None, training, 1, size, dtype, cfg=cfg)))
            done()
    print_rows(console, "what fits, images in a training step", rows)
    console.print(FITS, style="dim", highlight=False)
    return rows


def _by_card(rows: list[Row]) -> list[Row]:
    """A row for each card instead of a figure."""
    return [
        replace(row, labels=row.labels | {"GB": int(name.split()[0])}, figures={"images that fit": figure})
        for row in rows
        for name, figure in row.figures.items()
        if figure.unit == "images"
    ]


def _inversion(cfg: CfgNode, size: tuple[int, int], console: Console) -> list[Row]:
    import torch

    from ..engine.inversion import DEFINITION, block_errors, reversible_backbone
    from ..memory.table import MEASURED, Figure, Row, print_rows

    backbone = reversible_backbone(cfg)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    rows: dict[str, Row] = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        with console.status(f"running the blocks forward and backward in {name}"):
            for stage, errors in enumerate(block_errors(backbone, images, dtype)):
                for block, error in errors.items():
                    row = rows.setdefault(block, Row({"stage": stage, "block": block}))
                    row.figures[name] = Figure(error, "relative", MEASURED)
    print_rows(console, f"inversion, one random image of {size[0]}x{size[1]}", list(rows.values()))
    console.print(DEFINITION, style="dim", highlight=False)
    return list(rows.values())
