"""The last product of what is computed again is left out; its gradients are those of ordinary autograd."""

import threading

import pytest
import torch
from small_blocks import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rev_det.modeling.recomputation import recompute
from rev_det.modeling.unread import without_value

LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (2, 3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), (7, 4)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 9)),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2, bias=False), (2, 4, 7, 9)),
}


class Products(TorchDispatchMode):
    """Counts products and convolutions; torch's own counter fails inside nested graphs."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        self.number += name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
        return func(*args, **(kwargs or {}))


class Ended(nn.Module):
    """Ends in a layer, and sums and a multiplier after it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 1 + 3 * self.layer(x.sin())


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_layer_and_its_product_is_computed_once(name, frozen):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module = Ended(make()).double()
    for parameter in frozen:
        if getattr(module.layer, parameter) is not None:
            getattr(module.layer, parameter).requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    results, products = [], []
    for call in (module, lambda x: recompute(module, x, last=module.layer)):
        y = call(x)
        with Products() as counted:
            results.append(torch.autograd.grad(y.sin().sum(), wanted))
        products.append(counted.number)
    assert_same(*results)
    assert products[0] == products[1], "the product was computed again"


def computes(layer, x):
    """Whether a layer computes its value in the context."""
    with without_value(layer):
        return bool(layer(x).any())


def test_a_value_that_somebody_reads_is_computed():
    x, seen = torch.ones(2, 4), []
    layer = nn.Linear(4, 5)
    assert not computes(layer, x)
    assert layer(x).any(), "the layer was not put back"
    layer.register_forward_hook(lambda module, inputs, y: seen.append(y))
    assert computes(layer, x) and seen[-1].any()
    with without_value(other := nn.Linear(4, 5)):
        thread = threading.Thread(target=lambda: seen.append(other(x)))
        thread.start()
        thread.join()
    assert seen[-1].any(), "another thread got no value"

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert computes(Doubled(4, 5), x)
    assert computes(nn.Conv2d(4, 5, 1, padding="same"), x[..., None, None])
