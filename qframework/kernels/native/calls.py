"""The C++ functions, called with tensors."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qframework.functional import IntegerGrid
from qframework.kernels.native.build import Call, library
from qframework.kernels.native.scheme import Scheme
from qframework.kernels.native.tensors import (
    DTYPES,
    Layout,
    address_to_read,
    dense,
    is_channels_last,
)

_threads = torch.get_num_threads
#: Bytes from which on memory is asked for in large pages.
_MANY = 1 << 22

_QUANTIZE, _GRADIENTS, _ABSMAX, _ABSMAX_GRADIENTS, _ROW_ABSMAX, _ROW_ABSMAX_GRADIENTS = range(6)
_ROW_ABSMAX_SUMS = 6


def _call(layout: Layout, x: Tensor, **operands: Any) -> Call:
    """A call with a tensor, as it lies in memory."""
    x = dense(x)
    call = Call(
        x=address_to_read(x),
        n=x.numel(),
        channels=layout[0],
        inner=layout[1],
        threads=_threads(),
        **operands,
    )
    call.values = x  # which may be a copy
    return call


def _run(
    function: int,
    layout: Layout,
    x: Tensor,
    scheme: Scheme,
    *,
    out: int | None = None,
    g: int | None = None,
    scale: int | None = None,
    zero: int | None = None,
    stored: int | None = None,
    grad_of_scale: int | None = None,
    grad_scale: int | None = None,
    grad_zero: int | None = None,
    top: int | None = None,
    where: int | None = None,
    taps: int = 1,
) -> None:
    """Run a function on a tensor, as it lies in memory."""
    x = x if x.is_contiguous() else dense(x)
    written = (grad_scale, grad_zero, top, where)
    place = (x.numel(), *layout, taps, _threads())
    read = (address_to_read(x), g, out, scale, zero, stored, grad_of_scale)
    library().qframework_run(function, DTYPES[x.dtype][0], scheme.told(), *read, *written, *place)


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, for results that are written by C++ functions or in parts; large ones in large pages."""
    made = torch.empty_like(x)
    size = made.numel() * made.element_size()
    if size >= _MANY:
        library().qframework_in_large_pages(made.data_ptr(), size)
    return made


@cache
def _number(dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device="cpu")


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty``; one number in the way in which values were, since another operation's code is in no cache."""
    return (
        torch.empty_like(_number(dtype))
        if shape == ()
        else torch.empty(shape, dtype=dtype, device="cpu")
    )


def _taps(x: Tensor) -> int:
    """How far apart the indices of neighbours in memory are: 1, or in channels-last format the taps of a kernel."""
    return 1 if x.is_contiguous() or not is_channels_last(x) else math.prod(x.shape[2:])


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient that comes in through a scale, as C++ reads it; autograd may have expanded it."""
    return grad.to(like.dtype).contiguous()


def at(t: Tensor | None) -> int | None:
    """The address of a tensor that is written to, or is nobody else's; None where there is none."""
    return None if t is None else t.data_ptr()


def quantize(
    layout: Layout, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, scheme: Scheme
) -> Tensor:
    """``(clamp(round(x / scale + zero_point)) - zero_point) * scale``, of ``relu(x)`` where there is one; or the nearest minifloats."""
    y = empty_like(x)
    _run(_QUANTIZE, layout, x, scheme, out=y.data_ptr(), scale=at(scale), zero=at(zero_point))
    return y


