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
    row_end_share,
    row_tops,
    signs,
    signs_gradients,
    spread,
)
from qframework.kernels.native.scheme import Scheme, rounding_of
from qframework.kernels.native.static import StaticQuantizer
from qframework.kernels.native.tensors import (
    Layout,
    address_to_read,
    available,
    axis_back,
    axis_last,
    axis_to_move,
    count_in,
    laid_out_as,
    row_shape,
    serves,
)

__all__ = [
    "Layout",
    "Scheme",
    "StaticQuantizer",
    "absmax",
    "absmax_gradients",
    "absmax_share",
    "address_to_read",
    "available",
    "axis_back",
    "axis_last",
    "axis_to_move",
    "codebook",
    "codebook_gradients",
    "count_in",
    "empty_like",
    "gradients",
    "laid_out_as",
    "quantize",
    "quantize_by_learned_scale",
    "rounding_of",
    "row_absmax",
    "row_absmax_sums",
    "row_end_share",
    "row_shape",
    "row_tops",
    "serves",
    "signs",
    "signs_gradients",
    "spread",
]
