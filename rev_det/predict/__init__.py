"""Prediction: a trained detector on images and videos, its results as pictures and in COCO's format."""

from .detector import Detector, Origin, load_detector, predict
from .inputs import Frame, Source, find_sources, read_frames
from .output import PredictionWriter, check_folder

__all__ = [
    "Detector",
    "Frame",
    "Origin",
    "PredictionWriter",
    "Source",
    "check_folder",
    "find_sources",
    "load_detector",
    "predict",
    "read_frames",
]
