"""Quantized tensors: a dequantized value with the scale, zero point, bit width and sign of its integers."""

from qframework.quant_tensor import rules_elementwise, rules_linear, rules_pool, rules_shape  # noqa: F401
from qframework.quant_tensor.base import QuantTensor, unpack
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.source import product_source

__all__ = ["IntQuantTensor", "QuantTensor", "product_source", "unpack"]