def quantize_by_learned_scale(
    layout: Layout, x: Tensor, stored: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """:func:`quantize` by ``scale = max(|stored|, minimum) / threshold``, and that scale."""
    y, rule = empty_like(x), scheme.rule
    has_none = stored.dim() == 1 and rule is not None and rule.shape == ()
    scale = _empty((), stored.dtype) if has_none else torch.empty_like(stored)
    numbers = {"scale": scale.data_ptr(), "stored": address_to_read(stored)}
    _run(_QUANTIZE, layout, x, scheme, out=y.data_ptr(), **numbers)
    return y, scale


def gradients(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    scheme: Scheme,
    stored: Tensor | None = None,
    grad_of_scale: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of values, scale and zero point for ``g``, that of the result of :func:`quantize`.

    With ``stored`` that of what is stored instead of the scale's, for which ``grad_of_scale`` may come in from elsewhere. With
    ``overwrite`` that of values is written where ``g`` is.
    """
    passes = isinstance(scheme.grid, IntegerGrid) and not scheme.grid.clamp_gradient
    grad_x = g if passes or overwrite else empty_like(x)
    of_scale = scale if stored is None else stored
    grad_scale = None if of_scale is None else torch.empty_like(of_scale)
    if scale is not None and grad_of_scale is not None:
        grad_of_scale = _laid_out(grad_of_scale, scale)
    grad_zero = None if zero_point is None else torch.empty_like(zero_point)
    _run(
        _GRADIENTS,
        layout,
        x,
        scheme,
        g=address_to_read(g),
        out=None if passes else grad_x.data_ptr(),
        scale=at(scale),
        zero=at(zero_point),
        stored=None if stored is None else address_to_read(stored),
        grad_of_scale=at(grad_of_scale),
        grad_scale=at(grad_scale),
        grad_zero=at(grad_zero),
    )
    return grad_x, grad_scale, grad_zero


def absmax(
    layout: Layout, x: Tensor, shape: tuple[int, ...], scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize by ``scale = max(largest magnitude, minimum) / threshold``, one for the tensor.

    Returns:
        Values, scale and magnitude.
    """
    small = DTYPES[x.dtype][1]
    y, scale, top = empty_like(x), _empty(shape, small), _empty((), small)
    operands = {"out": y.data_ptr(), "scale": scale.data_ptr(), "top": top.data_ptr()}
    _run(_ABSMAX, layout, x, scheme, **operands)
    return y, scale, top


def row_absmax(
    layout: Layout, x: Tensor, shape: tuple[int, ...], scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """:func:`absmax` for rows with a scale each, of a shape; values and scales."""
    y, scale = empty_like(x), _empty(shape, DTYPES[x.dtype][1])
    _run(_ROW_ABSMAX, layout, x, scheme, out=y.data_ptr(), scale=scale.data_ptr())
    return y, scale


def row_tops(layout: Layout, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The largest magnitude of each row, in a shape."""
    top = torch.empty(shape, dtype=DTYPES[x.dtype][1], device=x.device)
    call = _call(layout, x, top=top.data_ptr())
    library().qframework_row_tops(DTYPES[x.dtype][0], ctypes.byref(call))
    return top


def signs(layout: Layout, x: Tensor, scale: Tensor) -> Tensor:
    """``scale`` where ``x >= 0``, else ``-scale``; NaN stays NaN."""
    y = empty_like(x)
    call = _scaled_call(layout, x, scale, out=y.data_ptr())
    library().qframework_signs(DTYPES[x.dtype][0], ctypes.byref(call))
    return y


def signs_gradients(
    layout: Layout, g: Tensor, x: Tensor, scale: Tensor, clamp_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of values and scale for ``g``, that of the result of :func:`signs`, behind a clamp that is differentiated or not."""
    grad_x, grad_scale = empty_like(x), torch.empty_like(scale)
    made = {"out": grad_x.data_ptr(), "grad_scale": grad_scale.data_ptr()}
    made |= {"g": address_to_read(g), "clamp_gradient": int(clamp_gradient)}
    call = _scaled_call(layout, x, scale, **made)
    library().qframework_signs_gradients(DTYPES[x.dtype][0], ctypes.byref(call))
    return grad_x, grad_scale


def absmax_share(layout: Layout, x: Tensor, top: Tensor | None, grad: Tensor) -> Tensor:
    """The gradient of the largest magnitude, divided among the elements that have it; or of each row's, which its first one gets.

    Args:
        layout: of ``x``.
        x: the values.
        top: their largest magnitude, of the dtype of scales; None for those of rows.
        grad: what comes in, of the dtype of scales, one for each row.
    """
    made, grad = empty_like(x), grad.contiguous()
    of_all = None if top is None else address_to_read(top)
    operands = {"out": made.data_ptr(), "grad_of_scale": address_to_read(grad)}
    call = _call(layout, x, top=of_all, **operands)
    library().qframework_absmax_share(DTYPES[x.dtype][0], ctypes.byref(call))
    return made


def row_end_share(layout: Layout, x: Tensor, ends: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the largest or the smallest element of each row, which its first one gets.

    Args:
        layout: of ``x``.
        x: the values.
        ends: the elements, of the dtype of ``x``.
        grad: what comes in, of that dtype, one for each row.
    """
    made, ends, grad = empty_like(x), ends.contiguous(), grad.contiguous()
    operands = {"out": made.data_ptr(), "grad_of_scale": address_to_read(grad)}
    call = _call(layout, x, top=address_to_read(ends), **operands)
    library().qframework_row_end_share(DTYPES[x.dtype][0], ctypes.byref(call))
    return made


def codebook(layout: Layout, x: Tensor, scale: Tensor, entries: Tensor) -> Tensor:
    """The nearest of at most 32 entries, times a scale."""
    y = empty_like(x)
    call = _codebook_call(layout, x, scale, entries, out=y.data_ptr())
    library().qframework_codebook(DTYPES[x.dtype][0], ctypes.byref(call))
    return y


def codebook_gradients(
    layout: Layout, g: Tensor, x: Tensor, scale: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of values and scale for ``g``, that of the result of :func:`codebook`."""
    grad_x, grad_scale = empty_like(x), torch.empty_like(scale)
    made = {"out": grad_x.data_ptr(), "grad_scale": grad_scale.data_ptr()}
    call = _codebook_call(layout, x, scale, entries, g=address_to_read(g), **made)
    library().qframework_codebook_gradients(DTYPES[x.dtype][0], ctypes.byref(call))
    return grad_x, grad_scale


def _codebook_call(
    layout: Layout, x: Tensor, scale: Tensor, entries: Tensor, **operands: int
) -> Call:
    book = {"stored": address_to_read(entries), "taps": entries.numel()}
    return _scaled_call(layout, x, scale, **book, **operands)


def _scaled_call(layout: Layout, x: Tensor, scale: Tensor, **operands: int) -> Call:
    return _call(layout, x, scale=address_to_read(scale), **operands)


def absmax_gradients(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    top: Tensor | None,
    grad_of_scale: Tensor | None,
    scheme: Scheme,
    overwrite: bool,
) -> Tensor:
    """The gradient of ``x`` for that of :func:`absmax`, or of :func:`row_absmax`.

    Args:
        layout: of ``x``.
        g: the gradient of the values.
        x: what was quantized.
        scale: that was made of it.
        top: the largest magnitude of the tensor; None for scales of rows.
        grad_of_scale: what comes in through the scale, None for nothing.
        scheme: with the rule of the scale, of any domain.
        overwrite: write where ``g`` is.
    """
    x = x if x.is_contiguous() else dense(x)
    grad_x = g if overwrite else empty_like(x)
    if grad_of_scale is not None:
        grad_of_scale = _laid_out(grad_of_scale, scale)
    _run(
        _ROW_ABSMAX_GRADIENTS if top is None else _ABSMAX_GRADIENTS,
        layout,
        x,
        scheme,
        g=address_to_read(g),
        out=grad_x.data_ptr(),
        scale=scale.data_ptr(),
        grad_of_scale=at(grad_of_scale),
        top=at(top),
        taps=_taps(x),
    )
    return grad_x


def row_absmax_sums(
    layout: Layout, g: Tensor, x: Tensor, scale: Tensor, scheme: Scheme, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What comes in through the scale of each row, and the index of the element that gets it, as :func:`absmax_gradients` has it.

    For contiguous rows, of whose values the gradient is that of the result itself. Where ``y`` is given, the quantized values are
    written into it in the same pass.
    """
    sums = torch.empty(layout[0], dtype=scale.dtype, device=x.device)
    where = torch.empty(layout[0], dtype=torch.int64, device=x.device)
    _run(
        _ROW_ABSMAX_SUMS,
        layout,
        x,
        scheme,
        g=address_to_read(g),
        out=at(y),
        scale=address_to_read(scale),
        grad_scale=sums.data_ptr(),
        where=where.data_ptr(),
    )
    return sums, where


def spread(g: Tensor, x: Tensor, values: Tensor, shares: Tensor, overwrite: bool = False) -> Tensor:
    """``g``, and each share divided among the elements of ``x`` that equal the value at its index.

    ``values`` and ``shares`` have one or two elements, in the dtype of scales. With ``overwrite`` the result is written where ``g``
    is.
    """
    x = dense(x)
    out = g if overwrite else empty_like(x)
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
