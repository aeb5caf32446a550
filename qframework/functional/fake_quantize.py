"""Quantize and dequantize in one differentiable step.

q = clamp(round(x / scale + zero_point), minimum, maximum);   y = (q - zero_point) * scale
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.autograd import apply, is_fused, keep, kept
from qframework.functional.fixed_range import _FixedRange, can_rectify, compute_dtype, sum_to
from qframework.functional.native.prepared import Prepared
from qframework.functional.origin import note
from qframework.functional.straight_through import (
    ROUNDINGS,
    apply_step,
    tensor_clamp,
    tensor_clamp_ste,
)
from qframework.functional.traced_range import traced_range


class _FakeQuantize(Function):
    """The general case: bounds that are tensors, gradients for all operands."""

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
        q = ROUNDINGS[rounding](x.to(compute_dtype(x)) / scale + zero_point)
        q = torch.clamp(q, minimum, maximum)
        return ((q - zero_point) * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero_point, minimum, maximum, ctx.rounding, ctx.masked = inputs
        keep(ctx, x, scale, zero_point, minimum, maximum)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, zero_point, minimum, maximum = kept(ctx)
        need = ctx.needs_input_grad
        if not ctx.masked and not need[1]:
            return grad, None, None, None, None, None, None
        compute = compute_dtype(x)
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
                grad_zero = sum_to(torch.where(inside, 0.0, -g * scale), zero_point)
            if need[3]:
                grad_min = sum_to(torch.where(below, g * scale, 0.0), minimum)
            if need[4]:
                grad_max = sum_to(torch.where(above, g * scale, 0.0), maximum)
        if need[1]:
            error = torch.clamp(rounded, minimum, maximum) - zero_point
            moved = exact - zero_point
            error = error - (torch.where(inside, moved, 0.0) if ctx.masked else moved)
            grad_scale = sum_to(g * error, scale)
        return grad_x, grad_scale, grad_zero, grad_min, grad_max, None, None


_is_compiling = torch.compiler.is_compiling


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | float,
    maximum: Tensor | float,
    rounding: str = "round",
    masked: bool = True,
    rectify: bool = False,
) -> Tensor:
    """Quantize ``x`` to the grid ``(q - zero_point) * scale``, ``q`` in ``[minimum, maximum]``.

    Gradients: straight through the rounding. With ``masked`` the clamp is differentiated truly (``x`` gets
    the gradient inside, bounds, scale and zero point outside); without, ``x`` gets it everywhere and the
    bounds nothing.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``.
        zero_point: tensor in integer steps that broadcasts to ``x``; None for 0, which costs less.
        minimum: smallest integer: a number, which costs less, or a tensor that broadcasts to ``x``.
        maximum: largest integer, likewise.
        rounding: a name of :data:`ROUNDINGS`.
        masked: which clamp gradient.
        rectify: quantize ``relu(x)``, without computing it where :func:`can_rectify` allows that.

    Returns:
        Dequantized tensor with the shape and dtype of ``x``.
    """
    fixed = not isinstance(minimum, Tensor) and not isinstance(maximum, Tensor)
    if rectify and not (fixed and can_rectify(zero_point, minimum, rounding, masked)):
        x, rectify = torch.relu(x), False
    if fixed and is_fused():
        if _is_compiling() and not torch.compiler.is_exporting():
            return traced_range(x, scale, zero_point, minimum, maximum, rounding, masked, rectify)
        how = (minimum, maximum, rounding, masked, rectify)
        y: Tensor = apply(_FixedRange, x, scale, zero_point, *how)
        note(y, x, scale, zero_point, how)
        return y
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    minimum, maximum = (
        b if isinstance(b, Tensor) else torch.as_tensor(b, dtype=scale.dtype, device=scale.device)
        for b in (minimum, maximum)
    )
    if not is_fused():
        x = torch.relu(x) if rectify else x
        return fake_quantize_reference(x, scale, zero_point, minimum, maximum, rounding, masked)
    return apply(_FakeQuantize, x, scale, zero_point, minimum, maximum, rounding, masked)  # type: ignore[no-any-return]


class FixedStep:
    """:func:`fake_quantize` by one scale and range, with arguments of it, to be called with ``x`` and ``rectify``."""

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: float,
        maximum: float,
        rounding: str,
        masked: bool,
    ) -> None:
        self._how: Any = (scale, zero_point, minimum, maximum, rounding, masked)
        self._rectifies = can_rectify(zero_point, minimum, rounding, masked)
        self._prepared: Prepared | None = None

    def __call__(self, x: Tensor, rectify: bool = False) -> Tensor:
        """Quantize ``x``."""
        prepared, grows = self._prepared, torch.is_grad_enabled()
        if prepared is not None and not grows and (self._rectifies or not rectify):
            y = prepared(x, rectify)
            if y is not None:
                return y
        if grows or (rectify and not self._rectifies) or _is_compiling() or not is_fused():
            return fake_quantize(x, *self._how, rectify)  # type: ignore[call-arg]
        if prepared is None:
            self._prepared = Prepared.for_values(x, *self._how[:5])
        return _FixedRange.forward(x, *self._how, rectify)  # type: ignore[call-arg]


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
    wide = x.to(compute_dtype(x))
    q = apply_step(wide / scale + zero_point, rounding)
    q = (tensor_clamp if masked else tensor_clamp_ste)(q, minimum, maximum)
    return ((q - zero_point) * scale).to(x.dtype)
