"""How values are quantized, as kernels pass it on and C++ functions are told it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

from torch import Tensor

from qframework.functional import IntegerGrid, MinifloatGrid, ScaleRule
from qframework.kernels.native.build import Call

#: How numbers become integers; the last is for significands of minifloats, half to even.
ROUNDINGS = {"round": 0, "ceil": 1, "floor": 2, "round_to_zero": 3, "minifloat": 4}
_DOMAINS = {"fp": 0, "log_fp": 1, "power_of_two": 2}
#: Exponents of normal numbers of float32: those of the steps of a format have to be among them.
_LEAST_EXPONENT = -126
#: What values are rounded to.
Grid = IntegerGrid | MinifloatGrid


def rounding_of(grid: Grid) -> str:
    """The name in :data:`ROUNDINGS` of how a grid rounds; empty for one that C++ functions don't know."""
    if isinstance(grid, IntegerGrid):
        return "" if isinstance(grid.minimum, Tensor) else grid.rounding
    bits, bias = grid.format.mantissa_bits, grid.format.exponent_bias
    known = grid.rounding == "round" and bits >= 1 and 1 - bias - bits >= _LEAST_EXPONENT
    return "minifloat" if known else ""


class Scheme:
    """A grid, how the scale is made, and whether a ReLU comes before.

    What C++ functions are told of it is laid out once, when the first is called, for all calls.

    Args:
        grid: what values are rounded to.
        rule: of the scale; None for one that is known.
        relu: whether ``relu(x)`` is quantized.
    """

    __slots__ = ("_address", "_calls", "grid", "is_whole", "relu", "rounding", "rule")

    def __init__(self, grid: Grid, rule: ScaleRule | None = None, relu: bool = False) -> None:
        self.grid, self.rule, self.relu = grid, rule, relu
        #: see :func:`rounding_of`
        self.rounding = rounding_of(grid)
        #: whether there is one scale for all
        self.is_whole = rule is None or (rule.channel_axis is None and rule.reduced_axis is None)
        self._address = 0
        self._calls: list[Call] = []  # another thread may lay one out, too: both stay

    def along_last(self) -> Scheme:
        """The same for groups that were moved to the last axis."""
        assert self.rule is not None
        return Scheme(self.grid, replace(self.rule, reduced_axis=-1), self.relu)

    def told(self) -> int:
        """The address of a :class:`~qframework.kernels.native.build.Call` that names no tensors, as long as this is there."""
        if not self._address:
            numbers = {**_numbers_of(self.grid), **_numbers_of_scale(self.rule)}
            call = Call(relu=self.relu, rounding=ROUNDINGS[self.rounding], **numbers)
            self._calls.append(call)
            self._address = ctypes.addressof(call)
        return self._address


def _numbers_of(grid: Grid) -> dict[str, Any]:
    if isinstance(grid, IntegerGrid):
        clamps = 2 if grid.clips_first else int(grid.clamp_gradient)
        return {"low": grid.minimum, "high": grid.maximum, "clamp_gradient": clamps}
    mantissa, bias, largest, signed, overflow = grid.format
    return {
        "low": -largest if signed else 0.0,
        "high": largest,
        "least_normal": 2.0 ** (1 - bias),
        "overflow": overflow,
        "mantissa_bits": mantissa,
        "clamp_gradient": int(grid.clamp_gradient),
    }


def _numbers_of_scale(rule: ScaleRule | None) -> dict[str, Any]:
    if rule is None:
        return {"threshold": 1.0}
    rounds = rule.domain == "power_of_two"
    return {
        "threshold": rule.threshold,
        "smallest": rule.minimum or 0.0,
        "domain": _DOMAINS[rule.domain],
        "exponent_rounding": ROUNDINGS[rule.rounding] if rounds else 0,
    }
