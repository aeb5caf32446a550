"""Quantized tensors: a dequantized value with what its number format needs: scale, zero point, widths, sign."""

from qframework.quant_tensor import (  # noqa: F401
    collate,
    rules_elementwise,
    rules_linear,
    rules_pool,
    rules_reduce,
    rules_shape,
)

from qframework.quant_tensor import rules_formats  # noqa: F401  # isort: skip, it takes from the others
from qframework.quant_tensor.base import QuantTensor, TensorLike, dequantize
from qframework.quant_tensor.codebook_quant_tensor import CodebookQuantTensor
from qframework.quant_tensor.float_quant_tensor import FloatQuantTensor
from qframework.quant_tensor.groups import (
    GroupwiseFloatQuantTensor,
    GroupwiseIntQuantTensor,
    GroupwiseQuantTensor,
)
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.source import product_source

__all__ = [
    "CodebookQuantTensor",
    "FloatQuantTensor",
    "GroupwiseFloatQuantTensor",
    "GroupwiseIntQuantTensor",
    "GroupwiseQuantTensor",
    "IntQuantTensor",
    "QuantTensor",
    "TensorLike",
    "product_source",
    "dequantize",
]
