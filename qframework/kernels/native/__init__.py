"""C++ functions for large tensors on CPUs: quantization and its gradients in one pass over memory each.

They take and return tensors outside of autograd; the fused functions call them where
:func:`~qframework.kernels.native.tensors.serves` says so. See kernels.cpp for what they compute.
"""

from qframework.kernels.native.calls import (
    absmax,
    absmax_gradients,
    absmax_share,
    codebook,
    codebook_gradients,
    empty_like,
    gradients,
    quantize,
    quantize_by_learned_scale,
    row_absmax,
    row_absmax_sums,
    row_tops,
    spread,
)
from qframework.kernels.native.static import StaticQuantizer
from qframework.kernels.native.tensors import (
    Layout,
    available,
    rounding_of,
    row_shape,
    serves,
)

__all__ = [
    "Layout",
    "StaticQuantizer",
    "absmax",
    "absmax_gradients",
    "absmax_share",
    "available",
    "codebook",
    "codebook_gradients",
    "empty_like",
    "gradients",
    "quantize",
    "quantize_by_learned_scale",
    "rounding_of",
    "row_absmax",
    "row_absmax_sums",
    "row_shape",
    "row_tops",
    "serves",
    "spread",
]
