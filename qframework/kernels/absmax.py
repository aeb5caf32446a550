"""Values quantized by their own largest magnitude, in one differentiable step: of the tensor, or of each channel, row or group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    ROUNDINGS,
    IntegerGrid,
    MinifloatGrid,
    ScaleRule,
    add_kernel,
    compute_dtype,
    quantize_by_absmax,
    rows_of,
)
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, is_grad_enabled, may_fuse, may_overwrite
from qframework.kernels.integer import sum_to
from qframework.kernels.minifloat import minifloat_gradients
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import quantize_as
from qframework.kernels.scales import statistic_scale_slope, statistic_scale_values
from qframework.kernels.statistics import abs_max_values

Grid = IntegerGrid | MinifloatGrid


def _native_layout(
    x: Tensor, scheme: native.Scheme, *numbers: Tensor, **gradients: Any
) -> native.Layout | None:
    rule: Any = scheme.rule
    shape = rule.shape
    if not scheme.is_whole:
        if rule.channel_axis not in (None, 0):
            return None
        if rule.reduced_axis is not None:
            if rule.reduced_axis not in (-1, x.dim() - 1):
                return None
            shape = native.row_shape(x)
    return native.serves(x, shape, scheme.rounding, *numbers, **gradients)


def _axis_to_move(x: Tensor, scheme: native.Scheme) -> int | None:
    """The axis of groups that C++ functions take once it is the last one."""
    axis = None if scheme.rule is None else scheme.rule.reduced_axis
    if axis is None or x.dim() == 0:
        return None
    shape = list(x.shape)
    shape[axis] = 1
    return native.axis_to_move(x, tuple(shape), scheme.rounding)


def absmax_values(x: Tensor, scheme: native.Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values and scale, and the largest magnitude where there is one."""
    rule: Any = scheme.rule
    whole, layout = scheme.is_whole, _native_layout(x, scheme)
    axis = None if whole or layout is not None else _axis_to_move(x, scheme)
    if axis is not None:
        y, scale, _ = absmax_values(native.axis_last(x, axis), scheme.along_last())
        return native.axis_back(y, axis), native.axis_back(scale, axis), None
    top: Tensor | None
    if layout is not None and rule.domain == "fp":
        if whole:
            return native.absmax(layout, x, rule.shape, scheme)
        shape = rule.shape if rule.reduced_axis is None else native.row_shape(x)
        return *native.row_absmax(layout, x, shape, scheme), None
    if whole:
        top = abs_max_values(x).to(compute_dtype(x.dtype))
        scale = statistic_scale_values(top, rule).reshape(rule.shape)
        return quantize_as(scheme, x, scale, None), scale, top
    if layout is not None:
        shape = rule.shape if rule.reduced_axis is None else native.row_shape(x)
        top = native.row_tops(layout, x, shape)
    else:
        top = _tops(x, rule)[0]
    scale = statistic_scale_values(top, rule)
    return quantize_as(scheme, x, scale, None), scale, None


