"""Shared fixtures: the gpu marker, the reference data beside the checkout, loggers as they were."""

import contextlib
import logging
import resource
from pathlib import Path

import pytest
import torch
from detectron2.utils.logger import setup_logger

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def shared() -> Path:
    """The folder of reference data beside the checkout; tests that use it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no folder ../shared with reference data")
    return SHARED


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond some bytes; Python gets an error, as from a full disk."""

    @contextlib.contextmanager
    def limited(nbytes: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(autouse=True)
def restored_loggers():
    """Detectron2 sets up its loggers for the whole process, with the streams and files of the first run."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "rev_det")]
    saved = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, saved, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    setup_logger.cache_clear()
