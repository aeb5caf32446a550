"""A weight quantized by its own largest magnitude, in one differentiable step.

scale = max |w| / threshold in its domain, y = clamp(round(w / scale)) * scale, for the whole tensor or per channel
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional import compiled, native
from qframework.functional.autograd import apply, keep, kept, transforms_active
from qframework.functional.fixed_range import (
    SLICE,
    _FixedRange,
    compute_dtype,
    kernels_of,
    total,
)
from qframework.functional.scale import _StatisticScale
from qframework.functional.statistics import _AbsMax, _rows
from qframework.functional.straight_through import ROUNDINGS


class LargestScaled(NamedTuple):
    """How a weight is quantized by its largest magnitude.

    Attributes:
        minimum, maximum: smallest and largest integer.
        rounding: a name of :data:`~qframework.functional.ROUNDINGS`.
        domain, exponent_rounding, scale_minimum: of the scale, see :func:`~qframework.functional.statistic_scale`.
        scale_shape: shape of the scale; of one element for the whole tensor.
        order: of the axes that brings the channels first; None where they are.
    """

    minimum: float
    maximum: float
    rounding: str
    domain: str
    exponent_rounding: str
    scale_minimum: float | None
    scale_shape: tuple[int, ...]
    order: tuple[int, ...] | None
    per_channel: bool


class _LargestScaled(Function):
    @staticmethod
    def forward(x: Tensor, threshold: Tensor, how: LargestScaled) -> tuple[Tensor, Tensor, Any]:
        layout = _native_layout(x, threshold, how)
        if layout is not None and how.domain == "fp":
            y, scale, *found = native.largest(
                layout,
                x,
                how.scale_shape,
                how.per_channel,
                threshold,
                how.scale_minimum,
                *how[:3],
            )
            return y, scale, tuple(found)
        where = None
        if how.per_channel:
            top, where = _rows(x, how.order).abs().max(dim=1)
        else:
            top = _AbsMax.forward(x)
        top = top.to(compute_dtype(x))
        domain = (how.domain, how.exponent_rounding, how.scale_minimum)
        scale = _StatisticScale.forward(top, threshold, *domain).reshape(how.scale_shape)
        fixed = (how.minimum, how.maximum, how.rounding, False, False)
        return _FixedRange.forward(x, scale, None, *fixed), scale, (top, where)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, threshold, ctx.how = inputs
        keep(ctx, x, threshold, always=True)
        ctx.top, ctx.where = output[2]
        ctx.scale = output[1].detach()
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        x, threshold = kept(ctx)
        g = torch.zeros_like(x) if grad is None else grad
        found = (ctx.scale, ctx.top, ctx.where)
        return largest_gradient(g, grad_scale, x, threshold, *found, ctx.how), None, None


def largest_gradient(
    g: Tensor,
    grad_scale: Tensor | None,
    x: Tensor,
    threshold: Tensor,
    scale: Tensor,
    top: Tensor,
    where: Tensor | None,
    how: LargestScaled,
) -> Tensor:
    """The gradient of a weight for those of its quantized values and of the scale; ``top`` and ``where`` as found forwards."""
    kernels = flat = None
    count: Any = None
    layout = _native_layout(x, threshold, how, g=g, incoming=(grad_scale,))
    if layout is not None:
        slope = None if how.domain == "fp" else slope_of(top, threshold, how)
        operands: Any = (grad_scale, slope, threshold, how.scale_minimum, *how[:3])
        return native.largest_gradients(layout, g, x, scale, top, where, *operands)
    if compiled.wants_compiled(x, scale, g):
        kernels = kernels_of(x, scale, how.minimum, how.maximum, how.rounding)
    if kernels is not None and how.per_channel:
        whole = kernels.scale_gradient(g, x, scale)
    elif kernels is not None:
        whole, count = kernels.largest_gradient(g, x, scale, top)
    else:
        rows, flat = _sliced(x, g, scale, how)
        sums = [_scale_error(piece, s, upstream, how) for piece, upstream, s in rows]
        whole = torch.cat(sums) if how.per_channel else total(sums)
        whole = whole.reshape(scale.shape).to(scale.dtype)
    whole = whole if grad_scale is None else whole + grad_scale
    grad_top = whole.reshape(top.shape) * slope_of(top, threshold, how)
    if where is not None:
        signs = _rows(x, how.order).gather(1, where.unsqueeze(1)).sign()
        return spread_rows(g, grad_top.reshape(-1, 1) * signs, where, how.order)
    if kernels is not None:
        return kernels.spread(g, x, top, torch.where(top > 0, grad_top / count, 0.0))
    return _spread_evenly(x, g, grad_top, top, flat)


def _native_layout(
    x: Tensor, threshold: Tensor, how: LargestScaled, **gradients: Any
) -> native.Layout | None:
    if how.order is not None:
        return None
    return native.serves(x, how.scale_shape, how.rounding, threshold, **gradients)


def slope_of(top: Tensor, threshold: Tensor, how: LargestScaled) -> Tensor:
    """The derivative of the scale by the largest magnitude."""
    if how.domain == "fp":
        one = torch.ones_like(top) if how.scale_minimum else top.sign()
        return one / threshold
    domain = (how.domain, how.exponent_rounding, how.scale_minimum)
    v = top.clamp_min(how.scale_minimum) if how.scale_minimum else top
    return _StatisticScale.forward(top, threshold, *domain) / v


def _scale_error(x: Tensor, scale: Tensor, g: Tensor, how: LargestScaled) -> Tensor:
    """The scale's gradient, ``sum g (q - x / scale)``: 0-dim, or one number per channel."""
    exact = x.to(compute_dtype(x)) / scale
    error = ROUNDINGS[how.rounding](exact).clamp_(how.minimum, how.maximum).sub_(exact)
    error = error * g if transforms_active(g) else error.mul_(g)
    return _rows(error, how.order).sum(1) if how.per_channel else error.sum()


