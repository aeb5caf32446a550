"""The values that a weight quantizer can give, its scale fixed: what algorithms round to, without calling the quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.binary import BinaryQuant, ClampedBinaryQuant, TernaryQuant
from qframework.core.codebook import CodebookQuant
from qframework.core.decoupled import DecoupledRescalingIntQuant
from qframework.core.float_quant import FloatQuant
from qframework.core.quant import RescalingIntQuant
from qframework.functional import nearest_entry, round_to_minifloat
from qframework.graph.in_place import strips
from qframework.graph.layer_view import LayerView
from qframework.proxy import WeightQuantProxyFromInjector
from qframework.quant_tensor import QuantTensor


class NoGrid(Exception):
    """A quantizer's values aren't known beforehand; the message says why."""


#: From numbers in steps of the scale, and the zero point, to the nearest ones of the grid, in steps of the scale.
Snap = Callable[[Tensor, Tensor], Tensor]

#: Relative room for the rounding errors of float32 between two ways to compute a grid's values.
_ROOM = 1e-5


class WeightGrid:
    """The grid of one weight.

    ``nearest(w) = snap(w / scale, zero_point) * scale``

    Attributes:
        scale: beside the weight, or its matrix.
        zero_point: likewise, in steps.
        snap: what rounds.
        lowest: smallest and largest number of steps, for grids that are evenly spaced; None for others.
        highest: see ``lowest``.
    """

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        snap: Snap,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.scale, self.zero_point, self.snap = scale, zero_point, snap
        self.bounds = bounds

    @property
    def is_even(self) -> bool:
        """Whether all steps are equally long."""
        return self.bounds is not None

    def nearest(self, w: Tensor) -> Tensor:
        """The nearest values, in the dtype of ``w``."""
        return self.snap(w / self.scale, self.zero_point).mul_(self.scale)

    def neighbours(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value not above ``w`` and the smallest one not below, the ends of the grid beyond them."""
        v = w / self.scale
        if self.bounds is not None:
            q = torch.floor(v + self.zero_point)
            low, high = self.bounds
            below = torch.clamp(q, low, high) - self.zero_point
            above = torch.clamp(q + 1, low, high) - self.zero_point
            return below * self.scale, above * self.scale
        levels = self.snap.levels().to(v)  # type: ignore[attr-defined]
        turned = v.mul(self.scale.sign()) if bool((self.scale < 0).any()) else v
        place = torch.searchsorted(levels, turned.contiguous(), right=True)
        last = len(levels) - 1
        below, above = levels[(place - 1).clamp(0, last)], levels[place.clamp(0, last)]
        return below * self.scale.abs(), above * self.scale.abs()

    def matrix(self, view: LayerView) -> WeightGrid:
        """The grid beside the weight's matrix ``(groups, columns, rows)``."""
        shape = view.layer.weight.shape
        parts = [view.to_matrix(t.expand(shape)) for t in (self.scale, self.zero_point)]
        scale, zero_point = (_without_columns(p) for p in parts)
        return WeightGrid(scale, zero_point, self.snap, self.bounds)

    def ordered(self, order: Tensor) -> WeightGrid:
        """The grid of a matrix whose columns are in another order, ``(groups, columns)``."""
        parts = [
            p if p.shape[1] == 1 else p.gather(1, order.unsqueeze(-1).expand(-1, -1, p.shape[2]))
            for p in (self.scale, self.zero_point)
        ]
        return WeightGrid(parts[0], parts[1], self.snap, self.bounds)

    def of_columns(self, start: int, stop: int) -> WeightGrid:
        """The grid of some columns of a matrix."""
        scale, zero_point = (
            p if p.shape[1] == 1 else p[:, start:stop] for p in (self.scale, self.zero_point)
        )
        return WeightGrid(scale, zero_point, self.snap, self.bounds)

    def of_part(self, part: slice, axes: int) -> WeightGrid:
        """The grid of a part of a weight's first axis; the weight has so many axes."""
        scale, zero_point = (
            t[part] if t.dim() == axes and t.shape[0] > 1 else t
            for t in (self.scale, self.zero_point)
        )
        return WeightGrid(scale, zero_point, self.snap, self.bounds)

    def of_rows(self, rows: slice) -> WeightGrid:
        """The grid of some rows of a matrix."""
        scale, zero_point = self.scale[:, :, rows], self.zero_point[:, :, rows]
        return WeightGrid(scale, zero_point, self.snap, self.bounds)

    def to(self, device: Any, dtype: torch.dtype) -> WeightGrid:
        """The same elsewhere."""
        bounds = self.bounds
        if bounds is not None:
            bounds = (bounds[0].to(device), bounds[1].to(device))
        snap = self.snap
        if isinstance(snap, _Integers):
            snap = _Integers(snap.lowest.to(device), snap.highest.to(device))
        elif isinstance(snap, _Entries):
            snap = _Entries(snap.codebook.to(device))
        scale, zero_point = (t.to(device, dtype) for t in (self.scale, self.zero_point))
        return WeightGrid(scale, zero_point, snap, bounds)


def _without_columns(matrix: Tensor) -> Tensor:
    """One column where all are the same, so that it broadcasts."""
    if matrix.shape[1] and bool((matrix == matrix[:, :1]).all()):
        return matrix[:, :1].contiguous()
    return matrix.contiguous()


