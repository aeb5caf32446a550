"""Quantize and dequantize by a scale that is known, in few passes over memory; and its gradients.

q = clamp(round(x / scale + zero_point), minimum, maximum);   y = (q - zero_point) * scale
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    ROUNDINGS,
    IntegerGrid,
    add_kernel,
    compute_dtype,
    fake_quantize,
)
from qframework.kernels import native
from qframework.kernels.autograd import (
    Context,
    Fused,
    apply,
    is_compiling,
    may_fuse,
)
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import integer_layout, quantize


def sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over broadcast axes, in float64: a scale's gradient is a small sum of many numbers of both signs."""
    if grad.shape == like.shape:
        return grad.to(like.dtype)
    lead = grad.dim() - like.dim()
    axes = list(range(lead))
    axes += [i + lead for i, n in enumerate(like.shape) if n == 1 and grad.shape[i + lead] != 1]
    wide = grad.dtype if grad.device.type == "mps" else torch.float64
    if len(axes) == grad.dim() > 2 and is_compiling():
        # By channel first: so a compiler sums in the pass over memory that sums for norms and biases, too.
        channels = 1 if grad.dim() > 3 else grad.dim() - 1
        axes = [i for i in axes if i != channels]
        grad, axes = grad.sum(dim=axes, dtype=wide), [0]
    return grad.sum(dim=axes, dtype=wide).reshape(like.shape).to(like.dtype)


# ------------------------------------------------------------ values


def can_fuse_relu(zero_point: Tensor | None, grid: IntegerGrid) -> bool:
    """Whether clamping to the grid does what a ReLU in front would do, gradient included."""
    return (
        zero_point is None
        and isinstance(grid.minimum, (int, float))
        and grid.minimum == 0
        and grid.rounding == "round"
        and grid.clamp_gradient
    )


# ------------------------------------------------------------ gradients


def _first_outside(maximum: float, dtype: torch.dtype) -> float:
    """The smallest number that rounds, half to even, to an integer above ``maximum``."""
    half = maximum + 0.5
    step = 2.0 ** (math.frexp(half)[1] - (53 if dtype == torch.float64 else 24))
    if step > 0.5:
        return maximum + 1
    return half if maximum % 2 == 1 else half + step


def _widened(bound: float, sign: int, dtype: torch.dtype) -> float:
    """A number beyond an integer, and not beyond the next one that a dtype has; see :func:`_summands`."""
    return bound + sign * max(0.5, abs(bound) * torch.finfo(dtype).eps)


def quantize_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    relu: bool,
    *,
    need_scale: bool,
    need_zero: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of ``x``, scale and zero point for that of the result of :func:`quantize`; bounds are numbers."""
    if not (grid.clamp_gradient or need_scale):
        return grad, None, _no_gradient(zero_point, need_zero)
    layout = integer_layout(x, scale, zero_point, grid, grad)
    if layout is not None:
        return native.gradients(layout, grad, x, scale, zero_point, native.Scheme(grid, relu=relu))
    compute = compute_dtype(x.dtype)
    operands = (grad.to(compute), x.to(compute), scale, zero_point)
    needed: Any = (grid, relu, need_scale, need_zero and grid.clamp_gradient)
    grad_x, error, outside = _summands(*operands, *needed)
    grad_scale = sum_to(error, scale) if error is not None else None
    grad_zero = _no_gradient(zero_point, need_zero)
    if outside is not None and zero_point is not None:
        grad_zero = sum_to(outside * scale, zero_point)
    return grad_x.to(grad.dtype) if grid.clamp_gradient else grad, grad_scale, grad_zero


def _no_gradient(zero_point: Tensor | None, needed: bool) -> Tensor | None:
    """Of a zero point whose two places in the formula cancel out: 0, which optimizers treat otherwise than none."""
    return torch.zeros_like(zero_point) if needed and zero_point is not None else None


def _summands(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    relu: bool,
    need_scale: bool,
    need_zero: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of ``x``; summands of the scale's; summands of the zero point's, over the scale.

    The scale's summand is, inside, ``q - x / scale`` (the difference itself, since the sum of each part is large), outside
    the clipped integer. ``hardtanh_backward`` on the rounded value, with bounds half a step wider, masks in one pass and
    without a boolean tensor.
    """
    minimum: Any = grid.minimum
    maximum: Any = grid.maximum
    exact = x / scale
    shifted = exact if zero_point is None else exact + zero_point
    rounds_later = relu or grid.clips_first
    if grid.clips_first:
        place, low, high = shifted, minimum, maximum
    elif relu:
        place, low, high = shifted, 0.0, _first_outside(maximum, exact.dtype)
    else:
        place = ROUNDINGS[grid.rounding](shifted)
        low, high = _widened(minimum, -1, place.dtype), _widened(maximum, 1, place.dtype)
    grad_x, inside = g, torch.ops.aten.hardtanh_backward
    if grid.clamp_gradient:
        grad_x = inside(g, place, low, high)
    outside = grad_x - g if need_zero else None
    if not need_scale:
        return grad_x, None, outside
    moved = inside(exact, place, low, high) if grid.clamp_gradient else exact
    q = ROUNDINGS[grid.rounding](place) if rounds_later else place
    q = q.clamp_(minimum, maximum)
    error = (q if zero_point is None else q.sub_(zero_point)).sub_(moved)
    return grad_x, error.mul_(g), outside


