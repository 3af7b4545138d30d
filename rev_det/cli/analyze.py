"""What a detector costs: parameters and FLOPs of its modules, and how many images a GPU trains on.

Everything is counted on this computer, without a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from rich.console import Console

    from ..analysis.cases import Case
    from ..analysis.flops import ModuleCost
    from ..analysis.report import Row


# In the order in which a command line is written down.
_OPTIONS = ("size", "depth", "no_flops", "no_fits", "inversion", "json", "csv", "plot", "opts")


def run(args: argparse.Namespace) -> int:
    """Analyze, show, and save.

    Raises:
        ValueError, FileNotFoundError: arguments or a config that cannot be analyzed.
    """
    from rich.console import Console

    from ..analysis.cases import read_config
    from ..analysis.plots import SUFFIXES, save_fits
    from ..analysis.report import save_csv
    from ..files import check_output
    from .bench import parse_size

    for path, suffixes in ((args.json, ()), (args.csv, ()), (args.plot, SUFFIXES)):
        check_output(path, suffixes)
    if args.depth < 1:
        raise ValueError(f"--depth must be at least 1, got {args.depth}")
    if args.plot and args.no_fits:
        raise ValueError("--plot draws the images that fit: leave out --no-fits")
    config = _config(args)
    cfg = read_config(config, args.opts)
    size = parse_size(args.size) if args.size else _test_size(cfg)
    console = Console(width=None if Console().is_terminal else 200)
    parts: dict[str, list[Row]] = {}
    if not args.no_flops:
        parts["modules"] = _flops(cfg, size, args.depth, console)
    if not args.no_fits:
        parts["fits"] = _fits(cfg, config, size, console)
    if args.inversion:
        parts["inversion"] = _inversion(cfg, size, console)
    if args.json:
        _save_json(args, config, size, parts)
    if args.csv:
        save_csv(args.csv, [_with_label(row, "table", name) for name, rows in parts.items() for row in rows])
    if args.plot:
        save_fits("Images in a training step that fit on a GPU", parts["fits"], args.plot)
    return 0


def _config(args: argparse.Namespace) -> str:
    if args.config and args.config_option:
        raise ValueError("CONFIG and --config-file mean the same; give one of them")
    if not (args.config or args.config_option):
        raise ValueError("CONFIG is missing; name a YAML file, or a model of the zoo")
    return args.config or args.config_option


def _save_json(
    args: argparse.Namespace, config: str, size: tuple[int, int], parts: dict[str, list[Row]]
) -> None:
    from dataclasses import asdict

    from ..analysis.report import describe_machine, save_json
    from .bench import command_line

    content = {
        "command": command_line(["rev-det", "analyze", config], args, _OPTIONS),
        "config": config,
        "options": args.opts,
        "size": list(size),
        "machine": describe_machine(None),
    }
    save_json(args.json, content | {name: [asdict(row) for row in rows] for name, rows in parts.items()})


def _with_label(row: Row, name: str, value: str) -> Row:
    from dataclasses import replace

    return replace(row, labels={name: value} | row.labels)


def _test_size(cfg: CfgNode) -> tuple[int, int]:
    """The largest padded size that images are tested at."""
    longer = cfg.INPUT.MAX_SIZE_TEST
    return cfg.INPUT.MIN_SIZE_TEST or longer, -(-longer // 32) * 32


def _flops(cfg: CfgNode, size: tuple[int, int], depth: int, console: Console) -> list[Row]:
    from rich.table import Table

    from ..analysis.flops import DEFINITION, analyze_detector
    from ..analysis.report import COUNTED, Figure, Row, print_table

    with console.status("tracing the detector"):
        costs = analyze_detector(cfg, size, depth)
    table = Table(title=f"one image of {size[0]}x{size[1]}, inference", title_justify="left")
    table.add_column("module", no_wrap=True)
    table.add_column("class")
    table.add_column("parameters\n(M, counted)", justify="right")
    table.add_column("FLOPs\n(GMAC, counted)", justify="right")
    for cost in costs:
        flops = f"{cost.flops / 1e9:.2f}" if cost.flops else "-"
        table.add_row(_indented(cost), cost.kind, f"{cost.parameters / 1e6:.3f}", flops)
    print_table(console, table)
    console.print(DEFINITION, style="dim", highlight=False)
    return [
        Row(
            {"module": cost.name, "class": cost.kind},
            {
                "parameters": Figure(cost.parameters, "parameters", COUNTED),
                "FLOPs": Figure(cost.flops, "multiply-adds", COUNTED),
            },
        )
        for cost in costs
    ]


def _indented(cost: ModuleCost) -> str:
    parts = cost.name.split(".")
    return "  " * len(parts) + parts[-1] if cost.name else "(whole model)"


def _fits(cfg: CfgNode, config_file: str, size: tuple[int, int], console: Console) -> list[Row]:
    from ..analysis.fits import DEFINITION, images_that_fit
    from ..analysis.report import print_rows
    from .bench import progress_bar

    cases = _cases(cfg, config_file, size)
    with progress_bar(console, 2 * len(cases)) as (done, _):
        rows = images_that_fit(cases, done)
    print_rows(console, "what fits, images in a training step", rows)
    console.print(DEFINITION, style="dim", highlight=False)
    return rows


def _cases(cfg: CfgNode, config_file: str, size: tuple[int, int]) -> list[Case]:
    from ..analysis.cases import Case, reversible_family
    from ..analysis.peers import AS_CONFIGURED, schemes

    chosen = [AS_CONFIGURED]
    if reversible_family(cfg) is not None:
        chosen = schemes(("cached", "checkpoint", "reversible"), cfg.MODEL.REV.KEEP_ATTENTION, peers=False)
    dtype = "bf16" if cfg.SOLVER.AMP.ENABLED else "fp32"
    return [Case(Path(config_file).stem, None, scheme, 1, size, dtype, cfg=cfg) for scheme in chosen]


def _inversion(cfg: CfgNode, size: tuple[int, int], console: Console) -> list[Row]:
    import torch

    from ..analysis.inversion import DEFINITION, inversion_errors, reversible_backbone
    from ..analysis.report import MEASURED, Figure, Row, print_rows

    backbone = reversible_backbone(cfg)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    rows: dict[str, Row] = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        with console.status(f"running the blocks forward and backward in {name}"):
            for found in inversion_errors(backbone, images, dtype):
                row = rows.setdefault(found.block, Row({"stage": found.stage, "block": found.block}))
                row.figures[name] = Figure(found.error, "relative", MEASURED)
    print_rows(console, f"inversion, one random image of {size[0]}x{size[1]}", list(rows.values()))
    console.print(DEFINITION, style="dim", highlight=False)
    return list(rows.values())
