"""Rounding to minifloats in one differentiable step, which saves its input alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qframework.functional import (
    ROUNDINGS,
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
    may_fuse_anywhere,
    may_overwrite,
)
from qframework.kernels.integer import sum_to

#: What is left of a floating-point number without its significand, by its dtype.
_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def _power_below(x: Tensor) -> Tensor:
    """``2^floor(log2|x|)`` exactly; 0 for 0 and subnormal numbers, infinity for infinity, NaN."""
    integers, mask = _EXPONENT[x.dtype]
    return (x.view(integers) & mask).view(x.dtype)


class _Placed(NamedTuple):
    """Values on the unbounded grid.

    Attributes:
        q: the numbers.
        slope: how far they move with the values: 1 but for normal numbers.
        normal: whether they are.
    """

    q: Tensor
    slope: Callable[[], Tensor]
    normal: Callable[[], Tensor]


def _placed(v: Tensor, fmt: MinifloatFormat, rounding: str) -> _Placed:
    power = _power_below(v)
    smallest = 2.0 ** (1 - fmt.exponent_bias)
    unit = power.clamp_min(smallest) * 2.0**-fmt.mantissa_bits
    steps = v / unit
    whole = ROUNDINGS[rounding](steps)
    q = whole * unit
    q = q if fmt.saturates else torch.where(v.isinf(), v, q)

    def normal() -> Tensor:
        return (power >= smallest) & ~v.isnan()

    return _Placed(q, lambda: torch.where(normal(), whole / steps, 1.0), normal)


def _bounded(q: Tensor, fmt: MinifloatFormat) -> Tensor:
    bounded = q.clamp(-fmt.largest if fmt.signed else 0.0, fmt.largest)
    if fmt.saturates:
        return bounded
    if fmt.signed:
        bounded = torch.where(q < -fmt.largest, -fmt.overflow, bounded)
    return torch.where(q > fmt.largest, fmt.overflow, bounded)


def _outside(q: Tensor, fmt: MinifloatFormat, clamp_gradient: bool) -> Tensor:
    """Where what is bounded no longer moves with the value."""
    above = q > fmt.largest if clamp_gradient or not fmt.saturates else q > math.inf
    if not clamp_gradient and (fmt.saturates or not fmt.signed):
        return above
    return above | (q < (-fmt.largest if fmt.signed else 0.0))


def round_minifloats(x: Tensor, scale: Tensor | None, grid: MinifloatGrid) -> Tensor:
    """The values of :func:`~qframework.functional.minifloat_quantize`."""
    layout = _native_layout(x, scale, grid)
    if layout is not None:
        return native.quantize(layout, x, scale, None, grid, False)
    v = x.to(compute_dtype(x.dtype))
    v = v if scale is None else v / scale
    q = _bounded(_placed(v, grid.format, grid.rounding).q, grid.format)
    return (q if scale is None else q * scale).to(x.dtype)


def _native_layout(
    x: Tensor, scale: Tensor | None, grid: MinifloatGrid, g: Tensor | None = None
) -> native.Layout | None:
    shape = () if scale is None else tuple(scale.shape)
    return native.serves(x, shape, native.rounding_of(grid), scale, g=g)


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
    layout = _native_layout(x, scale, grid, grad)
    if layout is not None:
        return native.gradients(
            layout, grad, x, scale, None, grid, False, overwrite=overwrite
        )[:2]
    g = grad.to(compute_dtype(x.dtype))
    v = x.to(g.dtype)
    v = v if scale is None else v / scale
    q, slope, normal = _placed(v, fmt, rounding)
    inside = v.isinf() | ~_outside(q, fmt, clamp_gradient)
    grad_x = torch.where(inside, g * slope(), 0.0)
    grad_scale = None
    if scale is not None and need_scale:
        moved = torch.where(inside, torch.where(normal(), q, v), 0.0)
        grad_scale = sum_to(g * (_bounded(q, fmt) - moved), scale)
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
        found = minifloat_gradients(grad, x, scale, ctx.how, need_scale, overwrite)
        return found[0], found[1] if need_scale else None, None


@add_kernel(minifloat_quantize, "fused", may_fuse_anywhere)
def _fused(
    x: Tensor, scale: Tensor | None, format: MinifloatFormat, rounding: str, clamp_gradient: bool
) -> Tensor:
    return apply(_Minifloat, x, scale, MinifloatGrid(format, rounding, clamp_gradient))  # type: ignore[no-any-return]
