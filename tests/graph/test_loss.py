"""Penalties on learned bit widths, against sums by hand."""

import pytest
import torch

from qframework.graph.loss import (
    ActivationBitWidthWeightedBySize,
    QuantLayerOutputBitWidthWeightedByOps,
    WeightBitWidthWeightedBySize,
)
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU

LEARNED = {"bit_width_impl_type": "parameter"}


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        QuantIdentity(bit_width=5, return_quant_tensor=True, **LEARNED),
        QuantConv2d(
            2,
            4,
            3,
            bias=False,
            weight_bit_width_impl_type="parameter",
            weight_bit_width=6,
            return_quant_tensor=True,
        ),
        QuantReLU(bit_width=4, **LEARNED),
        torch.nn.Flatten(),
        QuantLinear(16, 3, weight_bit_width_impl_type="parameter", weight_bit_width=3),
        QuantLinear(3, 3, weight_bit_width=7),  # constant: not counted
    )


X = torch.rand(5, 2, 4, 4)


def test_weights_are_weighted_by_their_number() -> None:
    m = model()
    loss = WeightBitWidthWeightedBySize(m)
    m(X)
    assert float(loss.retrieve(as_average=False).detach()) == 6 * 72 + 3 * 48
    average = loss.retrieve()
    assert float(average.detach()) == pytest.approx((6 * 72 + 3 * 48) / 120)
    average.backward()
    grads = {n: p.grad for n, p in m.named_parameters() if n.endswith("bit_width_offset")}
    assert float(
        grads["1.weight_quant.tensor_quant.msb_clamp_bit_width_impl.bit_width_offset"]
    ) == (pytest.approx(72 / 120))
    assert loss.log() == {"1.weight_quant": 6.0, "4.weight_quant": 3.0}


def test_activations_are_weighted_by_their_number_in_a_sample() -> None:
    m = model()
    loss = ActivationBitWidthWeightedBySize(m)
    m(X)
    assert float(loss.retrieve(as_average=False).detach()) == 5 * 32 + 4 * 16


def test_accumulators_are_weighted_by_operations() -> None:
    m = model()
    loss = QuantLayerOutputBitWidthWeightedByOps(m)
    m(X)
    width = float(m[1](m[0](X)).bit_width.detach())
    loss.zero_accumulated_values()
    m(X)
    assert float(loss.retrieve(as_average=False).detach()) == width * 2 * 18 * 16
    loss.retrieve().backward()
    assert m[0].act_quant.tensor_quant.msb_clamp_bit_width_impl.bit_width_offset.grad is not None


def test_it_counts_from_zero_on_and_can_be_taken_off() -> None:
    m = model()
    loss = WeightBitWidthWeightedBySize(m)
    with pytest.raises(RuntimeError, match="no forward pass"):
        loss.retrieve()
    m(X), m(X)
    twice = float(loss.retrieve(as_average=False).detach())
    loss.zero_accumulated_values()
    m(X)
    assert 2 * float(loss.retrieve(as_average=False).detach()) == twice
    loss.zero_accumulated_values()
    loss.remove_hooks()
    m(X)
    with pytest.raises(RuntimeError, match="no forward pass"):
        loss.retrieve()
    with pytest.raises(ValueError, match="bit_width_impl_type"):
        WeightBitWidthWeightedBySize(torch.nn.Sequential(QuantLinear(2, 2)))
