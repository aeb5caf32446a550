"""Rounding to the entries of a codebook.

y = scale * the entry nearest to x / scale, the lower one of two equally near
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.autograd import apply, is_fused, keep, kept
from qframework.functional.fixed_range import compute_dtype, sum_to
from qframework.functional.straight_through import tensor_clamp


def _nearest(v: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest entry."""
    return torch.bucketize(v, (codebook[1:] + codebook[:-1]) / 2)


class _Codebook(Function):
    """Keeps its inputs alone; see :func:`codebook_quantize`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
        v = x.to(compute_dtype(x)) / scale
        entry = codebook[_nearest(v, codebook)]
        return (torch.where(v.isnan(), v, entry) * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        keep(ctx, *inputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, codebook = kept(ctx)
        g = grad.to(compute_dtype(x))
        v = x.to(g.dtype) / scale
        index = _nearest(v, codebook)
        inside = (v >= codebook[0]) & (v <= codebook[-1])
        grad_x = torch.where(inside, g, 0.0)
        grad_scale = grad_codebook = None
        if ctx.needs_input_grad[1]:
            grad_scale = sum_to(g * codebook[index] - grad_x * v, scale)
        if ctx.needs_input_grad[2]:
            each = (g * scale).reshape(-1)
            grad_codebook = torch.zeros_like(codebook).index_add(0, index.reshape(-1), each)
        return grad_x.to(grad.dtype), grad_scale, grad_codebook


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
    if is_fused():
        return apply(_Codebook, x, scale, codebook)  # type: ignore[no-any-return]
    return codebook_reference(x, scale, codebook)


def codebook_reference(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """:func:`codebook_quantize` composed of plain functions; the tests hold them equal."""
    v = x.to(compute_dtype(x)) / scale
    fixed = codebook.detach()
    entry = codebook[_nearest(v.detach(), fixed)]
    clamped: Tensor = tensor_clamp(v, fixed[0], fixed[-1])
    # The entry itself, with the gradient of the clamp: the difference is exactly 0.
    return ((entry + (clamped - clamped.detach())) * scale).to(x.dtype)
