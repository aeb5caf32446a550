"""The grid of a quantized tensor, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qframework.functional import max_int, min_int, upcast
from qframework.quant_tensor import CodebookQuantTensor
from qframework.quant_tensor.float_quant_tensor import MinifloatRecord

#: Codes that are told apart; wider formats have too many to be used by any tensor.
_MOST_CODES = 2**16
#: Grid values that are listed.
_MOST_VALUES = 256


@dataclass(frozen=True)
class Grid:
    """The numbers of a format in units of the scale, shifted by the zero point.

    Attributes:
        low: the smallest; what is below it by more than ``room`` is clipped.
        high: the largest.
        room: half a step at either end.
        count: how many there are; None where they aren't told apart.
        levels: all of them, increasing; None for integers.
        bits: of a code.
    """

    low: float
    high: float
    room: tuple[float, float]
    count: int | None
    levels: Tensor | None
    bits: float

    @property
    def clips(self) -> bool:
        """Whether values can be out of range: a sign alone has no range."""
        return not (self.levels is None and self.bits < 2 and self.low < 0)

    def indices(self, codes: Tensor) -> Tensor:
        """The place on the grid, from 0, of numbers that are on it."""
        if self.levels is None:
            step = 2 if not self.clips else 1
            index = (codes - self.low) / step
        else:
            levels = self.levels.to(codes)
            middles = (levels[1:] + levels[:-1]) / 2
            index = torch.bucketize(codes, middles).to(codes)
        return index.round().nan_to_num(0).clamp(0, (self.count or 1) - 1).long()

    def values(self, scale: float, zero_point: float) -> list[float] | None:
        """The numbers as values, for one scale; None where there are too many to show."""
        if self.count is None or self.count > _MOST_VALUES:
            return None
        if self.levels is None:
            step = 2 if not self.clips else 1
            levels = [self.low + step * i for i in range(self.count)]
        else:
            levels = self.levels.tolist()
        return [(v - zero_point) * scale for v in levels]


def grid_of(q: Any, narrow: bool) -> Grid | None:
    """The grid of a quantized tensor; None for a format that isn't known.

    Args:
        q: the tensor.
        narrow: whether the range of integers leaves out the smallest.
    """
    if isinstance(q, CodebookQuantTensor):
        levels = upcast(q.codebook.detach())
        return _table(levels, float(max(1, (levels.numel() - 1).bit_length())))
    if isinstance(q, MinifloatRecord):
        return _minifloat(q)
    bits = getattr(q, "bit_width", None)
    if not isinstance(bits, Tensor):
        return None
    width = bits.detach().float()
    number = float(width)
    low, high = float(min_int(q.signed, narrow, width)), float(max_int(q.signed, narrow, width))
    if number < 2 and q.signed:
        return Grid(-1.0, 1.0, (0.5, 0.5), 2, None, number)
    count = int(high - low) + 1
    return Grid(low, high, (0.5, 0.5), count if count <= _MOST_CODES else None, None, number)


def _minifloat(q: MinifloatRecord) -> Grid:
    exponent, mantissa = int(q.exponent_bit_width), int(q.mantissa_bit_width)
    bits = exponent + mantissa + bool(q.signed)
    high = q.largest()
    if exponent + mantissa > 8:
        return Grid(-high if q.signed else 0.0, high, (0.0, 0.0), None, None, float(bits))
    parts = torch.arange(2**mantissa, dtype=torch.float32) / 2**mantissa
    bias = float(q.exponent_bias)
    rows = [parts * 2.0 ** (1 - bias)]
    rows += [(1 + parts) * 2.0 ** (e - bias) for e in range(1, 2**exponent)]
    levels = torch.cat(rows)
    levels = levels[levels <= high]
    if q.signed:
        levels = torch.cat([-levels.flip(0)[:-1], levels])
    return _table(levels, float(bits))


def _table(levels: Tensor, bits: float) -> Grid:
    """A grid of listed numbers."""
    ends = levels.tolist()
    room = ((ends[1] - ends[0]) / 2, (ends[-1] - ends[-2]) / 2) if len(ends) > 1 else (0.0, 0.0)
    return Grid(ends[0], ends[-1], room, len(ends), levels.detach(), bits)
