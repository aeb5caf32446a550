"""Values quantized by their own range, zero point included, in one differentiable step, for the whole tensor or per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    ROUNDINGS,
    IntegerGrid,
    ScaleRule,
    add_kernel,
    compute_dtype,
    quantize_by_minmax,
    rows_of,
)
from qframework.kernels import native
from qframework.kernels.absmax import spread_rows
from qframework.kernels.autograd import Context, Fused, apply, may_fuse, may_overwrite
from qframework.kernels.integer import sum_to
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import quantize
from qframework.kernels.scales import statistic_scale_slope, statistic_scale_values


def _extremes(x: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    """Largest and smallest element, and where they are in their channel."""
    if rule.channel_axis is None:
        low, high = x.aminmax()
        return high, low, (None, None)
    rows = rows_of(x, rule.channel_axis)
    (high, at_high), (low, at_low) = rows.max(dim=1), rows.min(dim=1)
    return high, low, (at_high, at_low)


def _values(x: Tensor, grid: IntegerGrid, rule: ScaleRule) -> tuple[Any, ...]:
    """Values, scale, zero point; ends of the range and where they are."""
    minimum: Any = grid.minimum
    maximum: Any = grid.maximum
    high, low, where = _extremes(x, rule)
    high, low = high.to(compute_dtype(x.dtype)), low.to(compute_dtype(x.dtype))
    zero = torch.zeros_like(low)
    offset = -torch.where(low > 0, zero, low)
    scale = statistic_scale_values(torch.where(high < 0, zero, high) + offset, rule)
    shift = ROUNDINGS[grid.rounding](offset / scale + minimum).clamp(minimum, maximum)
    scale, shift = scale.reshape(rule.shape), shift.reshape(rule.shape)
    return quantize(x, scale, shift, grid), scale, shift, high, low, *where


class _QuantizeByMinmax(Fused):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, grid: IntegerGrid, rule: ScaleRule
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, scale, shift, *ends = _values(x, grid, rule)
        ctx.save_for_backward(x, scale, shift, *ends)
        ctx.how = (grid, rule)
        ctx.set_materialize_grads(False)
        return y, scale, shift

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Any:  # type: ignore[override]
        return quantize_by_minmax.definition(x, *ctx.how)

    @staticmethod
    def gradients(  # type: ignore[override]
        ctx: Context, grad: Tensor | None, grad_scale: Tensor | None, grad_shift: Tensor | None
    ) -> Any:
        x, scale, shift, high, low, *where = ctx.saved_tensors
        grid, rule = ctx.how
        overwrite = grad is None or may_overwrite(grad, x)
        g = torch.zeros_like(x) if grad is None else native.laid_out_as(grad, x)
        # The zero point moves values by a step there and back: it gets nothing from them.
        error = None
        incoming = (grad_scale, grad_shift)
        layout = native.serves(x, scale.shape, grid.rounding, scale, shift, g=g, incoming=incoming)
        if layout is not None:
            whole: Any = native.gradients(layout, g, x, scale, shift, native.Scheme(grid))[1]
        else:
            exact = x.to(scale.dtype) / scale
            error = ROUNDINGS[grid.rounding](exact + shift).clamp_(grid.minimum, grid.maximum)
            error = error.sub_(shift).sub_(exact)
            whole = sum_to(error.mul_(g), scale)
        whole = whole if grad_scale is None else whole + grad_scale
        to_low, zero = torch.zeros_like(low), torch.zeros_like(low)
        if grad_shift is not None:
            by_offset = grad_shift / scale
            offset = -torch.where(low > 0, zero, low).reshape(scale.shape)
            whole = whole - by_offset * offset / scale
            to_low = -by_offset.reshape(low.shape)
        span = torch.where(high < 0, zero, high) - torch.where(low > 0, zero, low)
        by_span = whole.reshape(span.shape) * statistic_scale_slope(span, rule)
        shares = (
            torch.where(high < 0, zero, by_span),
            torch.where(low > 0, zero, to_low - by_span),
        )
        if rule.channel_axis is not None:
            for share, at in zip(shares, where, strict=True):
                g = spread_rows(g, share, at, rule.channel_axis)
            return g, None, None
        if layout is not None:
            values, parts = torch.stack((high, low)), torch.stack(shares)
            return native.spread(g, x, values, parts, overwrite), None, None
        return _spread(g, x, shares, (high, low), error), None, None


def _spread(g: Tensor, x: Tensor, shares: Any, ends: Any, memory: Any) -> Tensor:
    """``g``, and each share divided by all elements that are as large as its end of the range.

    Args:
        g: the gradient from behind.
        x: the weight.
        shares: of the gradient of each end.
        ends: largest and smallest element.
        memory: of the weight's shape, to write into.
    """
    out = g
    for share, end in zip(shares, ends, strict=True):
        places = memory.copy_(x).eq_(end)  # 1 and 0, without a boolean tensor
        each = share / places.sum(dtype=share.dtype)
        out = torch.addcmul(out, places.to(g.dtype), each.to(g.dtype))
    return out


@add_kernel(
    quantize_by_minmax, "fused", lambda w, grid, rule: may_fuse() and not grid.clamp_gradient
)
def _fused(w: Tensor, grid: IntegerGrid, rule: ScaleRule) -> Any:
    if not torch.is_grad_enabled():
        return _values(w, grid, rule)[:3]
    y, scale, zero_point = apply(_QuantizeByMinmax, w, grid, rule)
    return note_origin(y, w, scale, zero_point, native.Scheme(grid)), scale, zero_point
