"""Quantize and dequantize in one differentiable step.

q = clamp(round(x / scale + zero_point), minimum, maximum);   y = (q - zero_point) * scale
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.straight_through import (
    ROUNDINGS,
    apply_step,
    tensor_clamp,
    tensor_clamp_ste,
)

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision can't hold the integers of 8 bits and a fraction: round in float32."""
    return torch.float32 if x.dtype in _LOW_PRECISION else x.dtype


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over broadcast axes in float64: a scale's gradient is a small difference of large sums."""
    if grad.shape == like.shape:
        return grad.to(like.dtype)
    return grad.double().sum_to_size(like.shape).to(like.dtype)


class _FakeQuantize(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        minimum: Tensor,
        maximum: Tensor,
        rounding: str,
        masked: bool,
    ) -> Tensor:
        q = ROUNDINGS[rounding](x.to(_compute_dtype(x)) / scale + zero_point)
        q = torch.clamp(q, minimum, maximum)
        return ((q - zero_point) * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero_point, minimum, maximum, ctx.rounding, ctx.masked = inputs
        ctx.save_for_backward(x, scale, zero_point, minimum, maximum)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, zero_point, minimum, maximum = ctx.saved_tensors
        need = ctx.needs_input_grad
        if not ctx.masked and not need[1]:
            return grad, None, None, None, None, None, None
        compute = _compute_dtype(x)
        wide, g = x.to(compute), grad.to(compute)
        exact = wide / scale + zero_point
        rounded = ROUNDINGS[ctx.rounding](exact)
        above, below = rounded > maximum, rounded < minimum
        grad_x: Tensor = grad
        grad_scale = grad_zero = grad_min = grad_max = None
        if ctx.masked:
            inside = ~(above | below)
            grad_x = grad * inside
            if need[2]:
                grad_zero = _sum_to(torch.where(inside, 0.0, -g * scale), zero_point)
            if need[3]:
                grad_min = _sum_to(torch.where(below, g * scale, 0.0), minimum)
            if need[4]:
                grad_max = _sum_to(torch.where(above, g * scale, 0.0), maximum)
        if need[1]:
            error = torch.clamp(rounded, minimum, maximum) - zero_point
            moved = exact - zero_point
            error = error - (torch.where(inside, moved, 0.0) if ctx.masked else moved)
            grad_scale = _sum_to(g * error, scale)
        return grad_x, grad_scale, grad_zero, grad_min, grad_max, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    rounding: str = "round",
    masked: bool = True,
) -> Tensor:
    """Quantize ``x`` to the grid ``(q - zero_point) * scale``, ``q`` in ``[minimum, maximum]``.

    Gradients: straight through the rounding. With ``masked`` the clamp is differentiated truly (``x`` gets
    the gradient inside, bounds, scale and zero point outside); without, ``x`` gets it everywhere and the
    bounds nothing.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``.
        zero_point: tensor in integer steps that broadcasts to ``x``.
        minimum: smallest integer, broadcasts to ``x``.
        maximum: largest integer, broadcasts to ``x``.
        rounding: a name of :data:`ROUNDINGS`.
        masked: which clamp gradient.

    Returns:
        Dequantized tensor with the shape and dtype of ``x``.
    """
    operands = (x, scale, zero_point, minimum, maximum, rounding, masked)
    if not torch.is_grad_enabled():
        return _FakeQuantize.forward(*operands)
    return _FakeQuantize.apply(*operands)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize_reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    rounding: str = "round",
    masked: bool = True,
) -> Tensor:
    """:func:`fake_quantize` composed of the plain straight-through functions; the tests hold them equal."""
    wide = x.to(_compute_dtype(x))
    q = apply_step(wide / scale + zero_point, rounding)
    q = (tensor_clamp if masked else tensor_clamp_ste)(q, minimum, maximum)
    return ((q - zero_point) * scale).to(x.dtype)
