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
from qframework.layers.attention import (
    QuantScaledDotProductAttention,
    ScaledDotProductAttention,
)
from qframework.layers.attention_multihead import QuantMultiheadAttention
from qframework.layers.conv import QuantConv1d, QuantConv2d
from qframework.layers.linear import QuantLinear
from qframework.layers.transformer import QuantTransformerEncoderLayer
from qframework.layers.wbiol import QuantWBIOL, QuantWeightBiasInputOutputLayer

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantHardSwish",
    "QuantHardTanh",
    "QuantIdentity",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantNonLinearActLayer",
    "QuantReLU",
    "QuantScaledDotProductAttention",
    "QuantSigmoid",
    "QuantTanh",
    "QuantTransformerEncoderLayer",
    "QuantWBIOL",
    "QuantWeightBiasInputOutputLayer",
    "ScaledDotProductAttention",
    "TruncQuantAccumulator",
]
