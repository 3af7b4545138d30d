"""Write a trained detector, or its backbone, to a file that runs without rev_det and Detectron2.

The file is checked before it is kept: it must compute what the model computes.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import Tensor

SUMMARY = "a trained detector as TorchScript, ONNX or torch.export"

_EPILOG = """
examples:
  a detector as TorchScript, for images of any size, with the config beside the weights:
    rev-det export --weights output/demo/model_final.pth --format torchscript --output detector.ts
  as ONNX, for images of 800 x 1344 pixels, with scores from 0.5:
    rev-det export --config-file mask_rcnn_rev_mvit_b_fpn_3x --weights model_final.pth --format onnx
        --size 800 1344 --output detector.onnx MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.5
  its backbone for torch.export:
    rev-det export --weights model_final.pth --format torch-export --part backbone --output backbone.pt2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "--config-file",
        metavar="CONFIG",
        help="a YAML file, or the name of a model in the zoo (default: config.yaml beside the weights)",
    )
    parser.add_argument("--weights", metavar="FILE", help="of a trained detector")
    parser.add_argument("--format", required=True, help="torchscript, onnx or torch-export")
    parser.add_argument("--part", default="detector", help="detector (default) or backbone")
    parser.add_argument("--output", required=True, metavar="FILE", help="ends with .ts or .pt, .onnx or .pt2")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of the input it is made with; a detector in ONNX takes no other (default: as the config tests)",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="to try the detector on, with objects of its classes (default: a pattern)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys that override the config file's"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say how equal file and model are.

    Raises:
        ValueError, OSError: what cannot be exported, and why.
    """
    from detectron2.utils.logger import setup_logger

    from ..checkpoint import RevCheckpointer
    from ..engine import build_detector
    from ..engine.model_config import read_config
    from ..export import check_target, export
    from ..predict import Origin

    setup_logger(name="rev_det")
    try:
        check_target(args.output, args.format, args.part)
    except ImportError as error:
        raise ValueError(str(error)) from error
    origin = Origin.find(None, args.config_file, args.weights)
    cfg = read_config(origin.config_file, args.opts)
    model = build_detector(cfg)
    strict = cfg.MODEL.REV.STRICT_WEIGHTS
    RevCheckpointer(model, strict_weights=strict, evaluation=True).load(origin.weights, checkpointables=[])
    image = _read_image(cfg, args.image) if args.image else None
    size = args.size or _test_size(cfg)
    comparisons = export(model, args.output, args.format, args.part, size=size, image=image)
    for comparison in comparisons:
        print(comparison)
        if comparison.detections == 0:
            sys.stderr.write(
                "warning: nothing was detected, which checks little; give an --image with objects\n"
            )
    print(f"written to {args.output}")
    return 0


def _test_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of the largest test images, as multiples of 32."""
    if cfg.INPUT.MIN_SIZE_TEST < 1:
        raise ValueError("INPUT.MIN_SIZE_TEST is 0, images are not resized: give --size H W")
    height, width = (-(-n // 32) * 32 for n in (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))
    return height, width


def _read_image(cfg: CfgNode, path: str) -> Tensor:
    """An image file in the colours of the config. (3, H, W)."""
    import torch
    from detectron2.data.detection_utils import read_image

    try:
        pixels = read_image(path, format=cfg.INPUT.FORMAT)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {path} cannot be read: {error}") from error
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
