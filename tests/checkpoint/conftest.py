"""The tiny official state dicts; each test has its own."""

import functools

import pytest
from tiny_weights import official_state


@functools.cache
def _state(name):
    return official_state(name)


def _copy(name):
    return {key: value.clone() for key, value in _state(name).items()}


@pytest.fixture
def official_vit():
    return _copy("tiny_rev_vit")


@pytest.fixture
def official_mvit():
    return _copy("tiny_rev_mvit")
