"""The tiny official state dicts; each test has its own."""

import pytest
from tiny_weights import official_state


@pytest.fixture
def official_vit():
    return official_state("tiny_rev_vit")


@pytest.fixture
def official_mvit():
    return official_state("tiny_rev_mvit")
