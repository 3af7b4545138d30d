"""Datasets: COCO-format data by name and path, the generated quick-start set, mapping and evaluation."""

from .coco import parse_dataset_argument, register_coco_json
from .coco_evaluation import RevCOCOEvaluator
from .loader import TrainLoader, build_test_loader, build_train_loader
from .mapper import RevDatasetMapper
from .resolve import class_names, register_datasets, resolve_mask_format, resolve_num_classes
from .shapes import generate_shapes

__all__ = [
    "RevCOCOEvaluator",
    "RevDatasetMapper",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "class_names",
    "generate_shapes",
    "parse_dataset_argument",
    "register_coco_json",
    "register_datasets",
    "resolve_mask_format",
    "resolve_num_classes",
]
