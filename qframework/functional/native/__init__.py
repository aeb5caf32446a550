"""C++ functions for large tensors on CPUs: quantization and its gradients in one pass over memory each.

They take and return tensors outside of autograd; the functions of :mod:`qframework.functional` call them where
:func:`~qframework.functional.native.tensors.serves` says so. See kernels.cpp for what they compute.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from qframework.functional.native.build import Call, library
from qframework.functional.native.tensors import DTYPES, ROUNDINGS
from qframework.functional.native.tensors import Layout as Layout
from qframework.functional.native.tensors import serves as serves

_threads, _empty_like = torch.get_num_threads, torch.empty_like

_QUANTIZE, _GRADIENTS, _LARGEST, _LARGEST_GRADIENTS = range(4)


def _run(function: int, layout: Layout, x: Tensor, rounding: str, **operands: Any) -> None:
    call = Call(
        x=x.data_ptr(),
        n=x.numel(),
        channels=layout[0],
        inner=layout[1],
        threads=_threads(),
        **operands,
    )
    library().qframework_run(function, DTYPES[x.dtype][0], ROUNDINGS[rounding], ctypes.byref(call))


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
    minimum: float,
    maximum: float,
    rounding: str,
    rectify: bool,
) -> Tensor:
    """``(clamp(round(x / scale + zero_point)) - zero_point) * scale``; arguments as for ``fake_quantize``."""
    y = _empty_like(x)
    operands = {"out": y.data_ptr(), "scale": scale.data_ptr(), "zero": _at(zero_point)}
    bounds = {"low": minimum, "high": maximum, "rectify": rectify}
    _run(_QUANTIZE, layout, x, rounding, **operands, **bounds)
    return y


def quantize_by_stored(
    layout: Layout,
    x: Tensor,
    stored: Tensor,
    threshold: Tensor,
    smallest: float | None,
    minimum: float,
    maximum: float,
    rounding: str,
    rectify: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`quantize` by ``scale = max(|stored|, smallest) / threshold``, and that scale."""
    y, scale = _empty_like(x), _empty_like(stored)
    _run(
        _QUANTIZE,
        layout,
        x,
        rounding,
        out=y.data_ptr(),
        scale=scale.data_ptr(),
        stored=stored.data_ptr(),
        threshold=threshold.data_ptr(),
        smallest=smallest or 0.0,
        low=minimum,
        high=maximum,
        rectify=rectify,
    )
    return y, scale


def gradients(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: float,
    maximum: float,
    rounding: str,
    masked: bool,
    rectify: bool,
    stored: Tensor | None = None,
    threshold: Tensor | None = None,
    grad_of_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of values, scale and zero point for ``g``, that of the result.

    With ``stored`` and ``threshold`` that of what is stored instead of the scale's, for which ``grad_of_scale`` may come in
    from elsewhere.
    """
    grad_x = _empty_like(x) if masked else g
    grad_scale = _empty_like(scale)
    grad_of_scale = _laid_out(grad_of_scale, scale)
    grad_zero = None if zero_point is None else _empty_like(zero_point)
    _run(
        _GRADIENTS,
        layout,
        x,
        rounding,
        g=g.data_ptr(),
        out=grad_x.data_ptr() if masked else None,
        scale=scale.data_ptr(),
        zero=_at(zero_point),
        stored=_at(stored),
        threshold=_at(threshold),
        grad_of_scale=_at(grad_of_scale),
        grad_scale=grad_scale.data_ptr(),
        grad_zero=_at(grad_zero),
        low=minimum,
        high=maximum,
        masked=masked,
        rectify=rectify,
    )
    return grad_x, grad_scale, grad_zero


def largest(
    layout: Layout,
    x: Tensor,
    shape: tuple[int, ...],
    per_channel: bool,
    threshold: Tensor,
    smallest: float | None,
    minimum: float,
    maximum: float,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize by ``scale = max(largest magnitude, smallest) / threshold``.

    Returns:
        Values, scale (of ``shape``), magnitudes and, with ``per_channel``, where they are in their channels.
    """
    y, scale = _empty_like(x), threshold.new_empty(shape)
    top = threshold.new_empty((layout[0],) if per_channel else ())
    where = torch.empty(layout[0], dtype=torch.int64, device=x.device) if per_channel else None
    _run(
        _LARGEST,
        layout,
        x,
        rounding,
        out=y.data_ptr(),
        scale=scale.data_ptr(),
        threshold=threshold.data_ptr(),
        top=top.data_ptr(),
        where=_at(where),
        taps=_taps(x),
        smallest=smallest or 0.0,
        low=minimum,
        high=maximum,
    )
    return y, scale, top, where


def largest_gradients(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    top: Tensor,
    where: Tensor | None,
    grad_of_scale: Tensor | None,
    slope: Tensor | None,
    threshold: Tensor,
    smallest: float | None,
    minimum: float,
    maximum: float,
    rounding: str,
) -> Tensor:
    """The gradient of ``x`` for that of :func:`largest`.

    ``slope`` is that of the scale by the magnitude, None for that of ``largest`` itself; ``grad_of_scale`` comes in through
    the scale.
    """
    grad_x, grad_of_scale = _empty_like(x), _laid_out(grad_of_scale, scale)
    _run(
        _LARGEST_GRADIENTS,
        layout,
        x,
        rounding,
        g=g.data_ptr(),
        out=grad_x.data_ptr(),
        scale=scale.data_ptr(),
        slope=_at(slope),
        threshold=threshold.data_ptr(),
        grad_of_scale=_at(grad_of_scale),
        top=top.data_ptr(),
        where=_at(where),
        taps=_taps(x),
        smallest=smallest or 0.0,
        low=minimum,
        high=maximum,
    )
    return grad_x


def spread(g: Tensor, x: Tensor, values: Tensor, shares: Tensor) -> Tensor:
    """``g``, and each share divided among the elements of ``x`` that equal the value at its index.

    ``values`` and ``shares`` have one or two elements, in the dtype of scales.
    """
    out = _empty_like(x)
    library().qframework_spread(
        DTYPES[x.dtype][0],
        g.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        x.numel(),
        values.data_ptr(),
        shares.data_ptr(),
        values.numel(),
        _threads(),
    )
    return out
