"""Memory, FLOPs, traffic and time of a training step, counted on any machine or measured on a device."""

from .cost import Cost, Rates
from .counting import Counter, StepCount, count_step

__all__ = ["Cost", "Counter", "Rates", "StepCount", "count_step"]
