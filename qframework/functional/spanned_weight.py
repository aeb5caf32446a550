"""A weight quantized by its own range, zero point included, in one differentiable step.

scale = (max(w, 0) - min(w, 0)) / threshold in its domain, zero point = -min(w, 0) / scale + minimum, rounded and clamped,
for the whole tensor or per channel
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional import native
from qframework.functional.autograd import apply, keep, kept, transforms_active
from qframework.functional.fixed_range import _FixedRange, compute_dtype, sum_to
from qframework.functional.scale import _StatisticScale
from qframework.functional.statistics import _rows
from qframework.functional.straight_through import ROUNDINGS
from qframework.functional.weight import LargestScaled, slope_of, spread_rows


def _extremes(x: Tensor, how: LargestScaled) -> tuple[Tensor, Tensor, Any]:
    """Largest and smallest element, and where they are in their channel."""
    if not how.per_channel:
        low, high = x.aminmax()
        return high, low, (None, None)
    rows = _rows(x, how.order)
    (high, at_high), (low, at_low) = rows.max(dim=1), rows.min(dim=1)
    return high, low, (at_high, at_low)


class _SpanScaled(Function):
    @staticmethod
    def forward(
        x: Tensor, threshold: Tensor, how: LargestScaled
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        high, low, where = _extremes(x, how)
        high, low = high.to(compute_dtype(x)), low.to(compute_dtype(x))
        zero = torch.zeros_like(low)
        offset = -torch.where(low <= 0, low, zero)
        span = torch.where(high >= 0, high, zero) + offset
        settings = (how.domain, how.exponent_rounding, how.scale_minimum)
        scale = _StatisticScale.forward(span, threshold, *settings)
        shift = ROUNDINGS[how.rounding](offset / scale + how.minimum)
        shift = shift.clamp(how.minimum, how.maximum).reshape(how.scale_shape)
        scale = scale.reshape(how.scale_shape)
        fixed = (how.minimum, how.maximum, how.rounding, False, False)
        return _FixedRange.forward(x, scale, shift, *fixed), scale, shift, (high, low, where)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, threshold, ctx.how = inputs
        keep(ctx, x, threshold, always=True)
        ctx.ends = output[3]
        ctx.scale, ctx.shift = (t.detach().clone() for t in output[1:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any,
        grad: Tensor | None,
        grad_scale: Tensor | None,
        grad_shift: Tensor | None,
        _: Any,
    ) -> Any:  # type: ignore[override]
        x, threshold = kept(ctx)
        how, scale, shift = ctx.how, ctx.scale, ctx.shift
        high, low, where = ctx.ends
        g = torch.zeros_like(x) if grad is None else grad
        # The zero point moves values by a step there and back: it gets nothing from them.
        incoming = (grad_scale, grad_shift)
        layout = native.serves(x, scale.shape, how.rounding, scale, shift, g=g, incoming=incoming)
        if layout is not None:
            fixed = (how.minimum, how.maximum, how.rounding, False, False)
            whole = native.gradients(layout, g, x, scale, shift, *fixed)[1]
        else:
            exact = x.to(scale.dtype) / scale
            error = ROUNDINGS[how.rounding](exact + shift).clamp_(how.minimum, how.maximum)
            error = error.sub_(shift).sub_(exact)
            del exact
            whole = sum_to(error * g if transforms_active(g) else error.mul_(g), scale)
        whole = whole if grad_scale is None else whole + grad_scale
        to_low = torch.zeros_like(low)
        if grad_shift is not None:
            by_offset = grad_shift / scale
            offset = -torch.where(low <= 0, low, torch.zeros_like(low)).reshape(scale.shape)
            whole = whole - by_offset * offset / scale
            to_low = -by_offset.reshape(low.shape)
        zero = torch.zeros_like(low)
        span = torch.where(high >= 0, high, zero) - torch.where(low <= 0, low, zero)
        by_span = whole.reshape(span.shape) * slope_of(span, threshold, how)
        shares = (
            torch.where(high >= 0, by_span, zero),
            torch.where(low <= 0, to_low - by_span, zero),
        )
        if how.per_channel:
            for share, at in zip(shares, where, strict=True):
                g = spread_rows(g, share, at, how.order)
            return g, None, None
        if layout is not None:
            values, parts = torch.stack((high, low)), torch.stack(shares)
            return native.spread(g, x, values, parts), None, None
        return _spread(g, x, zip(shares, (high, low), strict=True), error), None, None


def _spread(g: Tensor, x: Tensor, ends: Any, memory: Tensor) -> Tensor:
    """``g``, and what is shared by all elements that are as large as each of the ends.

    Args:
        g: the gradient from behind.
        x: the weight.
        ends: pairs of what is shared, and the value of the elements that share it.
        memory: of the weight's shape, to write into.
    """
    out = None
    for share, end in ends:
        if transforms_active(g):
            places = x.eq(end.to(x.dtype)).to(x.dtype)
        else:
            places = memory.copy_(x).eq_(end)  # 1 and 0, without a boolean tensor
        each = share / places.sum(dtype=share.dtype)
        if out is None:
            out = torch.addcmul(g, places.to(g.dtype), each.to(g.dtype))
        else:
            out.addcmul_(places.to(g.dtype), each.to(g.dtype))
    assert out is not None
    return out


def quantize_by_span(
    x: Tensor, threshold: Tensor, how: LargestScaled
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight by its range.

    The gradient passes to ``x`` unchanged, and through the scale to the largest and the smallest elements.

    Args:
        x: the weight.
        threshold: positive integer that the range is divided by, 0-dim, without a gradient.
        how: range of integers, rounding, domain, granularity.

    Returns:
        Dequantized values in the shape and dtype of ``x``, scale and zero point.
    """
    return apply(_SpanScaled, x, threshold, how)[:3]  # type: ignore[no-any-return]
