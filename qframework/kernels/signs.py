"""Quantization to two values in one differentiable step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import add_kernel, compute_dtype, quantize_to_signs
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, apply, may_fuse
from qframework.kernels.integer import sum_to


class _Signs(Fused):
    tensors = (0, 1)

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: Tensor, clamp_gradient: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, scale)
        ctx.how = clamp_gradient
        layout = native.serves(x, tuple(scale.shape), "round", scale)
        if layout is not None:
            return native.signs(layout, x, scale)
        return quantize_to_signs.definition(x, scale)

    @staticmethod
    def define(ctx: Context, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return quantize_to_signs.definition(x, scale, ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        grad = native.laid_out_as(grad, x)
        layout = native.serves(x, tuple(scale.shape), "round", scale, g=grad)
        if layout is not None:
            return *native.signs_gradients(layout, grad, x, scale, ctx.how), None
        g = grad.to(compute_dtype(x.dtype))
        moved, sign = g * scale, quantize_to_signs.definition(x, torch.ones_like(scale))
        grad_x = moved
        if ctx.how:
            outside = (x > scale) | (x < -scale)
            grad_x = torch.where(outside, 0.0, moved)
            g = g + torch.where(outside, moved, 0.0)
        return grad_x.to(x.dtype), sum_to(g * sign, scale), None


@add_kernel(quantize_to_signs, "fused", may_fuse)
def _fused(*args: Any) -> Tensor:
    return apply(_Signs, *args)  # type: ignore[no-any-return]