def _learned_bounds_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``x``, scale, zero point and both bounds, which are tensors."""
    minimum: Any = grid.minimum
    maximum: Any = grid.maximum
    compute = compute_dtype(x.dtype)
    g = grad.to(compute)
    exact = x.to(compute) / scale
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    shifted = exact + zero
    rounded = ROUNDINGS[grid.rounding](shifted)
    if grid.clips_first:
        above, below = shifted >= maximum, shifted <= minimum
    else:
        above, below = rounded > maximum, rounded < minimum
    inside = ~(above | below)
    found: list[Tensor | None] = [grad, None, _no_gradient(zero_point, need[2]), None, None]
    if grid.clamp_gradient:
        found[0] = grad * inside
        if need[2] and zero_point is not None:
            found[2] = sum_to(torch.where(inside, 0.0, -g * scale), zero_point)
        if need[3]:
            found[3] = sum_to(torch.where(below, g * scale, 0.0), minimum)
        if need[4]:
            found[4] = sum_to(torch.where(above, g * scale, 0.0), maximum)
    if need[1]:
        moved = torch.where(inside, exact, 0.0) if grid.clamp_gradient else exact
        found[1] = sum_to(g * (torch.clamp(rounded, minimum, maximum) - zero - moved), scale)
    return tuple(found)


# ------------------------------------------------------------ the functions


class _FakeQuantize(Fused):
    """Bounds that are numbers: the common case."""

    tensors = (0, 1, 2)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        grid: IntegerGrid,
        relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.how = (grid, relu)
        return quantize(x, scale, zero_point, grid, relu)

    @staticmethod
    def define(ctx: Context, x: Tensor, scale: Tensor, zero_point: Any) -> Any:  # type: ignore[override]
        grid, relu = ctx.how
        return fake_quantize.definition(x, scale, zero_point, grid, relu)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        _, need_scale, need_zero, _, _ = ctx.needs_input_grad
        x, scale, zero_point = ctx.saved_tensors
        found = quantize_gradients(
            native.laid_out_as(grad, x),
            x,
            scale,
            zero_point,
            *ctx.how,
            need_scale=need_scale,
            need_zero=need_zero,
        )
        return *found, None, None


class _LearnedBounds(Fused):
    """Bounds that are tensors, as those of learned widths are; gradients for all operands."""

    tensors = (0, 1, 2, 3, 4)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: Tensor,
        maximum: Tensor,
        rounding: str,
        clamp_gradient: bool,
        clips_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, minimum, maximum)
        ctx.how = (rounding, clamp_gradient, clips_first)
        return quantize(x, scale, zero_point, IntegerGrid(minimum, maximum, rounding))

    @staticmethod
    def define(ctx: Context, x: Any, scale: Any, zero_point: Any, *bounds: Any) -> Any:  # type: ignore[override]
        return fake_quantize.definition(x, scale, zero_point, IntegerGrid(*bounds, *ctx.how))

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, zero_point, minimum, maximum = ctx.saved_tensors
        grid = IntegerGrid(minimum, maximum, *ctx.how)
        needed = ctx.needs_input_grad[:5]
        found = _learned_bounds_gradients(grad, x, scale, zero_point, grid, needed)
        return *found, None, None, None


@add_kernel(fake_quantize, "fused", may_fuse)
def _fused(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: IntegerGrid, relu: bool
) -> Tensor:
    if relu and not can_fuse_relu(zero_point, grid):
        x, relu = torch.relu(x), False
    if isinstance(grid.minimum, Tensor):
        bounds = grid.minimum, grid.maximum
        how: Any = (grid.rounding, grid.clamp_gradient, grid.clips_first)
        return apply(_LearnedBounds, x, scale, zero_point, *bounds, *how)  # type: ignore[no-any-return]
    y = apply(_FakeQuantize, x, scale, zero_point, grid, relu)
    return note_origin(y, x, scale, zero_point, native.Scheme(grid, relu=relu))
