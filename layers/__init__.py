"""Quantized layers."""

from qframework.layers.accumulator import TruncQuantAccumulator
from qframework.layers.activation import (
    QuantHardSwish,
    QuantHardTanh,
    QuantIdentity,
    QuantNonLinearActLayer,
    QuantReLU,
    QuantSigmoid,
    QuantTanh,
)
from qframework.layers.conv import QuantConv1d, QuantConv2d
from qframework.layers.linear import QuantLinear
from qframework.layers.wbiol import QuantWBIOL, QuantWeightBiasInputOutputLayer

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantHardSwish",
    "QuantHardTanh",
    "QuantIdentity",
    "QuantLinear",
    "QuantNonLinearActLayer",
    "QuantReLU",
    "QuantSigmoid",
    "QuantTanh",
    "QuantWBIOL",
    "QuantWeightBiasInputOutputLayer",
    "TruncQuantAccumulator",
]
