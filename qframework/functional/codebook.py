"""Rounding to the entries of a codebook.

y = scale * the entry nearest to x / scale, the lower one of two equally near
"""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.functional.precision import upcast
from qframework.functional.registry import defined
from qframework.functional.straight_through import tensor_clamp


def nearest_entry(v: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest entry.

    Args:
        v: numbers of any shape.
        codebook: entries in increasing order, ``(n,)``.
    """
    return torch.bucketize(v, (codebook[1:] + codebook[:-1]) / 2)


@defined
def codebook_quantize(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """The nearest entries of a codebook, times a scale; NaN stays NaN.

    Gradients: straight through to ``x`` between the smallest and the largest entry, none beyond; the scale gets the
    rest; an entry gets the sum of those of its elements.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``.
        codebook: entries in increasing order, ``(n,)``.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    v = upcast(x) / scale
    fixed = codebook.detach()
    entry = codebook[nearest_entry(v.detach(), fixed)]
    clamped = tensor_clamp(v, fixed[0], fixed[-1])
    # The entry itself, with the gradient of the clamp: the difference is exactly 0, or NaN.
    return ((entry + (clamped - clamped.detach())) * scale).to(x.dtype)
