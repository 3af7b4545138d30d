"""CUDA's rules on the CPU against CUDA's own, and the cost of operators against cases worked out by hand."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rev_det.memory.autocast import cuda_rules
from rev_det.memory.cost import Cost, Rates, operator_cost, workspace
from rev_det.memory.counting import MIB, Counter, count_step
from rev_det.memory.measure import BackboneStep
from rev_det.memory.skipping import SkipArithmetic
from rev_det.modeling import RevMViT

aten = torch.ops.aten
CALLS = {
    "layer_norm": lambda x, w: functional.layer_norm(x, (8,), w, w),
    "group_norm": lambda x, w: functional.group_norm(x.transpose(1, 2), 2, w, w),
    "softmax": lambda x, w: x.softmax(-1),
    "softmax of a given type": lambda x, w: x.softmax(-1, dtype=torch.bfloat16),
    "log_softmax": lambda x, w: functional.log_softmax(x, -1),
    "cross_entropy": lambda x, w: functional.cross_entropy(
        x[0], torch.zeros(5, dtype=torch.long, device=x.device)
    ),
    "smooth_l1_loss": lambda x, w: functional.smooth_l1_loss(x, x.detach()),
    "binary_cross_entropy_with_logits": lambda x, w: functional.binary_cross_entropy_with_logits(
        x, x.detach()
    ),
    "pow": lambda x, w: x**2,
    "exp": lambda x, w: x.exp(),
    "sum": lambda x, w: x.sum(),
    "sum along": lambda x, w: x.sum(1, keepdim=True),
    "prod": lambda x, w: x.prod(1),
    "norm": lambda x, w: x.norm(),
    "norm along": lambda x, w: x.norm(dim=-1),
    "norm of old": lambda x, w: aten.norm.Scalar(x, 2),
    "norm of old along": lambda x, w: aten.norm.ScalarOpt_dim(x, 2, [1], True),
    "vector_norm": lambda x, w: torch.linalg.vector_norm(x),
    "interpolate": lambda x, w: functional.interpolate(x[None], scale_factor=2.0),
    "linear": lambda x, w: functional.linear(x, w.expand(3, 8)),
    "einsum": lambda x, w: torch.einsum("bnc,dc->bnd", x, w.expand(3, 8)),
    "addcmul": lambda x, w: torch.addcmul(x, x, x),
    "addcmul of two types": lambda x, w: torch.addcmul(w.expand_as(x), x, x),
    "cat of two types": lambda x, w: torch.cat([x, w.expand_as(x)]),
    "scatter_add": lambda x, w: x.scatter_add(0, torch.zeros(2, 5, 8, dtype=torch.long, device=x.device), x),
    "mean": lambda x, w: x.mean(),
    "gelu": lambda x, w: functional.gelu(x),
    "indices": lambda x, w: torch.zeros(3, dtype=torch.long, device=x.device).sum(),
    "float64": lambda x, w: x.double().softmax(-1).sum(),
}


class Trace(TorchDispatchMode):
    """Operators and the types that they take and give."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func.namespace == "prim"):
            taken, given = (
                [x.dtype for x in tree_leaves(t) if isinstance(x, torch.Tensor)] for t in (args, out)
            )
            self.calls.append((str(func), taken, given))
        return out


def trace(call, device, dtype):
    with FakeTensorMode():
        x = torch.empty(2, 5, 8, device=device, dtype=dtype)
        weight = torch.empty(8, device=device)
        with Trace() as mode:
            call(x, weight)
    return mode.calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_does_on_the_cpu_what_it_does_on_cuda(name, dtype):
    # torch.autocast("cuda") turns itself off on a machine without a GPU.
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        expected = trace(CALLS[name], "cuda", dtype)
    finally:
        torch.set_autocast_enabled("cuda", False)
    with cuda_rules(), torch.autocast("cpu", torch.bfloat16):
        assert trace(CALLS[name], "cpu", dtype) == expected


