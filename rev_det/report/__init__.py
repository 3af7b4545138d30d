"""A training run as one page of HTML that opens anywhere, without network and without JavaScript."""

from .page import write_report
from .run import Run

__all__ = ["Run", "write_report"]
