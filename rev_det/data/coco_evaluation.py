"""COCO evaluation: of the instances that training sees, by the fastest implementation at hand."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..files import naming, write_json
from .annotations import is_valid_polygon
from .coco import registered_summary

logger = logging.getLogger(__name__)


class RevCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, on the instances that registration kept, also fast where it is not built.

    pycocotools stops with an exception on empty or two-point polygons and on instances without ``area``
    or ``iscrowd``; only at the end of the evaluation, that is after the training. For a dataset
    registered by ``register_coco_json`` the ground truth therefore leaves out the degenerate instances
    (they were named then, and are at most 1 %) and their invalid polygons, takes an instance without
    ``iscrowd`` for a single object, and one without ``area`` for as large as its mask, or else its box.
    All else, and every other dataset, is evaluated as it is in its file, whatever its ids are.

    Metrics are computed by the class that `coco_implementation` chooses; the log names it. Detectron2's files
    in ``output_dir`` (``coco_instances_results.json`` has the detections in COCO's format) are joined by
    ``results.json``: the metrics, and for each class its AP and how many instances it has.

    Args:
        dataset_name: a registered dataset.
        *args: see ``COCOEvaluator``.
        use_fast_impl: False to compute with pycocotools in any case.
        **kwargs: see ``COCOEvaluator``.
    """

    def __init__(self, dataset_name: str, *args: Any, use_fast_impl: bool = True, **kwargs: Any) -> None:
        # Asked for the fast implementation, Detectron2 would log that its own is not built.
        super().__init__(dataset_name, *args, use_fast_impl=False, **kwargs)
        self._dataset_name = dataset_name
        # For another limit Detectron2 has a class of its own, which is pycocotools'.
        fast = use_fast_impl and self._max_dets_per_image[-1] == 100
        self._implementation_name, self._implementation = coco_implementation(fast)
        self._use_fast_impl = self._implementation is not COCOeval
        if self._do_evaluation:
            self._prepare_ground_truth()

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Compute the metrics, and write them to ``output_dir``, if there is one.

        Args:
            img_ids: the images to evaluate; None for all.

        Returns:
            AP and the like from 0 to 100, by task and name; on all processes but the first, nothing.
        """
        # Detectron2 writes the detections there.
        with naming(self._output_dir or ""):
            results = super().evaluate(img_ids)
        if results and self._output_dir:
            self._write_results(results, img_ids)
        return results

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence[int] | None = None) -> None:
        if self._do_evaluation:
            logger.info("COCO's metrics of '%s' by %s", self._dataset_name, self._implementation_name)
            self._coco_api = counted = _CountedCOCO(api := self._coco_api)
            img_ids = None if img_ids is None else [counted.images[key] for key in img_ids]
        try:
            with _used_by_detectron2(self._implementation):
                super()._eval_predictions(predictions, img_ids)
        finally:
            if self._do_evaluation:
                self._coco_api = api

    def _prepare_ground_truth(self) -> None:
        api = self._coco_api
        summary = registered_summary(self._dataset_name)
        if summary is None:
            return
        annotations = [item for item in api.dataset["annotations"] if item["id"] not in summary.dropped]
        for annotation in annotations:
            _complete(annotation, api)
        api.dataset["annotations"] = annotations
        _index(api)

    def _write_results(self, results: Mapping[str, Any], img_ids: Sequence[int] | None) -> None:
        """Write ``results.json``: complete, or not at all."""
        categories = sorted(self._coco_api.getCatIds())
        classes = self._metadata.get("thing_classes") or ()
        if len(classes) != len(categories):
            # Registered with other classes than the file has: which is which is not known.
            classes = ()
        keys = {f"AP-{name}" for name in classes}
        per_class = {}
        for name, category in zip(classes, categories, strict=False):
            truth = self._coco_api.getAnnIds(imgIds=img_ids or [], catIds=[category], iscrowd=False)
            # Of a single class, Detectron2 leaves out the table.
            key = f"AP-{name}" if len(classes) > 1 else "AP"
            per_class[name] = {"instances": len(truth)} | {
                task: _json_number(metrics.get(key)) for task, metrics in results.items()
            }
        content = {
            "dataset": self._dataset_name,
            "implementation": self._implementation_name,
            "metrics": {
                task: {name: _json_number(value) for name, value in metrics.items() if name not in keys}
                for task, metrics in results.items()
            },
            "per_class": per_class,
        }
        write_json(os.path.join(self._output_dir, "results.json"), content)


class _CountedCOCO(COCO):
    """A data set whose ids count from 1, for results with its own.

    Implementations keep ids as doubles, which cannot tell integers above 2^53 apart, or without their sign,
    and take the instance 0 for "not matched". Images and categories stay in their order.

    Args:
        api: the data set; it is not changed.
    """

    def __init__(self, api: COCO):
        super().__init__()
        content = api.dataset
        self.images, self.categories = (
            {key: number for number, key in enumerate(sorted(item["id"] for item in content[section]), 1)}
            for section in ("images", "categories")
        )
        annotations = self._counted(content["annotations"])
        self.dataset = content | {
            "images": [image | {"id": self.images[image["id"]]} for image in content["images"]],
            "categories": [item | {"id": self.categories[item["id"]]} for item in content["categories"]],
            "annotations": [item | {"id": number} for number, item in enumerate(annotations, 1)],
        }
        _index(self)

    def loadRes(self, resFile: list[dict]) -> COCO:  # noqa: N802, N803  (pycocotools' names)
        return super().loadRes(list(self._counted(resFile)))

    def _counted(self, items: Iterable[dict]) -> Iterator[dict]:
        for item in items:
            image, category = self.images.get(item["image_id"]), self.categories.get(item["category_id"])
            if image and category:  # all others are ignored
                yield item | {"image_id": image, "category_id": category}


def coco_implementation(fast: bool = True) -> tuple[str, Callable[..., COCOeval]]:
    """What computes COCO's metrics: Detectron2's extension, else faster-coco-eval, else pycocotools.

    All give the same numbers; pycocotools takes several times as long as the others.

    Args:
        fast: False for pycocotools in any case.

    Returns:
        its name, and what to call as ``COCOeval(coco_gt, coco_dt, iou_type)``.
    """
    if not fast:
        return "pycocotools", COCOeval
    if coco_evaluation.COCOeval_opt is not COCOeval:
        return "Detectron2's extension", coco_evaluation.COCOeval_opt
    try:
        import faster_coco_eval
    except ImportError:
        return "pycocotools ('pip install faster-coco-eval' is faster, with equal numbers)", COCOeval
    # Its lines are those that pycocotools prints.
    evaluator = functools.partial(faster_coco_eval.COCOeval_faster, print_function=logger.info)
    return f"faster-coco-eval {faster_coco_eval.__version__}", evaluator


@contextlib.contextmanager
def _used_by_detectron2(implementation: Callable[..., COCOeval]) -> Iterator[None]:
    """Let Detectron2's evaluator compute with a class, which it takes from its module and no argument."""
    before = coco_evaluation.COCOeval_opt
    coco_evaluation.COCOeval_opt = implementation
    try:
        yield
    finally:
        coco_evaluation.COCOeval_opt = before


def _index(api: COCO) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        api.createIndex()


def _complete(annotation: dict[str, Any], api: Any) -> None:
    """Remove what pycocotools fails on, and add what it asks for."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        annotation["segmentation"] = [p for p in segmentation if is_valid_polygon(p)]
    annotation.setdefault("iscrowd", 0)
    if "area" not in annotation:
        _, _, width, height = annotation["bbox"]
        has_mask = bool(annotation.get("segmentation"))
        annotation["area"] = float(api.annToMask(annotation).sum()) if has_mask else width * height


def _json_number(value: float | None) -> float | None:
    """JSON has no NaN, which Detectron2 takes for "cannot be computed"."""
    return None if value is None or math.isnan(value) else value