def test_rules_of_the_cpu_come_back():
    def types():
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.ones(2, 8).bfloat16()
            return functional.layer_norm(x, (8,)).dtype, torch.cat([x, x.float()]).dtype

    before = types()
    with cuda_rules():
        assert types() == (torch.float32, torch.float32)
    assert types() == before == (torch.bfloat16, torch.float32)
    with cuda_rules():
        # Without autocast nothing is cast.
        assert functional.layer_norm(torch.ones(2, 8).bfloat16(), (8,)).dtype == torch.bfloat16


@pytest.mark.parametrize("skip", [False, True], ids=["fake", "arithmetic skipped"])
@pytest.mark.parametrize("activations", ["cached", "checkpoint", "reversible"])
def test_rules_hold_in_the_backward_pass_and_what_it_recomputes(activations, skip):
    def norms(rules):
        model = RevMViT(
            embed_dim=16,
            depth=9,
            last_block_indexes=(0, 2, 6, 8),
            pretrain_img_size=64,
            activations=activations,
        )
        with Trace() as mode:
            if skip:
                step = BackboneStep(model, 1, (64, 64), torch.bfloat16)
                with SkipArithmetic(model), Counter(model, device_rules=rules):
                    step.run()
            else:
                count_step(model, lambda: torch.empty(1, 3, 64, 64), device_rules=rules)
        return [given[0] for name, _, given in mode.calls if name == "aten.native_layer_norm.default"]

    assert set(norms("cuda")) == {torch.float32}
    assert torch.bfloat16 in norms("cpu")
    if activations != "cached":
        assert len(norms("cuda")) > sum(isinstance(m, torch.nn.LayerNorm) for m in RevMViT().modules())


RATES = Rates(bandwidth=100.0, depthwise_bandwidth=10.0, products=100.0, attention=500.0, launch=7.0)


def cost_of(func, *args, **kwargs):
    return operator_cost(func, args, kwargs, func(*args, **kwargs), RATES)


def test_an_operator_takes_the_longer_of_arithmetic_and_traffic():
    a, b = torch.zeros(20, 30), torch.zeros(30, 40)
    traffic = 4 * (20 * 30 + 30 * 40 + 20 * 40)
    flops = 2 * 20 * 30 * 40
    assert cost_of(aten.mm.default, a, b) == Cost(flops, traffic, 1, flops / 100 + 7)
    assert cost_of(aten.add.Tensor, a, a) == Cost(0, 3 * a.nbytes, 1, 3 * a.nbytes / 100 + 7)
    assert cost_of(aten.mm.default, a, b) + cost_of(aten.add.Tensor, a, a) == Cost(
        flops, traffic + 3 * a.nbytes, 2, flops / 100 + 3 * a.nbytes / 100 + 14
    )


def test_views_and_empty_tensors_cost_nothing_and_expanded_dimensions_once():
    x = torch.zeros(4, 6)
    assert cost_of(aten.t.default, x) == cost_of(aten.empty_like.default, x) == Cost()
    assert cost_of(aten.neg.default, x[:1].expand(4, 6)).bytes_moved == 4 * 6 + 4 * 24


def test_what_is_only_written_is_moved_once():
    x, y = torch.zeros(4, 6), torch.zeros(4, 6)
    assert cost_of(aten.copy_.default, x, y).bytes_moved == 2 * x.nbytes
    assert cost_of(aten.zero_.default, x).bytes_moved == x.nbytes
    assert cost_of(aten.add.out, x, y, out=torch.zeros(4, 6)).bytes_moved == 3 * x.nbytes
    assert cost_of(aten.add_.Tensor, x, y).bytes_moved == 3 * x.nbytes  # which reads it


def test_depthwise_convolutions_are_bound_by_their_own_bandwidth():
    x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(8, 1, 3, 3)
    cost = cost_of(aten.convolution.default, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 8)
    assert cost.seconds == pytest.approx((2 * x.nbytes + weight.nbytes) / 10 + 7)