def _tops(x: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of channels, rows or groups, in the shape of the scale; and their places, in the rows of each."""
    if rule.reduced_axis is not None:
        top, where = x.abs().max(dim=rule.reduced_axis, keepdim=True)
        return top.to(compute_dtype(x.dtype)), where
    top, where = rows_of(x, rule.channel_axis).abs().max(dim=1)
    return top.to(compute_dtype(x.dtype)).reshape(rule.shape), where


class _QuantizeByAbsmax(Fused):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, scheme: native.Scheme
    ) -> tuple[Tensor, Tensor]:
        y, scale, top = absmax_values(x, scheme)
        ctx.save_for_backward(x, scale, top)
        ctx.how = scheme
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Any:  # type: ignore[override]
        return quantize_by_absmax.definition(x, ctx.how.grid, ctx.how.rule)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor | None, grad_scale: Tensor | None) -> Any:  # type: ignore[override]
        x, scale, top = ctx.saved_tensors
        overwrite = grad is not None and may_overwrite(grad, x)
        if grad is not None and grad_scale is None and not ctx.how.is_whole:
            found = sums_of(grad)
            if found is not None:
                return _with_shares(grad, x, *found, ctx.how.rule, overwrite), None
        if grad is None:
            grad, overwrite = torch.zeros_like(x), True
        grad = native.laid_out_as(grad, x)
        return absmax_gradient(grad, grad_scale, x, scale, top, ctx.how, overwrite), None


def absmax_gradient(
    g: Tensor,
    grad_scale: Tensor | None,
    x: Tensor,
    scale: Tensor,
    top: Tensor | None,
    scheme: native.Scheme,
    overwrite: bool,
) -> Tensor:
    """The gradient of ``x`` for those of its quantized values and of the scale."""
    layout = _native_layout(x, scheme, scale, g=g, incoming=(grad_scale,))
    if layout is not None:
        return native.absmax_gradients(layout, g, x, scale, top, grad_scale, scheme, overwrite)
    axis = None if scheme.is_whole else _axis_to_move(x, scheme)
    if axis is not None:
        g, x, scale = (native.axis_last(t, axis) for t in (g, x, scale))
        grad_scale = None if grad_scale is None else native.axis_last(grad_scale, axis)
        made = absmax_gradient(g, grad_scale, x, scale, None, scheme.along_last(), True)
        return native.axis_back(made, axis)
    rule: Any = scheme.rule
    grad_x, whole = parts_of_gradient(g, x, scale, scheme.grid)
    whole = whole if grad_scale is None else whole + grad_scale
    if top is None:
        top, where = _tops(x, rule)
        grad_top = whole * statistic_scale_slope(top, rule)
        return _to_places(grad_x, x, grad_top, where, rule)
    grad_top = whole.reshape(top.shape) * statistic_scale_slope(top, rule)
    largest = x.abs().eq_(top.to(x.dtype))  # 1 and 0, without a boolean tensor
    count = largest.sum(dtype=top.dtype)
    share = torch.where(top > 0, grad_top / (count * top), 0.0)
    return largest.mul_(x).mul_(share).add_(grad_x)


def parts_of_gradient(g: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The gradients of values and scale, each taken for itself."""
    if isinstance(grid, MinifloatGrid):
        grad_x, of_scale = minifloat_gradients(g, x, scale, grid, True)
        assert of_scale is not None
        return grad_x, of_scale
    bounds: Any = (grid.minimum, grid.maximum)
    exact = x.to(compute_dtype(x.dtype)) / scale
    rounded = ROUNDINGS[grid.rounding](exact)
    if not grid.clamp_gradient:
        return g, sum_to(rounded.clamp_(*bounds).sub_(exact).mul_(g), scale)
    inside = ~((rounded < bounds[0]) | (rounded > bounds[1]))
    moved = torch.where(inside, exact, 0.0)
    return g * inside, sum_to(rounded.clamp_(*bounds).sub_(moved).mul_(g), scale)


def _to_places(g: Tensor, x: Tensor, grad_top: Tensor, where: Tensor, rule: ScaleRule) -> Tensor:
    """``g``, and at the element of the largest magnitude of each row the gradient of that."""
    if rule.reduced_axis is None:
        signs = rows_of(x, rule.channel_axis).gather(1, where.unsqueeze(1)).sign()
        shares = grad_top.reshape(-1, 1) * signs
        shares = torch.where(signs == 0, 0.0, shares)  # a slope may be infinite at 0
        return spread_rows(g, shares, where, rule.channel_axis)
    signs = x.gather(rule.reduced_axis, where).sign()
    shares = torch.where(signs == 0, 0.0, grad_top * signs).to(g.dtype)
    return g.scatter_add(rule.reduced_axis, where, shares)


# ------------------------------------------------------------ sums that a product has taken already


def takes_sums(node: Any, x: Tensor, scale: Tensor | None) -> bool:
    """Whether the gradient of a weight's quantized values is that of the weight, but for an element of each row.

    Args:
        node: of the graph, that quantized the weight.
        x: the weight.
        scale: that it was quantized by.
    """
    if getattr(node, "_forward_cls", None) is not _QuantizeByAbsmax or scale is None:
        return False
    scheme = node.how
    return (
        isinstance(scheme.grid, IntegerGrid)
        and not scheme.grid.clamp_gradient
        and scheme.rule.channel_axis == 0
        and x.is_contiguous()
        and _native_layout(x, scheme, scale) is not None
    )


def note_sums(grad: Tensor, sums: Tensor, where: Tensor) -> None:
    """Let a gradient know what it gives each row's scale, and which element of the row gets it."""
    grad.sums = (sums, where, grad._version)  # type: ignore[attr-defined]


def sums_of(grad: Tensor) -> tuple[Tensor, Tensor] | None:
    """What :func:`note_sums` noted, as long as the gradient is as it was."""
    found = grad.__dict__.get("sums")
    return None if found is None or found[2] != grad._version else found[:2]


def _with_shares(
    g: Tensor, x: Tensor, sums: Tensor, where: Tensor, rule: ScaleRule, overwrite: bool
) -> Tensor:
    rows = x.view(x.shape[0], -1)
    largest = rows.gather(1, where.unsqueeze(1))
    top = largest.abs().to(sums.dtype)
    shares = sums.unsqueeze(1) * statistic_scale_slope(top, rule) * largest.sign()
    shares = torch.where(largest == 0, 0.0, shares).to(g.dtype)
    out = g if overwrite else g.clone(memory_format=torch.contiguous_format)
    out.view(rows.shape).scatter_add_(1, where.unsqueeze(1), shares)
    return out


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


def by_absmax(grid: Grid, rule: ScaleRule) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """:func:`~qframework.functional.quantize_by_absmax` for many values, where fused functions may run."""
    scheme = native.Scheme(grid, rule)

    def run(w: Tensor) -> tuple[Tensor, Tensor]:
        if not is_grad_enabled():
            return absmax_values(w, scheme)[:2]
        y, scale = _QuantizeByAbsmax.call(w, scheme)
        return note_origin(y, w, scale, None, scheme), scale

    return run


@add_kernel(quantize_by_absmax, "fused", may_fuse)
def _fused(w: Tensor, grid: Grid, rule: ScaleRule) -> Any:
    return by_absmax(grid, rule)(w)
