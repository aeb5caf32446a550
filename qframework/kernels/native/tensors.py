"""Which tensors the C++ functions take, and how scales lie over them."""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qframework.configuration import settings
from qframework.kernels.native.build import compiler, library, prebuilt
from qframework.kernels.native.scheme import ROUNDINGS

#: With fewer elements there is little to gain, and nothing is built for them.
SMALLEST = 1 << 8
#: Rows that are too short to be worth a call each.
_SHORTEST = 4

#: The dtypes of tensors: their number in kernels.cpp, and the dtype of scales beside them.
DTYPES = {
    torch.float32: (0, torch.float32),
    torch.float64: (1, torch.float64),
    torch.bfloat16: (2, torch.float32),
    torch.float16: (3, torch.float32),
}
_PLAIN = (Tensor, torch.nn.Parameter)


# Named here, because to look them up in torch each time takes long where nothing is in a cache.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_batchedtensor
_storage_address: Any = torch._C._data_address  # type: ignore[attr-defined]
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

#: How scales lie over a tensor: their number, and the length of the rows that have one scale each, in turn.
Layout = tuple[int, int]


@cache
def available() -> bool:
    """Whether the functions can be had here; builds them.

    Warns:
        RuntimeWarning: they can't, on Linux; on other systems they never can. It is said once, with what it costs.
    """
    if compiler() is None and prebuilt() is None:
        if sys.platform == "linux":
            warnings.warn(
                "there is no C++ compiler ($CXX, g++ or c++), so that torch's own functions quantize: the same numbers, but a training step "
                "of a convolutional network takes about 1.4 times that of floats instead of 1.2, and keeps 1.6 times the bytes instead "
                "of 1.0. Install one, or set qframework.settings.kernels = 'fused', which says nothing",
                RuntimeWarning,
                stacklevel=2,
            )
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
        shape: of the scale: one element, one for each index of an axis, or one for each row, the last axis of ``x``.
        rounding: a name of :data:`~qframework.kernels.native.scheme.ROUNDINGS`.
        *numbers: what they will read besides: scale, zero point.
        g: the gradient that comes from behind.
        incoming: gradients of the scale and the zero point that come in besides.
    """
    count, dtype = x.numel(), x.dtype
    if (
        _is_compiling()
        or count < SMALLEST
        or settings.kernels != "auto"
        or not x.is_cpu
        or dtype not in DTYPES
        or rounding not in ROUNDINGS
        or type(x) not in _PLAIN
        or x.is_neg()
        # what records operators would miss what isn't one
        or _tracing_state() is not None
        or _dispatch_modes() > 0
        or _transforms_active()
    ):
        return None
    small = DTYPES[dtype][1]
    for t in numbers:
        if t is not None and not (t.dtype is small and t.is_cpu and t.is_contiguous()):
            return None
    laid = x if x.is_contiguous() else _as_if_dense(x)
    if g is not None and not (
        g.dtype is dtype and g.stride() == laid.stride() and g.is_cpu and _is_one(g)
    ):
        return None
    for t in incoming:
        if t is not None and not (t.is_cpu and _is_one(t)):
            return None
    if not shape or max(shape) == 1:
        layout: Layout | None = (1, count)
    else:
        layout = _by_axis(laid, shape)
    return layout if layout is not None and available() else None


def address_to_read(t: Tensor) -> int:
    """Where the first element is, for functions that only read: ``data_ptr()`` is for writers, and copies what tensors share."""
    return int(_storage_address(t) + t.storage_offset() * t.element_size())


def count_in(t: Tensor) -> int | None:
    """The content of a counter on the CPU, without an operation of torch's; None of others."""
    if type(t) is not Tensor or t.dtype is not torch.int64 or not t.is_cpu or t.numel() != 1:
        return None
    return ctypes.c_int64.from_address(address_to_read(t)).value


def _is_one(g: Tensor) -> bool:
    """Whether a gradient is one, rather than a batch of several that are taken at once."""
    return not (_is_batched(g) or _is_legacy_batched(g) or g.is_neg())


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a piece of memory, each once, whatever the order of the axes."""
    if x.is_contiguous():
        return True
    size = 1
    for stride, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return True


def _as_if_dense(x: Tensor) -> Tensor:
    """A tensor laid out as :func:`dense` is; of others than ``x`` itself without values."""
    return x if is_dense(x) else torch.empty_like(x, device="meta")


def dense(x: Tensor) -> Tensor:
    """``x``, or where it has gaps, as slices have, a copy without; its axes are in the same order."""
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


def laid_out_as(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient whose elements lie in memory as those of ``dense(like)`` do, since C++ functions go through both side by side."""
    if _is_compiling() or (grad.stride() == like.stride() and like.is_contiguous()):
        return grad
    if grad.dtype is not like.dtype or not like.is_cpu:
        return grad
    like = _as_if_dense(like)
    if grad.stride() == like.stride():
        return grad
    return torch.empty_like(like, device=grad.device).copy_(grad)


def axis_to_move(x: Tensor, shape: tuple[int, ...], rounding: str) -> int | None:
    """The axis of groups that have a scale each, where C++ functions take them once it is the last one; None for others.

    Args:
        x: values whose groups are along an axis of their own.
        shape: of the scale: that of ``x``, but for one axis of length 1.
        rounding: as for :func:`serves`.
    """
    if _is_compiling() or len(shape) != x.dim():
        return None
    apart = [axis for axis, n in enumerate(shape) if n != x.shape[axis]]
    if len(apart) != 1 or shape[apart[0]] != 1 or x.shape[apart[0]] < _SHORTEST:
        return None
    axis = apart[0]
    return axis if axis != x.dim() - 1 and serves(x, (), rounding) is not None else None


def axis_last(t: Tensor, axis: int) -> Tensor:
    """A copy with an axis at the end, so that groups along it are rows."""
    return t.movedim(axis, -1).contiguous()


def axis_back(t: Tensor, axis: int) -> Tensor:
    """What :func:`axis_last` moved, where it was."""
    return t.movedim(-1, axis).contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether neighbours in memory are channels of one place, as in images of torch's ``channels_last`` format."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def row_shape(x: Tensor) -> tuple[int, ...]:
    """The shape of a scale for each row."""
    return (*x.shape[:-1], 1)


def _by_axis(x: Tensor, shape: tuple[int, ...]) -> Layout | None:
    if shape[-1] == 1 and len(shape) == x.dim() and shape == row_shape(x):
        inner = x.shape[-1]
        return (x.numel() // inner, inner) if inner >= _SHORTEST and x.is_contiguous() else None
    channels = max(shape)
    axis = shape.index(channels)
    if len(shape) != x.dim() or math.prod(shape) != channels:
        return None
    if not (x.is_contiguous() or (axis == 0 and is_channels_last(x))):
        return None
    inner = x.stride(axis)
    return (channels, inner) if inner >= _SHORTEST and x.shape[axis] == channels else None
