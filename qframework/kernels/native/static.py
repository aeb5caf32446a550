"""Calls of the C++ quantizer that are laid out once and made many times, for a scale that stays."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.kernels.native import tensors
from qframework.kernels.native.build import library
from qframework.kernels.native.calls import at
from qframework.kernels.native.scheme import Grid, Scheme, rounding_of
from qframework.kernels.native.tensors import DTYPES, address_to_read, is_dense, serves

# Named here: see tensors.py.
_threads, _empty_like = torch.get_num_threads, torch.empty_like
_NOTHING = (None,) * 6


class StaticQuantizer:
    """:func:`~qframework.kernels.native.quantize` for one scale and grid: what doesn't depend on the values is laid out once.

    The numbers are copied, so that whoever moves or frees the tensors doesn't matter.
    """

    __slots__ = ("_addresses", "_dtype", "_how", "_numbers", "_run", "_schemes")

    def __init__(
        self, dtype: torch.dtype, scale: Tensor | None, zero_point: Tensor | None, grid: Grid
    ) -> None:
        self._numbers = [None if t is None else t.detach().clone() for t in (scale, zero_point)]
        self._addresses = tuple(map(at, self._numbers))
        self._dtype = dtype
        self._schemes = [Scheme(grid, relu=relu) for relu in (False, True)]
        self._how = [(DTYPES[dtype][0], scheme.told()) for scheme in self._schemes]
        self._run = library().qframework_run

    @classmethod
    def for_values(
        cls, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, grid: Grid
    ) -> StaticQuantizer | None:
        """One for values such as ``x``; None where C++ functions don't take them."""
        if any(t is not None and t.numel() != 1 for t in (scale, zero_point)):
            return None
        if serves(x, (), rounding_of(grid), scale, zero_point) is None:
            return None
        return cls(x.dtype, scale, zero_point, grid)

    def __call__(self, x: Tensor, relu: bool) -> Tensor | None:
        """The quantized values, where fused functions may run and no mode looks on; None where the ordinary function has to."""
        # As in tensors.serves, in one frame: between two convolutions each takes several times as long as alone.
        n = x.numel()
        if (
            type(x) is not Tensor
            or x.dtype is not self._dtype
            or n < tensors.SMALLEST
            or not (x.is_contiguous() or is_dense(x))
            or not x.is_cpu
            or x.is_neg()
        ):
            return None
        y = _empty_like(x)
        places = (address_to_read(x), None, y.data_ptr(), *self._addresses)
        self._run(0, *self._how[relu], *places, *_NOTHING, n, 1, n, 1, _threads())
        return y
