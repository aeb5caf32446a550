"""Collected and learned numbers in graphs: the same as in eager mode, through one graph for both phases."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import qframework
from qframework.functional import high_rank, kth_smallest, low_rank
from qframework.kernels.collection import percentile_if
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8WeightPerTensorLSQ,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorFixedPoint,
)

YES, NO = torch.tensor(True), torch.tensor(False)


def numbers(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------ percentiles that are needed in some calls only


@given(
    st.sampled_from([1, 2, 3, 50, 999, 5000]),
    st.one_of(st.floats(0, 100), st.sampled_from([0.0, 0.02, 99.98, 100.0])),
    st.booleans(),
    st.booleans(),
    st.integers(0, 100),
)
def test_a_percentile_that_is_wanted_is_that_of_the_definition(n, q, low, magnitude, seed) -> None:
    x = numbers(n, seed).requires_grad_()
    rank = low_rank(q, n) if low else high_rank(q, n)
    found, finite = percentile_if(x, YES, q, low, magnitude)
    expected = kth_smallest(x, rank, magnitude)
    assert finite and torch.equal(found, expected)
    (grad,), (other,) = (torch.autograd.grad(3 * t, x) for t in (found, expected))
    assert torch.equal(grad, other)


def test_a_percentile_that_is_not_wanted_is_0_without_a_look_at_the_values() -> None:
    x = torch.full((5, 7), torch.nan, requires_grad=True)
    found, finite = percentile_if(x, NO, 99.0, magnitude=True)
    assert finite and found == 0 and found.shape == ()
    assert torch.autograd.grad(0 * found, x)[0].shape == (5, 7)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [YES, NO])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_operator_of_a_percentile_is_what_it_says(order, wanted) -> None:
    x = torch.randn(4, 3, 5, 7).to(memory_format=order)
    for q, low, magnitude in ((99.0, False, True), (1.0, True, False)):
        operands = (x, wanted, q, low, magnitude)
        torch.library.opcheck(torch.ops.qframework.percentile_if.default, operands)


# ------------------------------------------------------------ collection

PER_CHANNEL = {
    "scaling_per_output_type": "channel",
    "per_channel_broadcastable_shape": (1, 3, 1, 1),
    "scaling_stats_permute_dims": (1, 0, 2, 3),
}
LAYERS = {
    "a percentile": lambda: QuantReLU(collect_stats_steps=3),
    "a percentile, large": lambda: QuantIdentity(collect_stats_steps=3, high_percentile_q=99.9),
    "powers of two": lambda: QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, collect_stats_steps=3),
    "an interval and its lower end": lambda: QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=3),
    "channels": lambda: QuantIdentity(collect_stats_steps=3, **PER_CHANNEL),
    "another statistic": lambda: QuantIdentity(scaling_stats_op="ave", collect_stats_steps=3),
}  # fmt: skip


#: Of definitions, which a compiler sees as it does any of torch's functions, two each time; the others are exhaustive.
BY_DEFINITION = ("a percentile, large", "an interval and its lower end")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        *[(kind, "auto") for kind in LAYERS],
        *[
            pytest.param(
                kind, "reference", marks=() if kind in BY_DEFINITION else pytest.mark.exhaustive
            )
            for kind in LAYERS
        ],
    ],
)
def test_a_graph_collects_and_learns_as_eager_mode_does(kind, kernels) -> None:
    torch.compiler.reset()
    eager = LAYERS[kind]()
    traced = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    size = 40 if "large" in kind else 6
    with qframework.settings.use(kernels=kernels):
        for seed in range(6):
            x = numbers(2 * 3 * size * size, seed).view(2, 3, size, size)
            one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            a, b = eager(one), compiled(other)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            (a * a.detach().cos()).sum().backward(), (b * b.detach().cos()).sum().backward()
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    mine, theirs = traced.state_dict(), eager.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor)
    for p, q in zip(traced.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_channels_of_batches_of_any_size_are_collected_in_a_graph() -> None:
    torch.compiler.reset()
    eager = LAYERS["channels"]()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for size in range(2, 8):
        x = numbers(size * 3 * 36, size).view(size, 3, 6, 6).requires_grad_()
        torch.testing.assert_close(compiled(x), eager(x))
        compiled(x).sum().backward(), eager(x).sum().backward()
    torch.testing.assert_close(traced.state_dict(), eager.state_dict())


@pytest.mark.slow
def test_a_quantizer_that_has_switched_leaves_its_collection_out_of_graphs() -> None:
    torch.compiler.reset()
    layer, held = QuantReLU(collect_stats_steps=1), []
    for seed in range(3):
        layer(numbers(100, seed))

    def backend(graph, operands):
        held.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=backend)(numbers(100, 3))
    assert held and not any("percentile_if" in name or "cond" in name for name in held)


# ------------------------------------------------------------ numbers that follow parameters


@pytest.mark.slow
def test_a_graph_lets_learned_numbers_follow_their_weight_until_they_are_trained() -> None:
    torch.compiler.reset()
    eager = QuantLinear(8, 4, weight_quant=Int8WeightPerTensorLSQ, bias=False)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)

    def same() -> torch.Tensor:
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
        mine, theirs = (m.weight_quant.tensor_quant.scaling_impl for m in (traced, eager))
        torch.testing.assert_close(mine.value, theirs.value)
        torch.testing.assert_close(mine.initial, theirs.initial)
        return theirs.value.detach().clone()

    with torch.no_grad():
        first = same()
        for layer in (traced, eager):
            layer.weight.mul_(3)
        torch.testing.assert_close(same(), 3 * first)
        for layer in (traced, eager):
            layer.weight_quant.tensor_quant.scaling_impl.value.mul_(0.5)
            layer.weight.mul_(2)
        torch.testing.assert_close(same(), 1.5 * first)


@pytest.mark.slow
def test_an_exported_program_holds_numbers_as_they_are() -> None:
    layer = nn.Sequential(QuantLinear(8, 4, weight_quant=Int8WeightPerTensorLSQ, bias=False)).eval()
    x = torch.randn(3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = layer(x)
        program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert not any("copy_" in str(node.target) for node in program.graph.nodes)
