"""Integers with a power-of-two scale: fixed-point numbers."""

from __future__ import annotations

from qframework.quantizers.base import (
    IntQuant,
    MaxStatsScaling,
    NarrowIntQuant,
    ParamFromRuntimePercentileIntervalScaling,
    ParamFromRuntimePercentileScaling,
    ParamMinMaxInitScaling,
    PerChannelPoTScaling8bit,
    PerTensorPoTScaling8bit,
    ShiftedParamFromPercentileUintQuant,
    UintQuant,
)
from qframework.quantizers.searched import MSEActZeroPoint, MSEAsymmetricScale, MSESymmetricScale
from qframework.quantizers.solver import ActQuantSolver, BiasQuantSolver, WeightQuantSolver

__all__ = [
    "Int8ActPerTensorFixedPoint",
    "Int8ActPerTensorFixedPointMSE",
    "Int8ActPerTensorFixedPointMinMaxInit",
    "Int8BiasPerTensorFixedPointInternalScaling",
    "Int8WeightPerChannelFixedPoint",
    "Int8WeightPerChannelFixedPointMSE",
    "Int8WeightPerTensorFixedPoint",
    "Int8WeightPerTensorFixedPointMSE",
    "ShiftedUint8ActPerTensorFixedPoint",
    "ShiftedUint8ActPerTensorFixedPointMSE",
    "Uint8ActPerTensorFixedPoint",
    "Uint8ActPerTensorFixedPointMSE",
    "Uint8ActPerTensorFixedPointMaxInit",
]


class Int8WeightPerTensorFixedPoint(
    NarrowIntQuant, MaxStatsScaling, PerTensorPoTScaling8bit, WeightQuantSolver
):
    """8-bit symmetric weights, ``scale = 2^ceil(log2 max|w|) / 128``."""


class Int8WeightPerChannelFixedPoint(
    NarrowIntQuant, MaxStatsScaling, PerChannelPoTScaling8bit, WeightQuantSolver
):
    """8-bit symmetric weights, ``scale = 2^ceil(log2 max|w|) / 128`` per output channel."""


class Int8ActPerTensorFixedPoint(
    IntQuant, ParamFromRuntimePercentileScaling, PerTensorPoTScaling8bit, ActQuantSolver
):
    """8-bit signed activations; the exponent of the scale is collected, then learned."""


class Uint8ActPerTensorFixedPoint(
    UintQuant, ParamFromRuntimePercentileScaling, PerTensorPoTScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations; the exponent of the scale is collected, then learned."""


class ShiftedUint8ActPerTensorFixedPoint(
    ShiftedParamFromPercentileUintQuant,
    ParamFromRuntimePercentileIntervalScaling,
    PerTensorPoTScaling8bit,
    ActQuantSolver,
):
    """8-bit unsigned activations with an integer zero point and a power-of-two scale."""


class Int8ActPerTensorFixedPointMinMaxInit(
    IntQuant, ParamMinMaxInitScaling, PerTensorPoTScaling8bit, ActQuantSolver
):
    """8-bit signed activations; the exponent is learned from ``min_val`` and ``max_val`` on, both required."""


class Uint8ActPerTensorFixedPointMaxInit(
    UintQuant, ParamMinMaxInitScaling, PerTensorPoTScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations; the exponent is learned from ``max_val`` on, which is required."""

    min_val = 0.0


class Int8BiasPerTensorFixedPointInternalScaling(
    IntQuant, MaxStatsScaling, PerTensorPoTScaling8bit, BiasQuantSolver
):
    """8-bit bias with a power-of-two scale of its own."""

    requires_input_scale = False


# ------------------------------------------------------------------ searched scales


class Int8WeightPerTensorFixedPointMSE(MSESymmetricScale, Int8WeightPerTensorFixedPoint):
    """8-bit symmetric weights; the power of two that has the least squared error."""


class Int8WeightPerChannelFixedPointMSE(MSESymmetricScale, Int8WeightPerChannelFixedPoint):
    """8-bit symmetric weights; the power of two that has the least squared error per output channel."""


class Int8ActPerTensorFixedPointMSE(MSESymmetricScale, Int8ActPerTensorFixedPoint):
    """8-bit signed activations; the exponent of least squared error is collected, then learned."""


class Uint8ActPerTensorFixedPointMSE(MSESymmetricScale, Uint8ActPerTensorFixedPoint):
    """8-bit unsigned activations; the exponent of least squared error is collected, then learned."""


class ShiftedUint8ActPerTensorFixedPointMSE(
    MSEAsymmetricScale, MSEActZeroPoint, ShiftedUint8ActPerTensorFixedPoint
):
    """8-bit unsigned activations with a zero point; both, of least squared error, are collected, then learned."""
