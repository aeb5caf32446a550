"""Calls of the C++ quantizer that are laid out once and made many times, as evaluation does."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qframework.functional.native import tensors
from qframework.functional.native.build import Call, library
from qframework.functional.native.tensors import DTYPES, ROUNDINGS, is_channels_last, serves

# Named here: see tensors.py.
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_threads, _empty_like = torch.get_num_threads, torch.empty_like


class Prepared:
    """:func:`~qframework.functional.native.quantize` for one scale and range: what doesn't depend on the values is laid out once."""

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
        numbers = {
            "scale": scale.data_ptr(),
            "zero": None if zero_point is None else zero_point.data_ptr(),
        }
        self._held = (scale, zero_point)
        self._call = Call(low=minimum, high=maximum, **numbers)
        self._dtype = x.dtype
        self._how = (DTYPES[x.dtype][0], ROUNDINGS[rounding], ctypes.byref(self._call))
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
        # As in tensors.serves, in one frame: see Memory.recall.
        if (
            type(x) is not Tensor
            or x.dtype is not self._dtype
            or x.numel() < tensors.SMALLEST
            or not (x.is_contiguous() or is_channels_last(x))
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
