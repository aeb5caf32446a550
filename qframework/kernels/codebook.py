"""Rounding to the entries of a codebook in one differentiable step, which saves its inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import add_kernel, codebook_quantize, compute_dtype, nearest_entry
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, apply, may_fuse_anywhere
from qframework.kernels.integer import sum_to

#: Of codebooks that C++ functions compare with one by one.
_ENTRIES = 32


class _Codebook(Fused):
    tensors = (0, 1, 2)

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, scale, codebook)
        layout = _layout(x, scale, codebook)
        if layout is not None:
            return native.codebook(layout, x, scale, codebook)
        v = x.to(compute_dtype(x.dtype)) / scale
        entry = codebook[nearest_entry(v, codebook)]
        return (torch.where(v.isnan(), v, entry) * scale).to(x.dtype)

    @staticmethod
    def define(ctx: Context, x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:  # type: ignore[override]
        return codebook_quantize.definition(x, scale, codebook)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, codebook = ctx.saved_tensors
        grad = native.laid_out_as(grad, x)
        layout = None if ctx.needs_input_grad[2] else _layout(x, scale, codebook, grad)
        if layout is not None:
            return *native.codebook_gradients(layout, grad, x, scale, codebook), None
        g = grad.to(compute_dtype(x.dtype))
        v = x.to(g.dtype) / scale
        index = nearest_entry(v, codebook)
        inside = (v >= codebook[0]) & (v <= codebook[-1])
        grad_x = torch.where(inside, g, 0.0)
        grad_scale = grad_codebook = None
        if ctx.needs_input_grad[1]:
            grad_scale = sum_to(g * codebook[index] - grad_x * v, scale)
        if ctx.needs_input_grad[2]:
            each = (g * scale).reshape(-1)
            grad_codebook = torch.zeros_like(codebook).index_add(0, index.reshape(-1), each)
        return grad_x.to(grad.dtype), grad_scale, grad_codebook


def _layout(
    x: Tensor, scale: Tensor, codebook: Tensor, g: Tensor | None = None
) -> native.Layout | None:
    """How C++ functions take the values, and ``g``, the gradient of the result."""
    if not (2 <= codebook.numel() <= _ENTRIES and codebook.dtype is scale.dtype):
        return None
    return native.serves(x, tuple(scale.shape), "round", scale, codebook, g=g)


@add_kernel(codebook_quantize, "fused", may_fuse_anywhere)
def _fused(*args: Any) -> Tensor:
    return apply(_Codebook, *args)  # type: ignore[no-any-return]
