"""Whole backbones under torch.compile: runs and recomputed modules break the graph, nothing else does."""

import pytest
import torch
from test_backbones import FAMILIES, assert_same, images, loss_of, make, step
from torch._dynamo.utils import counters

from rev_det.modeling import RevMViT

# A transition, and a run of one block on either side of it.
TWO_STAGES = {"depth": 3, "last_block_indexes": (0, 2), "out_features": ("scale2", "scale3")}


def assert_compiled_has_the_same_gradients(cls, backend, **arguments):
    x = images(1, 40, 50)
    expected = step(make(cls, drop_path_rate=0.4, **arguments), x)
    model = make(cls, drop_path_rate=0.4, **arguments)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(5)
    loss = loss_of(torch.compile(model, backend=backend)(x))
    assert_same((loss, torch.autograd.grad(loss, list(model.parameters()))), expected)
    assert counters["stats"]["unique_graphs"] > 1, "nothing was compiled"
    breaks = list(counters["graph_break"])
    assert all("_run_reversible" in reason or "function _recompute" in reason for reason in breaks), breaks


def test_a_compiled_backbone_has_the_same_gradients():
    assert_compiled_has_the_same_gradients(RevMViT, "aot_eager", **TWO_STAGES)


@pytest.mark.slow
@FAMILIES
def test_compiled_backbones_of_all_stages_have_the_same_gradients(cls):
    assert_compiled_has_the_same_gradients(cls, "aot_eager")
