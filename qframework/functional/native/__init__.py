"""C++ functions for large tensors on CPUs: quantization and its gradients in one pass over memory each.

They take and return tensors outside of autograd; the functions of :mod:`qframework.functional` call them where
:func:`serves` says so. See kernels.cpp for what they compute.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qframework.configuration import settings
from qframework.functional.native.build import Call, compiler, library

#: Below as many elements the ordinary functions are as fast.
SMALLEST = 1 << 14

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_ROUNDINGS = {"round": 0, "ceil": 1, "floor": 2, "round_to_zero": 3}
_PLAIN = (Tensor, torch.nn.Parameter)


class Layout:
    """How scales lie over a tensor that C++ functions take: row ``r`` of ``inner`` elements has scale ``r % channels``."""

    __slots__ = ("channels", "inner")

    def __init__(self, channels: int, inner: int) -> None:
        self.channels, self.inner = channels, inner


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
    x: Tensor, scale: Tensor, rounding: str, zero_point: Tensor | None = None, g: Tensor | None = None
) -> Layout | None:
    """How C++ functions take a tensor; None where the ordinary functions have to.

    Args:
        x: the tensor.
        scale: of one element, or one for each index of an axis.
        rounding: a name of :data:`~qframework.functional.ROUNDINGS`.
        zero_point: of the scale's shape.
        g: the gradient that comes from behind, laid out as ``x``.

    Raises:
        RuntimeError: ``settings.kernels`` is ``'compiled'``, and there is no compiler, or it fails.
    """
    count = x.numel()
    if count < SMALLEST or settings.kernels not in ("auto", "compiled") or x.device.type != "cpu":
        return None
    dtype = x.dtype
    if dtype not in _DTYPES or rounding not in _ROUNDINGS or type(x) not in _PLAIN:
        return None
    small = torch.float64 if dtype == torch.float64 else torch.float32
    if scale.dtype != small or x.is_neg() or _is_watched():
        return None
    if zero_point is not None and (zero_point.dtype != small or zero_point.shape != scale.shape):
        return None
    if scale.numel() == 1:
        layout = Layout(1, count) if _is_dense(x) else None
    else:
        layout = _by_axis(x, scale)
    if layout is None or (g is not None and not (g.dtype == dtype and g.stride() == x.stride())):
        return None
    if settings.kernels == "compiled":
        library()
        return layout
    return layout if available() else None


def _is_watched() -> bool:
    """Whether something records operators, which would miss what isn't one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def _by_axis(x: Tensor, scale: Tensor) -> Layout | None:
    if scale.dim() != x.dim() or not (x.is_contiguous() and scale.is_contiguous()):
        return None
    axis = next(i for i, n in enumerate(scale.shape) if n > 1)
    channels = scale.shape[axis]
    if channels != scale.numel() or channels != x.shape[axis]:
        return None
    inner = x.stride(axis)
    return Layout(channels, inner) if inner >= 16 else None


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
    y = torch.empty_like(x)
    call = Call(
        None,
        x.data_ptr(),
        y.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        None,
        None,
        x.numel(),
        layout.channels,
        layout.inner,
        minimum,
        maximum,
        0,
        rectify,
        torch.get_num_threads(),
    )
    library().qframework_quantize(_DTYPES[x.dtype], _ROUNDINGS[rounding], ctypes.byref(call))
    return y


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of ``x``, scale and zero point for ``g``, that of the result."""
    grad_x = torch.empty_like(x) if masked else g
    grad_scale = torch.empty_like(scale)
    grad_zero = None if zero_point is None else torch.empty_like(zero_point)
    call = Call(
        g.data_ptr(),
        x.data_ptr(),
        grad_x.data_ptr() if masked else None,
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        grad_scale.data_ptr(),
        None if grad_zero is None else grad_zero.data_ptr(),
        x.numel(),
        layout.channels,
        layout.inner,
        minimum,
        maximum,
        masked,
        rectify,
        torch.get_num_threads(),
    )
    library().qframework_gradients(_DTYPES[x.dtype], _ROUNDINGS[rounding], ctypes.byref(call))
    return grad_x, grad_scale, grad_zero


def spread(g: Tensor, x: Tensor, values: Tensor, shares: Tensor, magnitude: bool) -> Tensor:
    """``g``, and each share divided among the elements of ``x`` that equal the value at its index.

    Args:
        g, x: of one shape and layout.
        values, shares: of one or two elements, in the dtype that ``x`` is computed in.
        magnitude: look at ``|x|``; shares then have the sign of the element.
    """
    out = torch.empty_like(x)
    operands: Any = (g.data_ptr(), x.data_ptr(), out.data_ptr(), x.numel())
    library().qframework_spread(
        _DTYPES[x.dtype],
        *operands,
        values.data_ptr(),
        shares.data_ptr(),
        values.numel(),
        magnitude,
        torch.get_num_threads(),
    )
    return out
