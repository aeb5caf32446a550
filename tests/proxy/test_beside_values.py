"""Zero point and bit width of quantized values: those of the call, whenever they are looked at."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import qframework
from qframework.layers import QuantIdentity, QuantLinear

X = torch.linspace(-2, 2, 512).reshape(2, 256)
NAMES = ("value", "scale", "zero_point", "bit_width")


@pytest.fixture(params=["activation", "weight"])
def quantized(request):
    """A layer, and the function that makes a quantized tensor of it."""
    if request.param == "weight":
        layer = QuantLinear(256, 4, weight_bit_width=5)
        return layer.weight_quant.tensor_quant, layer, layer.quant_weight
    layer = QuantIdentity(bit_width=5, collect_stats_steps=1, return_quant_tensor=True)
    layer(X)
    layer(X)
    return layer.act_quant.tensor_quant, layer, lambda: layer(X)


def assert_same(q, expected) -> None:
    for name in NAMES:
        got, wanted = getattr(q, name), getattr(expected, name)
        assert torch.equal(got, wanted)
        assert (got.dtype, got.shape, got.device) == (wanted.dtype, wanted.shape, wanted.device)
        assert got.requires_grad == wanted.requires_grad


@pytest.mark.parametrize("change", ["bits", "double", "meta"])
def test_they_are_those_of_the_call_whatever_becomes_of_the_layer(quantized, change) -> None:
    quantizer, layer, make = quantized
    q = make()
    with qframework.settings.use(kernels="reference"):
        expected = make()
    assert float(expected.bit_width) == 5
    if change == "bits":
        quantizer.msb_clamp_bit_width_impl.bits = 3
    elif change == "double":
        layer.double()
    else:
        layer.to("meta")
    assert_same(q, expected)


@pytest.mark.parametrize(
    "way",
    [
        copy.copy,
        copy.deepcopy,
        lambda q: pickle.loads(pickle.dumps(q)),
        lambda q: q.set(value=q.value),
        lambda q: q.clone(),
        lambda q: pytree.tree_map(lambda t: t, q),
        lambda q: q.to("cpu"),
        lambda q: q[:],
    ],
)
def test_they_come_along(quantized, way) -> None:
    _, _, make = quantized
    with torch.no_grad():
        q = make()
        with qframework.settings.use(kernels="reference"):
            expected = make()
        assert_same(way(q), expected)


def test_they_are_ordinary_tensors_wherever_they_are_looked_at(quantized) -> None:
    _, _, make = quantized
    q = make()
    with torch.inference_mode():
        assert not q.zero_point.is_inference() and not q.bit_width.is_inference()
    with torch.inference_mode():
        q = make()
    assert not q.bit_width.requires_grad
    assert float(q.bit_width) == 5
