"""Prediction: a trained detector on images and videos, its results as pictures and in COCO's format."""

from .classes import Classes, classes_from_json
from .detector import Detector, Origin, load_detector
from .inputs import Frame, Source, find_sources, read_frames
from .output import PredictionWriter, check_output
from .running import highest_score, predict

__all__ = [
    "Classes",
    "Detector",
    "Frame",
    "Origin",
    "PredictionWriter",
    "Source",
    "check_output",
    "classes_from_json",
    "find_sources",
    "highest_score",
    "load_detector",
    "predict",
    "read_frames",
]
