"""Weights with a zero point of their own in one step, against the same composed of its parts."""

from collections.abc import Iterator

import pytest
import torch

import qframework
from qframework.functional import IntegerGrid, ScaleRule, quantize_by_minmax
from qframework.kernels import minmax
from qframework.kernels.native import tensors
from qframework.layers import QuantConvTranspose1d, QuantLinear
from qframework.quantizers import (
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerTensorFloat,
)


class PowerOfTwo(ShiftedUint8WeightPerTensorFloat):
    restrict_scaling_type = "power_of_two"


QUANTIZERS = [ShiftedUint8WeightPerTensorFloat, ShiftedUint8WeightPerChannelFloat, PowerOfTwo]
WEIGHTS = {
    "of both signs": lambda w: w,
    "positive": lambda w: w.abs() + 0.1,
    "negative": lambda w: -w.abs() - 0.1,
    "with ties": lambda w: w.clamp(-0.5, 0.5),
    "rounded": lambda w: (w * 4).round() / 4,
    "halves": lambda w: w.half(),
}


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> Iterator[str]:
    """These functions, also where all others are tested composed, and C++ where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    made, function = [], minmax._values
    monkeypatch.setattr(minmax, "_values", lambda *args: (made.append(1), function(*args))[1])
    return made


def results(layer, kernels):
    """Values, scale and zero point, and the weight's gradient for each of them."""
    with qframework.settings.use(kernels=kernels):
        q = layer.quant_weight()
        parts = (q.value, q.scale, q.zero_point)
        torch.manual_seed(1)
        grads = []
        for part in parts:
            upstream = torch.randn(part.shape, dtype=torch.float32).to(part.dtype)
            (grad,) = torch.autograd.grad(part, layer.weight, upstream, retain_graph=True)
            grads.append(grad)
        return parts, grads


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("make", [QuantLinear, QuantConvTranspose1d])
def test_values_and_gradients_are_those_of_the_parts(quantizer, kind, make, calls, kernels) -> None:
    torch.manual_seed(0)
    options = {"kernel_size": 3} if make is QuantConvTranspose1d else {}
    dtype = torch.float16 if kind == "halves" else torch.float64
    layer = make(7, 5, weight_quant=quantizer, dtype=dtype, **options)
    layer.weight = torch.nn.Parameter(WEIGHTS[kind](torch.randn_like(layer.weight)))
    calls.clear()
    (parts, grads), (expected, theirs) = results(layer, kernels), results(layer, "reference")
    assert calls == [1]
    for a, b in zip(parts, expected, strict=True):
        assert torch.equal(a, b)
    tolerance = 1e-2 if kind == "halves" else 1e-6
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_each_call_quantizes_the_weight_as_it_is_and_frozen_layers_do_so_once(calls) -> None:
    layer = QuantLinear(4, 4, weight_quant=ShiftedUint8WeightPerTensorFloat, bias=False)
    calls.clear()
    x = torch.randn(2, 4)
    layer(layer(x)).sum().backward()
    assert calls == [1, 1]
    first = layer.weight.grad.clone()
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.weight.grad = None
    layer(layer(x)).sum().backward()
    assert calls == [1] * 4
    torch.testing.assert_close(layer.weight.grad, 2 * first, rtol=1e-5, atol=1e-5)
    layer.eval()
    calls.clear()
    with qframework.frozen(layer), torch.no_grad():
        layer(layer(x)), layer(x)
    assert calls == [1]


def test_what_only_looks_alike_takes_the_ordinary_way(calls) -> None:
    class Learned(ShiftedUint8WeightPerTensorFloat):
        zero_point_affine_rescaling_init = 1.0

    layer = QuantLinear(4, 4, weight_quant=Learned)
    other = QuantLinear(4, 4, weight_quant=ShiftedUint8WeightPerTensorFloat)
    assert "quantize_by_minmax" in other.weight_quant.path()
    shared = QuantLinear(4, 4, weight_quant=other.weight_quant)
    calls.clear()
    for one in (layer, other, shared):
        assert "quantize_by_minmax" not in one.weight_quant.path()
        one.quant_weight()
    assert calls == []


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equal_ends_share_the_gradient_of_a_tensor_and_the_first_gets_that_of_a_channel(
    axis,
) -> None:
    x = torch.tensor([[3.0, -1.0, -1.0], [3.0, 3.0, -1.0]], requires_grad=True)
    shape = () if axis is None else ((2, 1), (1, 3))[axis]
    rule = ScaleRule("minmax", 4.0, shape=shape, channel_axis=axis)
    _, scale, zero_point = quantize_by_minmax(x, IntegerGrid(0.0, 3.0, "round", False), rule)
    (grad,) = torch.autograd.grad(scale.sum(), x)
    third = 0.25 / 3
    expected = {
        None: [[third, -third, -third], [third, third, -third]],
        0: [[0.25, -0.25, 0], [0.25, 0, -0.25]],
        1: [[0.25, -0.25, -0.25], [0, 0.25, 0]],
    }
    torch.testing.assert_close(grad, torch.tensor(expected[axis]))
    assert zero_point.shape == scale.shape == shape
