"""Weights with a zero point of their own in one step, against the same composed of its parts."""

from collections.abc import Iterator

import pytest
import torch

import qframework
from qframework.functional import spanned_weight
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


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    """These functions, also where all others are tested composed."""
    with qframework.settings.use(kernels="fused"):
        yield


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    made = []
    function = spanned_weight._SpanScaled.forward

    def spy(*args):
        made.append(1)
        return function(*args)

    monkeypatch.setattr(spanned_weight._SpanScaled, "forward", staticmethod(spy))
    return made


def results(layer, kernels):
    """Values, scale and zero point, and the weight's gradient for each of them."""
    with qframework.settings.use(kernels=kernels, cache=False):
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
def test_values_and_gradients_are_those_of_the_parts(quantizer, kind, make, calls) -> None:
    torch.manual_seed(0)
    options = {"kernel_size": 3} if make is QuantConvTranspose1d else {}
    dtype = torch.float16 if kind == "halves" else torch.float64
    layer = make(7, 5, weight_quant=quantizer, dtype=dtype, **options)
    layer.weight = torch.nn.Parameter(WEIGHTS[kind](torch.randn_like(layer.weight)))
    calls.clear()
    (parts, grads), (expected, theirs) = results(layer, "fused"), results(layer, "reference")
    assert calls == [1]
    for a, b in zip(parts, expected, strict=True):
        assert torch.equal(a, b)
    tolerance = 1e-2 if kind == "halves" else 1e-6
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_all_calls_of_a_step_share_the_weight_and_its_graph(calls) -> None:
    layer = QuantLinear(4, 4, weight_quant=ShiftedUint8WeightPerTensorFloat, bias=False)
    calls.clear()
    x = torch.randn(2, 4)
    layer(layer(x)).sum().backward()
    first = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert calls == [1] and not torch.equal(first, layer.weight.grad)


def test_what_only_looks_alike_takes_the_ordinary_way(calls) -> None:
    class Learned(ShiftedUint8WeightPerTensorFloat):
        zero_point_affine_rescaling_init = 1.0

    layer = QuantLinear(4, 4, weight_quant=Learned)
    other = QuantLinear(4, 4, weight_quant=ShiftedUint8WeightPerTensorFloat)
    shared = QuantLinear(4, 4, weight_quant=other.weight_quant)
    calls.clear()
    for one in (layer, other, shared):
        one.quant_weight()
    assert calls == []
