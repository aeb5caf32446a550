"""Activations whose scale is computed from each input, for a tensor or for each row (last axis)."""

from __future__ import annotations

from typing import Any

from qframework.core.dynamic import RuntimeDynamicStatsZeroPoint
from qframework.core.function_wrapper import FloorSte
from qframework.core.stats import NegativeMinOrZero
from qframework.inject import Injector
from qframework.proxy import DynamicActQuantProxyFromInjector
from qframework.quantizers.base import (
    IntQuant,
    MaxStatsScaling,
    MinMaxStatsScaling,
    PerTensorFloatScaling8bit,
    PerTensorPoTScaling8bit,
    UintQuant,
)
from qframework.quantizers.solver import ActQuantSolver

__all__ = [
    "DynamicAct",
    "Int8DynamicActPerRowFixedPoint",
    "Int8DynamicActPerRowFloat",
    "Int8DynamicActPerTensorFloat",
    "PerRow",
    "ShiftedMinDynamicUintQuant",
    "ShiftedUint8DynamicActPerRowFloat",
    "ShiftedUint8DynamicActPerTensorFloat",
    "Uint8DynamicActPerTensorFloat",
]


class DynamicAct(Injector):
    """The scale of each input's own statistic."""

    proxy_class = DynamicActQuantProxyFromInjector


class PerRow(Injector):
    """A scale for each row, the last axis."""

    scaling_per_row = True
    stats_reduce_dim = 1


class ShiftedMinDynamicUintQuant(UintQuant):
    """Unsigned integers; the zero point maps the minimum of the input, or 0, to 0."""

    zero_point_impl: Any = RuntimeDynamicStatsZeroPoint
    zero_point_stats_impl = NegativeMinOrZero
    quantize_zero_point = True


class Int8DynamicActPerTensorFloat(
    DynamicAct, IntQuant, MaxStatsScaling, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit signed activations, ``scale = max|x| / 128``."""


class Int8DynamicActPerRowFloat(PerRow, Int8DynamicActPerTensorFloat):
    """8-bit signed activations, ``scale = max|x| / 128`` of each row."""


class Int8DynamicActPerRowFixedPoint(
    PerRow, DynamicAct, IntQuant, MaxStatsScaling, PerTensorPoTScaling8bit, ActQuantSolver
):
    """8-bit signed activations, ``scale = 2^floor(log2 max|x|) / 128`` of each row."""

    restrict_value_float_to_int_impl: Any = FloorSte


class Uint8DynamicActPerTensorFloat(
    DynamicAct, UintQuant, MaxStatsScaling, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations, ``scale = max|x| / 255``."""


class ShiftedUint8DynamicActPerTensorFloat(
    DynamicAct,
    ShiftedMinDynamicUintQuant,
    MinMaxStatsScaling,
    PerTensorFloatScaling8bit,
    ActQuantSolver,
):
    """8-bit unsigned activations with an integer zero point, over the range of the input, 0 included."""


class ShiftedUint8DynamicActPerRowFloat(PerRow, ShiftedUint8DynamicActPerTensorFloat):
    """8-bit unsigned activations with an integer zero point for each row."""
