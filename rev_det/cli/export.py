"""Write a trained detector, or its backbone, to a file that runs without rev_det and Detectron2.

The file is checked before it is kept: it must compute what the model computes.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .predict import ending_on_sigterm

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import Tensor


def run(args: argparse.Namespace) -> int:
    """Export, and say how equal file and model are.

    Raises:
        ValueError, OSError: what cannot be exported, and why.
    """
    from detectron2.utils.logger import setup_logger

    from ..export import check_target, export
    from ..files import check_kept, printable
    from ..predict import Origin

    setup_logger(name="rev_det")
    try:
        check_target(args.output, args.format, args.part)
    except ImportError as error:
        raise ValueError(str(error)) from error
    origin = Origin.find(None, args.config_file, args.weights)
    inputs = [origin.weights.partition("#")[0], origin.config_file, args.image or ""]
    check_kept("--output", [args.output], inputs)
    cfg = origin.read_config(args.opts)
    image = _read_image(cfg, args.image) if args.image else None
    size = args.size or _test_size(cfg)
    model, _ = origin.load_model(cfg)
    with ending_on_sigterm():
        comparisons = export(model, args.output, args.format, args.part, size=size, image=image)
    for comparison in comparisons:
        print(comparison)
        if comparison.detections == 0:
            sys.stderr.write(
                "warning: nothing was detected, which checks little; give an --image with objects\n"
            )
    print(f"written to {printable(args.output)}")
    return 0


def _test_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of the largest test images, as multiples of 32."""
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        raise ValueError("INPUT.MIN_SIZE_TEST is 0, images are not resized: give --size H W")
    height, width = (-(-n // 32) * 32 for n in (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))
    return height, width


def _read_image(cfg: CfgNode, path: str) -> Tensor:
    """An image file in the colours of the config. (3, H, W)."""
    import torch

    from ..data.images import read_rgb

    try:
        pixels = read_rgb(path)
    except ValueError as error:
        raise ValueError(f"--image {path} cannot be read: {error}") from error
    if cfg.INPUT.FORMAT == "BGR":
        pixels = pixels[:, :, ::-1]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