def test_what_a_layer_norm_copies_first_is_a_launch_and_memory():
    x = torch.zeros(2, 8, 5).transpose(1, 2)
    args = ([8], None, None, 1e-6)
    assert cost_of(aten.native_layer_norm.default, x, *args).launches == 2
    assert cost_of(aten.native_layer_norm.default, x.contiguous(), *args).launches == 1
    assert workspace(aten.native_layer_norm.default, (x, *args)) == x.nbytes
    assert workspace(aten.native_layer_norm.default, (x.contiguous(), *args)) == 0


def test_both_families_of_fused_attention_are_counted_alike():
    q, k = torch.empty(2, 3, 200, 64, device="meta"), torch.empty(2, 3, 100, 64, device="meta")
    q, k = q.bfloat16(), k.bfloat16()
    forward, backward = [], []
    for name, more in (("flash_attention_for_cpu", ()), ("flash_attention", (None, None, 200, 100))):
        func = getattr(aten, f"_scaled_dot_product_{name}").default
        out = func(q, k, k)
        forward.append(operator_cost(func, (q, k, k), {}, out[:2], RATES))
        func = getattr(aten, f"_scaled_dot_product_{name}_backward").default
        args = (out[0], q, k, k, *out[:2], *more, 0.0, False)
        args += (out[6], out[7]) if more else ()
        grads = func(*args)
        cost = operator_cost(func, args[:6], {}, grads, RATES)
        backward.append((cost.flops, cost.launches, workspace(func, args)))
    products = 2 * (2 * 3 * 200 * 100 * 64)
    assert [cost.flops for cost in forward] == [2 * products] * 2
    # Backward: the scores again, and two products each for queries and keys, and values and scores. Rows are
    # rounded up to 256.
    assert backward == [(5 * products, 3, 4 * 2 * 3 * 256 * (64 + 1))] * 2


@pytest.mark.parametrize(
    "shape, blocks, width",  # that share a column, and columns that each block has at once
    [
        *[((1000, 96), 0, 0), ((8400, 96), 66, 64), ((33600, 192), 525, 128), ((134400, 768), 352, 128)],
        *[((4096, 3072), 64, 128), ((2, 4096, 768), 128, 128), ((0, 8), 0, 0)],
    ],
)
def test_sums_over_rows_take_what_the_allocator_showed(shape, blocks, width):
    x = torch.empty(shape, device="meta")
    leading = list(range(x.dim() - 1))
    assert workspace(aten.sum.dim_IntList, (x, leading)) == 4 * shape[-1] * blocks * width
    assert workspace(aten.sum.dim_IntList, (x, [-1])) == 0


@pytest.mark.parametrize("rules", ["cuda", "cpu"])
def test_workspaces_are_in_the_peak_while_their_operation_runs(rules):
    with FakeTensorMode(), Counter(torch.nn.Identity(), device_rules=rules) as counter:
        x = torch.empty(4096, 3072)
        total = x.sum(0)
        del total
    extra = {"cuda": 96 * MIB, "cpu": 0}[rules]
    assert (counter.current, counter.peak) == (x.nbytes, x.nbytes + 4 * 3072 + extra)


def test_unknown_rules_are_an_error():
    with pytest.raises(ValueError, match="device_rules must be one of cuda, cpu; got 'xpu'"):
        Counter(torch.nn.Identity(), device_rules="xpu")


def test_other_rates_change_the_seconds_alone():
    def count(rates):
        with torch.device("meta"):
            model = RevMViT(embed_dim=16, depth=9, last_block_indexes=(0, 2, 6, 8), pretrain_img_size=64)
        return count_step(model, lambda: torch.empty(1, 3, 64, 64), rates=rates)

    usual, slow = count(None), count(Rates(launch=1.0))
    assert (slow.peak, slow.flops, slow.cost.bytes_moved) == (usual.peak, usual.flops, usual.cost.bytes_moved)
    assert slow.cost.seconds == pytest.approx(usual.cost.seconds + usual.cost.launches * (1.0 - 1.5e-6))
    assert 0 < usual.forward.seconds < usual.cost.seconds