class _Integers:
    def __init__(self, lowest: Tensor, highest: Tensor) -> None:
        self.lowest, self.highest = lowest, highest

    def __call__(self, v: Tensor, zero_point: Tensor) -> Tensor:
        q = v.add_(zero_point).round_()
        return torch.clamp(q, self.lowest, self.highest, out=q).sub_(zero_point)


class _Minifloats:
    def __init__(self, mantissa: Tensor, bias: Tensor, largest: Tensor, signed: bool) -> None:
        self.format = float(mantissa), float(bias), float(largest), signed

    def __call__(self, v: Tensor, zero_point: Tensor) -> Tensor:
        mantissa, bias, largest, signed = self.format
        return round_to_minifloat(v, None, mantissa, bias, largest, signed, None, torch.round)

    def levels(self) -> Tensor:
        """All values in increasing order."""
        mantissa, bias, largest, signed = self.format
        steps = torch.arange(2 ** int(mantissa), dtype=torch.float64) * 2.0**-mantissa
        smallest = 2.0 ** (1 - bias)
        found, power = [steps * smallest], smallest
        while power <= largest:
            found.append((1 + steps) * power)
            power *= 2
        positive = torch.cat(found)
        positive = positive[positive <= largest]
        return torch.cat([-positive.flip(0)[:-1], positive]) if signed else positive


class _Entries:
    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook

    def __call__(self, v: Tensor, zero_point: Tensor) -> Tensor:
        entries = self.codebook.to(v.dtype)
        return entries[nearest_entry(v.contiguous(), entries)]

    def levels(self) -> Tensor:
        """All values in increasing order."""
        return self.codebook


@torch.no_grad()
def grid_of(proxy: WeightQuantProxyFromInjector, weight: Tensor) -> WeightGrid:
    """The grid of a weight's quantizer, its scale that of the present weight.

    Args:
        proxy: ``layer.weight_quant``.
        weight: the float weight.

    Raises:
        NoGrid: nothing is quantized, or the quantizer's values aren't multiples of one scale that stays.
    """
    quantizer: Any = proxy.tensor_quant
    if quantizer is None:
        raise NoGrid("the weight isn't quantized")
    if proxy.requires_quant_input:
        raise NoGrid(f"{proxy.quantizer.__name__} quantizes the weight by its input")
    if proxy.disable_quant:
        raise NoGrid("quantization of the weight is disabled")
    found = proxy(weight)
    if not isinstance(found, QuantTensor):
        raise NoGrid("the weight isn't quantized")
    grid = _grid(quantizer, found)
    _check(grid, proxy, weight, found)
    return grid


def _grid(quantizer: nn.Module, found: Any) -> WeightGrid:
    made: Any = quantizer
    scale: Tensor = found.scale.detach()
    zero = getattr(found, "zero_point", None)
    zero_point = torch.zeros_like(scale) if zero is None else zero.detach()
    if isinstance(quantizer, RescalingIntQuant | DecoupledRescalingIntQuant):
        decoupled = isinstance(quantizer, DecoupledRescalingIntQuant)
        int_quant = made.decoupled_int_quant.int_quant if decoupled else made.int_quant
        bits = made.msb_clamp_bit_width_impl().detach()
        ends = (int_quant.min_int(bits).detach(), int_quant.max_int(bits).detach())
        return WeightGrid(scale, zero_point, _Integers(*ends), ends)
    if isinstance(quantizer, FloatQuant):
        _, mantissa, bias = made.widths()
        snap = _Minifloats(mantissa, bias, made.threshold(), made.signed)
        return WeightGrid(scale, torch.zeros_like(scale), snap)
    if isinstance(quantizer, CodebookQuant):
        return WeightGrid(scale, torch.zeros_like(scale), _Entries(made.codebook.detach()))
    if isinstance(quantizer, BinaryQuant | ClampedBinaryQuant | TernaryQuant):
        entries = [-1.0, 1.0] if not isinstance(quantizer, TernaryQuant) else [-1.0, 0.0, 1.0]
        codebook = torch.tensor(entries, dtype=scale.dtype, device=scale.device)
        return WeightGrid(scale, torch.zeros_like(scale), _Entries(codebook))
    raise NoGrid(f"{type(quantizer).__name__} doesn't say which values it gives")


def _check(grid: WeightGrid, proxy: Any, weight: Tensor, found: Any) -> None:
    """Refuse a grid whose values aren't those of the quantizer."""
    name, values = proxy.quantizer.__name__, found.value.detach()
    tiny = torch.finfo(torch.float32).tiny
    largest = 1.5 if grid.is_even else float("inf")
    for part in parts_of(weight):
        own, value = grid.of_part(part, weight.dim()), values[part].to(torch.float32)
        scale = own.scale.abs()
        again = own.nearest(value.clone())
        room = scale * _ROOM + _ROOM * value.abs()
        if not bool(((again - value).abs() <= room).all()):
            raise NoGrid(f"{name} gives values that aren't multiples of its scale alone")
        rounded = own.nearest(weight.detach()[part].to(torch.float32, copy=True))
        if not bool(((rounded - value).abs() / scale.clamp_min(tiny) <= largest).all()):
            raise NoGrid(f"{name} gives other values than the nearest ones")


def parts_of(weight: Tensor) -> Iterator[slice]:
    """Parts of a weight's first axis, so that what is computed of one needs little memory."""
    return strips(weight.shape[0], weight.numel() // max(weight.shape[0], 1))
