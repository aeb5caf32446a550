"""Unsigned integers with a float scale and a zero point."""

from __future__ import annotations

from qframework.quantizers.base import (
    MinMaxStatsScaling,
    ParamFromRuntimePercentileIntervalScaling,
    PerChannelFloatScaling8bit,
    PerTensorFloatScaling8bit,
    ShiftedMinUintQuant,
    ShiftedParamFromPercentileUintQuant,
)
from qframework.quantizers.searched import (
    HQOActZeroPoint,
    HQOWeightZeroPoint,
    MSEActZeroPoint,
    MSEAsymmetricScale,
    MSEWeightZeroPoint,
)
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "ShiftedUint8ActPerTensorFloat",
    "ShiftedUint8ActPerTensorFloatHQO",
    "ShiftedUint8ActPerTensorFloatMSE",
    "ShiftedUint8WeightPerChannelFloat",
    "ShiftedUint8WeightPerChannelFloatHQO",
    "ShiftedUint8WeightPerChannelFloatMSE",
    "ShiftedUint8WeightPerTensorFloat",
    "ShiftedUint8WeightPerTensorFloatHQO",
    "ShiftedUint8WeightPerTensorFloatMSE",
]


class ShiftedUint8WeightPerTensorFloat(
    ShiftedMinUintQuant, MinMaxStatsScaling, PerTensorFloatScaling8bit, WeightQuantSolver
):
    """8-bit unsigned weights with an integer zero point, over ``[min(w, 0), max(w, 0)]``."""


class ShiftedUint8WeightPerChannelFloat(
    ShiftedMinUintQuant, MinMaxStatsScaling, PerChannelFloatScaling8bit, WeightQuantSolver
):
    """8-bit unsigned weights with an integer zero point per output channel."""


class ShiftedUint8ActPerTensorFloat(
    ShiftedParamFromPercentileUintQuant,
    ParamFromRuntimePercentileIntervalScaling,
    PerTensorFloatScaling8bit,
    ActQuantSolver,
):
    """8-bit unsigned activations with an integer zero point; both are collected, then learned."""


# ------------------------------------------------------------------ searched scales and zero points


class ShiftedUint8WeightPerTensorFloatMSE(
    MSEAsymmetricScale, MSEWeightZeroPoint, ShiftedUint8WeightPerTensorFloat
):
    """8-bit unsigned weights; scale and zero point have the least squared error, then they are learned."""


class ShiftedUint8WeightPerTensorFloatHQO(HQOWeightZeroPoint, ShiftedUint8WeightPerTensorFloat):
    """8-bit unsigned weights; a zero point, not rounded, starts from half-quadratic optimization."""


class ShiftedUint8WeightPerChannelFloatMSE(
    MSEAsymmetricScale, MSEWeightZeroPoint, ShiftedUint8WeightPerChannelFloat
):
    """8-bit unsigned weights; scale and zero point per output channel have the least squared error, then they are learned."""


class ShiftedUint8WeightPerChannelFloatHQO(HQOWeightZeroPoint, ShiftedUint8WeightPerChannelFloat):
    """8-bit unsigned weights; a zero point per output channel, not rounded, starts from half-quadratic optimization."""


class ShiftedUint8ActPerTensorFloatMSE(
    MSEAsymmetricScale, MSEActZeroPoint, ShiftedUint8ActPerTensorFloat
):
    """8-bit unsigned activations with a zero point; both, of least squared error, are collected, then learned."""


class ShiftedUint8ActPerTensorFloatHQO(HQOActZeroPoint, ShiftedUint8ActPerTensorFloat):
    """8-bit unsigned activations; the zero point, not rounded, comes from half-quadratic optimization."""
