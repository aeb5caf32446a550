"""The C++ functions, called with tensors."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from qframework.functional import IntegerGrid, ScaleRule
from qframework.kernels.native.build import Call, library
from qframework.kernels.native.tensors import DTYPES, ROUNDINGS, Layout, address_to_read

_threads, _empty_like = torch.get_num_threads, torch.empty_like

_QUANTIZE, _GRADIENTS, _ABSMAX, _ABSMAX_GRADIENTS = range(4)


def _run(function: int, layout: Layout, x: Tensor, grid: IntegerGrid, **operands: Any) -> None:
    call = Call(
        x=address_to_read(x),
        n=x.numel(),
        channels=layout[0],
        inner=layout[1],
        low=grid.minimum,
        high=grid.maximum,
        threads=_threads(),
        **operands,
    )
    rounding = ROUNDINGS[grid.rounding]
    library().qframework_run(function, DTYPES[x.dtype][0], rounding, ctypes.byref(call))


def _taps(x: Tensor) -> int:
    """How far apart the indices of neighbours in memory are: 1, or in channels-last format the taps of a kernel."""
    return 1 if x.is_contiguous() else math.prod(x.shape[2:])


def _laid_out(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient that comes in through a scale, as C++ reads it; autograd may have expanded it."""
    return None if grad is None else grad.to(like.dtype).contiguous()


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def quantize(
    layout: Layout,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    relu: bool,
) -> Tensor:
    """``(clamp(round(x / scale + zero_point)) - zero_point) * scale``, of ``relu(x)`` where ``relu``."""
    y = _empty_like(x)
    operands = {"out": y.data_ptr(), "scale": scale.data_ptr(), "zero": _at(zero_point)}
    _run(_QUANTIZE, layout, x, grid, **operands, relu=relu)
    return y


def quantize_by_learned_scale(
    layout: Layout, x: Tensor, stored: Tensor, grid: IntegerGrid, rule: ScaleRule, relu: bool
) -> tuple[Tensor, Tensor]:
    """:func:`quantize` by ``scale = max(|stored|, minimum) / threshold``, and that scale."""
    y, scale = _empty_like(x), _empty_like(stored)
    _run(
        _QUANTIZE,
        layout,
        x,
        grid,
        out=y.data_ptr(),
        scale=scale.data_ptr(),
        stored=stored.data_ptr(),
        threshold=rule.threshold,
        smallest=rule.minimum or 0.0,
        relu=relu,
    )
    return y, scale


def gradients(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    relu: bool,
    stored: Tensor | None = None,
    threshold: float = 1.0,
    grad_of_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of values, scale and zero point for ``g``, that of the result of :func:`quantize`.

    With ``stored`` and ``threshold`` that of what is stored instead of the scale's, for which ``grad_of_scale`` may come in
    from elsewhere.
    """
    grad_x = _empty_like(x) if grid.clamp_gradient else g
    grad_scale = _empty_like(scale)
    grad_of_scale = _laid_out(grad_of_scale, scale)
    grad_zero = None if zero_point is None else _empty_like(zero_point)
    _run(
        _GRADIENTS,
        layout,
        x,
        grid,
        g=address_to_read(g),
        out=grad_x.data_ptr() if grid.clamp_gradient else None,
        scale=scale.data_ptr(),
        zero=_at(zero_point),
        stored=_at(stored),
        threshold=threshold,
        grad_of_scale=_at(grad_of_scale),
        grad_scale=grad_scale.data_ptr(),
        grad_zero=_at(grad_zero),
        clamp_gradient=grid.clamp_gradient,
        relu=relu,
    )
    return grad_x, grad_scale, grad_zero


def absmax(
    layout: Layout, x: Tensor, grid: IntegerGrid, rule: ScaleRule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize by ``scale = max(largest magnitude, minimum) / threshold``.

    Returns:
        Values, scale, magnitudes and, per channel, where they are in their channels.
    """
    per_channel = rule.channel_axis is not None
    small = DTYPES[x.dtype][1]
    y, scale = _empty_like(x), torch.empty(rule.shape, dtype=small, device=x.device)
    top = torch.empty((layout[0],) if per_channel else (), dtype=small, device=x.device)
    where = torch.empty(layout[0], dtype=torch.int64, device=x.device) if per_channel else None
    _run(
        _ABSMAX,
        layout,
        x,
        grid,
        out=y.data_ptr(),
        scale=scale.data_ptr(),
        threshold=rule.threshold,
        top=top.data_ptr(),
        where=_at(where),
        taps=_taps(x),
        smallest=rule.minimum or 0.0,
    )
    return y, scale, top, where


def absmax_gradients(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    top: Tensor,
    where: Tensor | None,
    grad_of_scale: Tensor | None,
    slope: Tensor | None,
    grid: IntegerGrid,
    rule: ScaleRule,
) -> Tensor:
    """The gradient of ``x`` for that of :func:`absmax`.

    ``slope`` is that of the scale by the magnitude, None for that of ``absmax`` itself; ``grad_of_scale`` comes in through
    the scale.
    """
    grad_x, grad_of_scale = _empty_like(x), _laid_out(grad_of_scale, scale)
    _run(
        _ABSMAX_GRADIENTS,
        layout,
        x,
        grid,
        g=address_to_read(g),
        out=grad_x.data_ptr(),
        scale=scale.data_ptr(),
        slope=_at(slope),
        threshold=rule.threshold,
        grad_of_scale=_at(grad_of_scale),
        top=top.data_ptr(),
        where=_at(where),
        taps=_taps(x),
        smallest=rule.minimum or 0.0,
    )
    return grad_x


def spread(g: Tensor, x: Tensor, values: Tensor, shares: Tensor) -> Tensor:
    """``g``, and each share divided among the elements of ``x`` that equal the value at its index.

    ``values`` and ``shares`` have one or two elements, in the dtype of scales.
    """
    out = _empty_like(x)
    library().qframework_spread(
        DTYPES[x.dtype][0],
        address_to_read(g),
        address_to_read(x),
        out.data_ptr(),
        x.numel(),
        values.data_ptr(),
        shares.data_ptr(),
        values.numel(),
        _threads(),
    )
    return out
