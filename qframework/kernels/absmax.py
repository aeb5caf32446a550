"""Values quantized by their own largest magnitude, in one differentiable step, for the whole tensor or per channel."""

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
    quantize_by_absmax,
    rows_of,
)
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, apply, may_fuse
from qframework.kernels.integer import quantize, sum_to
from qframework.kernels.scales import statistic_scale_slope, statistic_scale_values
from qframework.kernels.statistics import abs_max_values

_Found = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _native_layout(
    x: Tensor, grid: IntegerGrid, rule: ScaleRule, **gradients: Any
) -> native.Layout | None:
    if rule.channel_axis not in (None, 0):
        return None
    return native.serves(x, rule.shape, grid.rounding, **gradients)


def _values(x: Tensor, grid: IntegerGrid, rule: ScaleRule) -> _Found:
    """Values, scale, largest magnitudes and, per channel, where they are."""
    if rule.domain == "fp":
        layout = _native_layout(x, grid, rule)
        if layout is not None:
            return native.absmax(layout, x, grid, rule)
    where = None
    if rule.channel_axis is None:
        top = abs_max_values(x)
    else:
        top, where = rows_of(x, rule.channel_axis).abs().max(dim=1)
    top = top.to(compute_dtype(x.dtype))
    scale = statistic_scale_values(top, rule).reshape(rule.shape)
    return quantize(x, scale, None, grid), scale, top, where


class _QuantizeByAbsmax(Fused):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, grid: IntegerGrid, rule: ScaleRule
    ) -> tuple[Tensor, Tensor]:
        y, scale, top, where = _values(x, grid, rule)
        ctx.save_for_backward(x, scale, top, where)
        ctx.how = (grid, rule)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Any:  # type: ignore[override]
        return quantize_by_absmax.definition(x, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor | None, grad_scale: Tensor | None) -> Any:  # type: ignore[override]
        x, *found = ctx.saved_tensors
        g = torch.zeros_like(x) if grad is None else grad
        return _gradient(g, grad_scale, x, *found, *ctx.how), None, None


def _gradient(
    g: Tensor,
    grad_scale: Tensor | None,
    x: Tensor,
    scale: Tensor,
    top: Tensor,
    where: Tensor | None,
    grid: IntegerGrid,
    rule: ScaleRule,
) -> Tensor:
    """The gradient of ``x`` for those of its quantized values and of the scale."""
    layout = _native_layout(x, grid, rule, g=g, incoming=(grad_scale,))
    if layout is not None:
        slope = None if rule.domain == "fp" else statistic_scale_slope(top, rule)
        found = (scale, top, where, grad_scale, slope)
        return native.absmax_gradients(layout, g, x, *found, grid, rule)
    exact = x.to(compute_dtype(x.dtype)) / scale
    bounds: Any = (grid.minimum, grid.maximum)
    error = ROUNDINGS[grid.rounding](exact).clamp_(*bounds).sub_(exact).mul_(g)
    whole = sum_to(error, scale)
    whole = whole if grad_scale is None else whole + grad_scale
    grad_top = whole.reshape(top.shape) * statistic_scale_slope(top, rule)
    if where is not None:
        signs = rows_of(x, rule.channel_axis).gather(1, where.unsqueeze(1)).sign()
        return spread_rows(g, grad_top.reshape(-1, 1) * signs, where, rule.channel_axis)
    largest = x.abs().eq_(top.to(x.dtype))  # 1 and 0, without a boolean tensor
    count = largest.sum(dtype=top.dtype)
    share = torch.where(top > 0, grad_top / (count * top), 0.0)
    return largest.mul_(x).mul_(share).add_(g)


def spread_rows(g: Tensor, shares: Tensor, where: Tensor, channel_axis: int | None) -> Tensor:
    """``g``, and for each channel what is added to one of its elements.

    Args:
        g: of the shape of the weight.
        shares: one for each channel.
        where: the index of the element in its row, see :func:`~qframework.functional.rows_of`.
        channel_axis: of the channels.
    """
    assert channel_axis is not None
    out = g.clone(memory_format=torch.contiguous_format)
    where, values = where.unsqueeze(1), shares.reshape(-1, 1).to(g.dtype)
    if channel_axis == 0:
        out.view(out.shape[0], -1).scatter_add_(1, where, values)
        return out
    rows = rows_of(out, channel_axis)
    shape = out.transpose(0, channel_axis).shape
    return rows.scatter_add(1, where, values).view(shape).transpose(0, channel_axis)


@add_kernel(
    quantize_by_absmax, "fused", lambda w, grid, rule: may_fuse() and not grid.clamp_gradient
)
def _fused(w: Tensor, grid: IntegerGrid, rule: ScaleRule) -> Any:
    if not torch.is_grad_enabled():
        return _values(w, grid, rule)[:2]
    return apply(_QuantizeByAbsmax, w, grid, rule)
