#!/usr/bin/env python
"""Time COCO's metrics on a set of COCO's size, by every implementation that is installed, and compare them.

    python benchmarks/coco_evaluation.py --json benchmarks/results/coco_evaluation.json

The set and its detections are drawn: 5000 images of 640 x 480 with 7.3 instances on average in 80 classes,
as in COCO's val2017. What is timed is what Detectron2's evaluator does once per task: index the detections,
evaluate, accumulate, summarise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import shlex
import sys
import time
from importlib.metadata import version
from typing import Any

import detectron2
import faster_coco_eval
import numpy as np
import pycocotools.mask as mask_util
from detectron2.evaluation import coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rev_det.files import check_output
from rev_det.memory.table import describe_machine, save_json

TASKS = ("bbox", "segm")
HEIGHT, WIDTH, NUM_CLASSES = 480, 640, 80
# Averages of COCO's val2017.
INSTANCES_PER_IMAGE, CROWD_SHARE = 7.3, 0.012
MAX_DETECTIONS = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="the least time counts (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    check_output(args.json)

    rng = np.random.default_rng(0)
    dataset = draw_dataset(args.images, rng)
    detections = draw_detections(dataset, rng)
    sys.stdout.write(f"{args.images} images, {len(detections)} detections\n")
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    differences: dict[str, float] = {}
    for task in TASKS:
        seconds[task], differences[task] = compare(dataset, detections, task, args.repeats)
        rows = ", ".join(f"{name} {least['wall']:.1f} s" for name, least in seconds[task].items())
        sys.stdout.write(f"{task}: {rows}; largest difference {differences[task]:.1e}\n")
    if args.json:
        packages = {m.__name__: m.__version__ for m in (detectron2, faster_coco_eval, np)}
        numbers = {"images": len(dataset["images"]), "classes": NUM_CLASSES}
        numbers |= {"instances": len(dataset["annotations"]), "detections": len(detections)}
        content = {
            "command": shlex.join(["python", "benchmarks/coco_evaluation.py", *sys.argv[1:]]),
            "machine": describe_machine(None) | packages | {"pycocotools": version("pycocotools")},
            "data": numbers,
            "seconds, the least of all runs": seconds,
            "runs": args.repeats,
            "largest difference of precision and recall": differences,
        }
        save_json(args.json, content)


def implementations() -> dict[str, type[COCOeval]]:
    """Every class that computes COCO's metrics here, by name; pycocotools, the oracle, is the first."""
    found = {"pycocotools": COCOeval, "faster-coco-eval": faster_coco_eval.COCOeval_faster}
    if coco_evaluation.COCOeval_opt is not COCOeval:
        found["detectron2"] = coco_evaluation.COCOeval_opt
    return found


def compare(
    dataset: dict[str, Any], detections: list[dict], task: str, repeats: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Evaluate with every implementation in turn.

    Returns:
        by implementation, the least wall and processor seconds of all runs (other programs lengthen the
        first alone); and the largest difference of any precision or recall (0 to 1) from pycocotools'.
    """
    seconds: dict[str, dict[str, float]] = {}
    values: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, implementation in implementations().items():
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO()
                # Copies, as evaluation writes into both.
                truth.dataset, results = copy.deepcopy((dataset, detections))
                truth.createIndex()
                start = clocks()
                evaluated = coco_evaluation._evaluate_predictions_on_coco(
                    truth, results, task, cocoeval_fn=implementation
                )
            taken = {clock: round(end - start[clock], 2) for clock, end in clocks().items()}
            seconds[name] = {clock: min(taken[clock], seconds.get(name, taken)[clock]) for clock in taken}
            values[name] = np.concatenate([np.ravel(evaluated.eval[key]) for key in ("precision", "recall")])
    oracle, *others = values.values()
    return seconds, float(max(np.abs(oracle - other).max() for other in others))


def clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "processor": time.process_time()}


def draw_dataset(num_images: int, rng: np.random.Generator) -> dict[str, Any]:
    """Annotations in COCO's format: few common classes and many rare ones, all sizes, some crowds."""
    popularity = 1 / np.arange(1, NUM_CLASSES + 1)
    popularity /= popularity.sum()
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        for index in rng.choice(NUM_CLASSES, size=rng.poisson(INSTANCES_PER_IMAGE), p=popularity):
            outline = _blob(rng)
            annotation = _region(outline, HEIGHT, WIDTH)
            annotation |= {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(index) + 1}
            annotation["iscrowd"] = int(rng.uniform() < CROWD_SHARE)
            if not annotation["iscrowd"]:
                annotation["segmentation"] = [outline.ravel().tolist()]
            annotations.append(annotation)
    return {
        "images": [
            {"id": key, "file_name": f"{key}.jpg", "height": HEIGHT, "width": WIDTH}
            for key in range(1, num_images + 1)
        ],
        "categories": [{"id": key, "name": f"class {key}"} for key in range(1, NUM_CLASSES + 1)],
        "annotations": annotations,
    }


def draw_detections(dataset: dict[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Results in COCO's format: near hits, repeated hits, misses, wrong classes and false alarms.

    Args:
        dataset: annotations in COCO's format; detections are their largest polygons or their boxes, moved and
            scaled at random.
        rng: also draws the scores, with two decimals, so that many are equal.
    """
    categories = [category["id"] for category in dataset["categories"]]
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    results = []
    for image in dataset["images"]:
        found = []
        for annotation in by_image[image["id"]]:
            outline = _outline(annotation)
            for _ in range(rng.integers(0, 7)):
                shift = rng.normal(0, 0.05, 2) * annotation["bbox"][2:]
                moved = outline.mean(0) + shift + (outline - outline.mean(0)) * rng.uniform(0.8, 1.2, 2)
                wrong = rng.uniform() < 0.4
                category = rng.choice(categories) if wrong else annotation["category_id"]
                found.append((moved, category, rng.uniform(0.05, 0.7 if wrong else 1)))
        for _ in range(rng.poisson(8)):
            found.append((_blob(rng), rng.choice(categories), rng.uniform(0.05, 0.5)))
        for outline, category, score in found[:MAX_DETECTIONS]:
            result = {"image_id": image["id"], "category_id": int(category), "score": round(score, 2)}
            results.append(result | _region(outline, image["height"], image["width"]))
    return results


def _blob(rng: np.random.Generator) -> np.ndarray:
    """A random closed outline of 24 points (x, y), 10 to 300 pixels wide, with its centre in the image."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = np.exp(rng.uniform(np.log(5), np.log(150))) * rng.uniform(0.7, 1, size=24)
    circle = np.stack([np.cos(angles) * radius, np.sin(angles) * radius * rng.uniform(0.5, 1.5)], axis=1)
    return circle + rng.uniform((0, 0), (WIDTH, HEIGHT))


def _outline(annotation: dict[str, Any]) -> np.ndarray:
    """The largest polygon of an annotation, (N, 2); of a crowd, which has none, the box."""
    if isinstance(annotation["segmentation"], list):
        return np.array(max(annotation["segmentation"], key=len)).reshape(-1, 2)
    x, y, width, height = annotation["bbox"]
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def _region(outline: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Box, mask and its area (pixels) of an outline, (N, 2) as x and y, clipped to the image."""
    rle = mask_util.merge(mask_util.frPyObjects([outline.ravel().tolist()], height, width))
    low, high = (corner.clip(0, (width, height)) for corner in (outline.min(0), outline.max(0)))
    return {
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(mask_util.area(rle)),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
    }


if __name__ == "__main__":
    main()
