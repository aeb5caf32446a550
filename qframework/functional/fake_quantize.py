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
    return grad.sum_to_size(like.shape) if grad.numel() < 2 else _wide_sum(grad, like)


def _wide_sum(grad: Tensor, like: Tensor) -> Tensor:
    lead = grad.dim() - like.dim()
    axes = list(range(lead))
    axes += [i + lead for i, n in enumerate(like.shape) if n == 1 and grad.shape[i + lead] != 1]
    return grad.sum(dim=axes, dtype=torch.float64).reshape(like.shape).to(like.dtype)


class _FixedRange(Function):
    """No zero point and bounds that are numbers: the common case, in as few passes as it takes.

    Saves the input alone. ``hardtanh_backward`` on the rounded value, with bounds half a step wider, is the
    masked gradient in one pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, minimum: float, maximum: float, rounding: str, masked: bool
    ) -> Tensor:
        q = ROUNDINGS[rounding](x.to(_compute_dtype(x)) / scale)
        return q.clamp_(minimum, maximum).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, *ctx.settings = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        minimum, maximum, rounding, masked = ctx.settings
        need_scale = ctx.needs_input_grad[1]
        if not (masked or need_scale):
            return grad, None, None, None, None, None
        compute = _compute_dtype(x)
        exact = x.to(compute) / scale
        rounded = ROUNDINGS[rounding](exact)
        wide, grad_x, grad_scale = grad.to(compute), grad, None
        if masked:
            wide_x = torch.ops.aten.hardtanh_backward(wide, rounded, minimum - 0.5, maximum + 0.5)
            grad_x = wide_x.to(grad.dtype)
        if need_scale:
            # inside q - x / scale, outside the bound: the clipped integer, less what x moves
            error = rounded.clamp(minimum, maximum).mul(wide)
            error = error - exact * (wide_x if masked else wide)
            grad_scale = _sum_to(error, scale)
        return grad_x, grad_scale, None, None, None, None


class _FakeQuantize(Function):
    """The general case: a zero point, bounds that are tensors, gradients for all of them."""

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
    zero_point: Tensor | None,
    minimum: Tensor | float,
    maximum: Tensor | float,
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
        zero_point: tensor in integer steps that broadcasts to ``x``; None for 0, which costs less.
        minimum: smallest integer: a tensor that broadcasts to ``x``, or without zero point a number.
        maximum: largest integer, likewise.
        rounding: a name of :data:`ROUNDINGS`.
        masked: which clamp gradient.

    Returns:
        Dequantized tensor with the shape and dtype of ``x``.
    """
    if zero_point is None and not isinstance(minimum, Tensor):
        fixed = (x, scale, minimum, maximum, rounding, masked)
        if not torch.is_grad_enabled():
            return _FixedRange.forward(*fixed)  # type: ignore[arg-type]
        return _FixedRange.apply(*fixed)  # type: ignore[no-any-return, no-untyped-call]
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    minimum, maximum = (
        b if isinstance(b, Tensor) else torch.as_tensor(b, dtype=scale.dtype, device=scale.device)
        for b in (minimum, maximum)
    )
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
