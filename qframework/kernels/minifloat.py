"""Rounding to minifloats in one differentiable step, which saves its input alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    EXPONENTS,
    ROUNDINGS,
    MinifloatFormat,
    add_kernel,
    compute_dtype,
    minifloat_quantize,
)
from qframework.kernels.autograd import Context, Fused, apply, may_fuse_anywhere
from qframework.kernels.integer import sum_to


def _power_below(x: Tensor) -> Tensor:
    """``2^floor(log2|x|)`` exactly; 0 for 0 and subnormal numbers, infinity for infinity, NaN."""
    integers, mask = EXPONENTS[x.dtype]
    return (x.view(integers) & mask).view(x.dtype)


def _rounded(v: Tensor, fmt: MinifloatFormat, rounding: str) -> tuple[Tensor, Tensor]:
    """``v`` on the unbounded grid, and ``2^floor(log2|v|)``."""
    power = _power_below(v)
    unit = power.clamp_min(2.0 ** (1 - fmt.exponent_bias)) * 2.0**-fmt.mantissa_bits
    q = ROUNDINGS[rounding](v / unit) * unit
    return q if fmt.saturates else torch.where(v.isinf(), v, q), power


def _bounded(q: Tensor, fmt: MinifloatFormat) -> Tensor:
    bounded = q.clamp(-fmt.largest if fmt.signed else 0.0, fmt.largest)
    if fmt.saturates:
        return bounded
    if fmt.signed:
        bounded = torch.where(q < -fmt.largest, -fmt.overflow, bounded)
    return torch.where(q > fmt.largest, fmt.overflow, bounded)


class _Minifloat(Fused):
    tensors = (0, 1)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context,
        x: Tensor,
        scale: Tensor | None,
        format: MinifloatFormat,
        rounding: str,
        clamp_gradient: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.how = (format, rounding, clamp_gradient)
        v = x.to(compute_dtype(x.dtype))
        v = v if scale is None else v / scale
        q = _bounded(_rounded(v, format, rounding)[0], format)
        return (q if scale is None else q * scale).to(x.dtype)

    @staticmethod
    def define(ctx: Context, x: Tensor, scale: Any) -> Tensor:  # type: ignore[override]
        return minifloat_quantize.definition(x, scale, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        fmt, rounding, clamp_gradient = ctx.how
        g = grad.to(compute_dtype(x.dtype))
        v = x.to(g.dtype)
        v = v if scale is None else v / scale
        q, power = _rounded(v, fmt, rounding)
        normal = power >= 2.0 ** (1 - fmt.exponent_bias)
        inside = None
        grad_x = g * torch.where(normal, q / v, 1.0)
        if clamp_gradient:
            inside = (q.abs() if fmt.signed else q) <= fmt.largest
            inside = inside if fmt.signed else inside & (q >= 0)
            grad_x = torch.where(inside, grad_x, 0.0)
        grad_scale = None
        if scale is not None and ctx.needs_input_grad[1]:
            moved = torch.where(normal, q, v)
            moved = moved if inside is None else torch.where(inside, moved, 0.0)
            grad_scale = sum_to(g * (_bounded(q, fmt) - moved), scale)
        return grad_x.to(grad.dtype), grad_scale, None, None, None


@add_kernel(minifloat_quantize, "fused", may_fuse_anywhere)
def _fused(*args: Any) -> Tensor:
    return apply(_Minifloat, *args)  # type: ignore[no-any-return]
