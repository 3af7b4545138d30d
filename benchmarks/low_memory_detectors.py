"""Memory of a whole training step of ViTDet's Mask R-CNN, with and without ``low_memory``, counted.

    python benchmarks/low_memory_detectors.py --json benchmarks/results/low_memory_detectors_counted.json

One image of 1024x1024, bfloat16, AdamW. The detectors are Detectron2's ``common/models``, without weights.
Detectron2 publishes the memory of its own training (projects/ViTDet): it stands beside.
"""

import argparse
import sys

from detectron2 import model_zoo
from detectron2.config import instantiate
from rich.console import Console

from rev_det import float32_boxes, low_memory
from rev_det.comparison.models import STOCK_MODELS
from rev_det.config_files import default_config
from rev_det.engine import Precision, TrainStep, build_gradient_clipper, build_optimizer
from rev_det.memory.detector import DetectorStep, count_detector
from rev_det.memory.table import (
    COUNTED,
    ESTIMATED,
    PUBLISHED,
    Figure,
    Row,
    describe_machine,
    print_rows,
    save_json,
)

PUBLISHED_GB = {"vitdet_b": 10.9, "vitdet_l": 20.9, "vitdet_h": 31.5}


def count(name: str, treated: bool) -> Row:
    cfg = default_config()
    cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON = "cpu", True
    cfg.SOLVER.OPTIMIZER = "AdamW"
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bf16"

    def make_trainer(cfg, batches):
        lazy = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
        lazy.backbone.net.update(STOCK_MODELS[name].arguments)
        model = float32_boxes(instantiate(lazy)).train()
        if treated:
            low_memory(model)
        precision, clip = Precision.from_config(cfg), build_gradient_clipper(cfg)
        return TrainStep(model, batches, build_optimizer(cfg, model), precision, clip)

    found = count_detector(DetectorStep(cfg, 1, (1024, 1024), make_trainer))
    row = Row(
        {"detector": f"{STOCK_MODELS[name].title} Mask R-CNN", "low_memory": "yes" if treated else "no"}
    )
    row.figures = {
        "in all": Figure(found.total / 1e9, "GB", COUNTED),
        "FLOPs": Figure(found.flops / 1e12, "TFLOP", COUNTED),
        "launches": Figure(found.cost.launches, "kernels", COUNTED),
        "estimated time": Figure(found.cost.seconds * 1e3, "ms", ESTIMATED),
    }
    if not treated:
        row.figures["in all, published"] = Figure(PUBLISHED_GB[name], "GB", PUBLISHED)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = [count(name, treated) for name in PUBLISHED_GB for treated in (False, True)]
    print_rows(Console(width=160), "training step of one image of 1024x1024, bf16, AdamW", rows)
    if args.json:
        command = " ".join(["python", *sys.argv])
        save_json(args.json, {"command": command, "machine": describe_machine(None), "rows": rows})


if __name__ == "__main__":
    main()
