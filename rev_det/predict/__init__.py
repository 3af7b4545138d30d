"""Prediction: a trained detector on images and videos, its results as pictures and in COCO's format."""

from .classes import Classes, classes_from_json
from .detector import Detector, Origin, load_detector
from .inputs import Frame, Source, find_sources, read_frames
from .output import PredictionWriter, refuse_overwriting
from .running import predict

__all__ = [
    "Classes",
    "Detector",
    "Frame",
    "Origin",
    "PredictionWriter",
    "Source",
    "classes_from_json",
    "find_sources",
    "load_detector",
    "predict",
    "read_frames",
    "refuse_overwriting",
]