def _sliced(x: Tensor, g: Tensor, scale: Tensor, how: LargestScaled) -> tuple[Any, Any]:
    """Slices that stay in the cache of a CPU core, with their scales; the flat tensors where there are any."""
    whole = [(x, g, scale)]
    if x.device.type != "cpu" or x.numel() < 2 * SLICE or transforms_active(g):
        return whole, None
    if how.per_channel:
        if how.order is not None:
            return whole, None
        count = max(1, SLICE // x[0].numel())
        return zip(x.split(count), g.split(count), scale.split(count), strict=True), None
    if not (x.is_contiguous() and g.is_contiguous()):
        return whole, None
    flat = (x.view(-1), g.view(-1))
    return _with_scale(flat, scale.reshape(())), flat


def _with_scale(flat: tuple[Tensor, Tensor], scale: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for x, g in zip(flat[0].split(SLICE), flat[1].split(SLICE), strict=True):
        yield x, g, scale


def _spread_evenly(x: Tensor, g: Tensor, grad_top: Tensor, top: Tensor, flat: Any) -> Tensor:
    """``g``, and the gradient of the largest magnitude shared by the elements that have it."""
    if flat is None:
        largest = x.abs().eq_(top.to(x.dtype))
        count = largest.sum(dtype=top.dtype)
        share = torch.where(top > 0, grad_top / (count * top), 0.0)
        largest = largest.mul_(x)
        return g + largest * share if transforms_active(g) else largest.mul_(share).add_(g)
    out = torch.empty_like(x)
    pieces = [(*p, o) for p, o in zip(_pairs(flat), out.view(-1).split(SLICE), strict=True)]
    top = top.to(x.dtype)
    counts = [torch.abs(x, out=o).eq_(top).sum(dtype=grad_top.dtype) for x, _, o in pieces]
    share = torch.where(top > 0, grad_top / (torch.stack(counts).sum() * top), 0.0)
    for x_piece, g_piece, o in pieces:
        o.mul_(x_piece).mul_(share).add_(g_piece)
    return out


def _pairs(flat: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(flat[0].split(SLICE), flat[1].split(SLICE), strict=True)


def spread_rows(g: Tensor, shares: Tensor, where: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """``g``, and for each channel what is added to one of its elements."""
    where, values = where.unsqueeze(1), shares.reshape(-1, 1).to(g.dtype)
    if order is None and not transforms_active(g, shares):
        out = g.clone(memory_format=torch.contiguous_format)
        out.view(out.shape[0], -1).scatter_add_(1, where, values)
        return out
    rows = _rows(g, order)
    # Made of the shares, so that it is as many as they are.
    spread = values.new_zeros(rows.shape).scatter_(1, where, values)
    if order is None:
        return g + spread.view(g.shape)
    back = [order.index(axis) for axis in range(g.dim())]
    return g + spread.view([g.shape[axis] for axis in order]).permute(back)


def quantize_by_largest(x: Tensor, threshold: Tensor, how: LargestScaled) -> tuple[Tensor, Tensor]:
    """Quantize a weight by its largest magnitude.

    The gradient passes to ``x`` unchanged, and through the scale to the elements of the largest magnitude.

    Args:
        x: the weight.
        threshold: positive integer that the magnitude is divided by, 0-dim, without a gradient.
        how: range, rounding, domain, granularity.

    Returns:
        Dequantized values in the shape and dtype of ``x``, and the scale.
    """
    return apply(_LargestScaled, x, threshold, how)[:2]  # type: ignore[no-any-return]
