"""C++ functions for large tensors on CPUs: quantization and its gradients in one pass over memory each.

They take and return tensors outside of autograd; the functions of :mod:`qframework.functional` call them where
:func:`serves` says so. See kernels.cpp for what they compute.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qframework.configuration import settings
from qframework.functional.native.build import Call, compiler, library

#: With fewer elements there is little to gain, and nothing is built for them.
SMALLEST = 1 << 13
#: Rows that are too short to be worth a call each.
_SHORTEST = 16

#: The dtypes of tensors: their number in kernels.cpp, and the dtype of scales beside them.
_DTYPES = {
    torch.float32: (0, torch.float32),
    torch.float64: (1, torch.float64),
    torch.bfloat16: (2, torch.float32),
}
_ROUNDINGS = {"round": 0, "ceil": 1, "floor": 2, "round_to_zero": 3}
#: The settings under which they compute.
SETTINGS = ("auto", "compiled")
_PLAIN = (Tensor, torch.nn.Parameter)


# Named here, because to look them up in torch each time takes long where nothing is in a cache.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_threads, _empty_like = torch.get_num_threads, torch.empty_like

#: How scales lie over a tensor: their number, and the length of the rows that have one scale each, in turn.
Layout = tuple[int, int]

_QUANTIZE, _GRADIENTS, _LARGEST, _LARGEST_GRADIENTS = range(4)


@cache
def available() -> bool:
    """Whether the functions can be had here; builds them."""
    if compiler() is None:
        return False
    try:
        library()
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"the C++ functions can't be used, so that 'fused' ones compute: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def serves(
    x: Tensor,
    shape: tuple[int, ...],
    rounding: str,
    *numbers: Tensor | None,
    g: Tensor | None = None,
    incoming: tuple[Tensor | None, ...] = (),
) -> Layout | None:
    """How C++ functions take a tensor; None where the ordinary functions have to.

    Args:
        x: the tensor.
        shape: of the scale: one element, or one for each index of an axis.
        rounding: a name of :data:`~qframework.functional.ROUNDINGS`.
        *numbers: what they will read besides: scale, zero point, threshold.
        g: the gradient that comes from behind.
        incoming: gradients of the scale and the zero point that come in besides.

    Raises:
        RuntimeError: ``settings.kernels`` is ``'compiled'``, and there is no compiler, or it fails.
    """
    count, dtype = x.numel(), x.dtype
    if (
        _is_compiling()
        or count < SMALLEST
        or settings.kernels not in SETTINGS
        or not x.is_cpu
        or dtype not in _DTYPES
        or rounding not in _ROUNDINGS
        or type(x) not in _PLAIN
        or x.is_neg()
        # what records operators would miss what isn't one
        or _tracing_state() is not None
        or _dispatch_modes() > 0
        or _transforms_active()
    ):
        return None
    small = _DTYPES[dtype][1]
    for t in numbers:
        if t is not None and not (t.dtype is small and t.is_cpu and t.is_contiguous()):
            return None
    if g is not None and not (
        g.dtype is dtype and g.stride() == x.stride() and g.is_cpu and _is_one(g)
    ):
        return None
    for t in incoming:
        if t is not None and not (t.is_cpu and _is_one(t)):
            return None
    if max(shape, default=1) == 1:
        layout = (1, count) if x.is_contiguous() or _is_channels_last(x) else None
    else:
        layout = _by_axis(x, shape)
    if layout is None:
        return None
    if settings.kernels == "compiled":
        library()
        return layout
    return layout if available() else None


def _is_one(g: Tensor) -> bool:
    """Whether a gradient is one, rather than a batch of several that are taken at once."""
    return not (_is_batched(g) or _is_legacy_batched(g) or g.is_neg())


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _by_axis(x: Tensor, shape: tuple[int, ...]) -> Layout | None:
    channels = max(shape)
    axis = shape.index(channels)
    if len(shape) != x.dim() or math.prod(shape) != channels:
        return None
    if not (x.is_contiguous() or (axis == 0 and _is_channels_last(x))):
        return None
    inner = x.stride(axis)
    return (channels, inner) if inner >= _SHORTEST and x.shape[axis] == channels else None


def _run(function: int, layout: Layout, x: Tensor, rounding: str, **operands: Any) -> None:
    call = Call(
        x=x.data_ptr(),
        n=x.numel(),
        channels=layout[0],
        inner=layout[1],
        threads=_threads(),
        **operands,
    )
    library().qframework_run(
        function, _DTYPES[x.dtype][0], _ROUNDINGS[rounding], ctypes.byref(call)
    )


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


class Prepared:
    """:func:`quantize` for one scale and range: what doesn't depend on the values is laid out once."""

    __slots__ = ("_call", "_dtype", "_held", "_how", "_run")

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: float,
        maximum: float,
        rounding: str,
    ) -> None:
        numbers = {"scale": scale.data_ptr(), "zero": _at(zero_point)}
        self._held = (scale, zero_point)
        self._call = Call(low=minimum, high=maximum, **numbers)
        self._dtype = x.dtype
        self._how = (_DTYPES[x.dtype][0], _ROUNDINGS[rounding], ctypes.byref(self._call))
        self._run = library().qframework_quantize

    @classmethod
    def for_values(
        cls, x: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any
    ) -> Prepared | None:
        """One for values such as ``x``; None where C++ functions don't take them."""
        if scale.numel() != 1 or (zero_point is not None and zero_point.numel() != 1):
            return None
        if serves(x, scale.shape, how[2], scale, zero_point) is None:
            return None
        return cls(x, scale, zero_point, *how)

    def __call__(self, x: Tensor, rectify: bool) -> Tensor | None:
        """The quantized values; None where the ordinary function has to."""
        # As in serves, in one frame: see Memory.recall.
        if (
            type(x) is not Tensor
            or x.dtype is not self._dtype
            or x.numel() < SMALLEST
            or not (x.is_contiguous() or _is_channels_last(x))
            or not x.is_cpu
            or x.is_neg()
            or _tracing_state() is not None
            or _dispatch_modes() > 0
            or _transforms_active()
            or forward_ad._current_level >= 0
        ):
            return None
        y = _empty_like(x)
        self._run(*self._how, x.data_ptr(), y.data_ptr(), x.numel(), rectify, _threads())
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
        _DTYPES[x.dtype][0],
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
