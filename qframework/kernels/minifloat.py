"""Rounding to minifloats in one differentiable step, which saves its input alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    MinifloatFormat,
    MinifloatGrid,
    add_kernel,
    compute_dtype,
    minifloat_quantize,
)
from qframework.kernels import native
from qframework.kernels.autograd import (
    Context,
    Fused,
    apply,
    may_fuse,
    may_overwrite,
)
from qframework.kernels.integer import sum_to
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import bounded, minifloat_layout, outside, placed, round_minifloats


def minifloat_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    grid: MinifloatGrid,
    need_scale: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of values and scale for that of the result of :func:`round_minifloats`."""
    fmt, rounding, clamp_gradient = grid
    layout = minifloat_layout(x, scale, grid, grad)
    if layout is not None:
        scheme = native.Scheme(grid)
        return native.gradients(layout, grad, x, scale, None, scheme, overwrite=overwrite)[:2]
    g = grad.to(compute_dtype(x.dtype))
    v = x.to(g.dtype)
    v = v if scale is None else v / scale
    q, slope, normal = placed(v, fmt, rounding)
    inside = v.isinf() | ~outside(q, fmt, clamp_gradient)
    grad_x = torch.where(inside, g * slope(), 0.0)
    grad_scale = None
    if scale is not None and need_scale:
        moved = torch.where(inside, torch.where(normal(), q, v), 0.0)
        grad_scale = sum_to(g * (bounded(q, fmt) - moved), scale)
    return grad_x.to(grad.dtype), grad_scale


class _Minifloat(Fused):
    tensors = (0, 1)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, scale: Tensor | None, grid: MinifloatGrid
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.how = grid
        return round_minifloats(x, scale, grid)

    @staticmethod
    def define(ctx: Context, x: Tensor, scale: Any) -> Tensor:  # type: ignore[override]
        return minifloat_quantize.definition(x, scale, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        overwrite, need_scale = may_overwrite(grad, x), ctx.needs_input_grad[1]
        found = minifloat_gradients(
            native.laid_out_as(grad, x), x, scale, ctx.how, need_scale, overwrite
        )
        return found[0], found[1] if need_scale else None, None


@add_kernel(minifloat_quantize, "fused", may_fuse)
def _fused(
    x: Tensor, scale: Tensor | None, format: MinifloatFormat, rounding: str, clamp_gradient: bool
) -> Tensor:
    grid = MinifloatGrid(format, rounding, clamp_gradient)
    return note_origin(apply(_Minifloat, x, scale, grid), x, scale, None, native.Scheme(grid))
