"""Integers with a float scale and no zero point."""

from __future__ import annotations

from qframework.quantizers.base import (
    BatchQuantStatsScaling1d,
    BatchQuantStatsScaling2d,
    IntQuant,
    MaxStatsScaling,
    NarrowIntQuant,
    ParamFromRuntimePercentileScaling,
    ParamMinMaxInitScaling,
    PerChannelFloatScaling8bit,
    PerTensorFloatScaling8bit,
    UintQuant,
)
from qframework.quantizers.searched import HQOSymmetricScale, MSESymmetricScale
from qframework.quantizers.solver import ActQuantSolver, BiasQuantSolver, WeightQuantSolver

__all__ = [
    "Int16Bias",
    "Int24Bias",
    "Int32Bias",
    "Int8ActPerTensorFloat",
    "Int8ActPerTensorFloatBatchQuant1d",
    "Int8ActPerTensorFloatBatchQuant2d",
    "Int8ActPerTensorFloatMSE",
    "Int8ActPerTensorFloatMinMaxInit",
    "Int8Bias",
    "Int8BiasPerTensorFloatInternalScaling",
    "Int8WeightPerChannelFloat",
    "Int8WeightPerChannelFloatHQO",
    "Int8WeightPerChannelFloatMSE",
    "Int8WeightPerTensorFloat",
    "Int8WeightPerTensorFloatHQO",
    "Int8WeightPerTensorFloatMSE",
    "IntBias",
    "Uint8ActPerTensorFloat",
    "Uint8ActPerTensorFloatBatchQuant1d",
    "Uint8ActPerTensorFloatBatchQuant2d",
    "Uint8ActPerTensorFloatMSE",
    "Uint8ActPerTensorFloatMaxInit",
]

# ------------------------------------------------------------------ weights


class Int8WeightPerTensorFloat(
    NarrowIntQuant, MaxStatsScaling, PerTensorFloatScaling8bit, WeightQuantSolver
):
    """8-bit symmetric weights, ``scale = max|w| / 127``."""


class Int8WeightPerChannelFloat(
    NarrowIntQuant, MaxStatsScaling, PerChannelFloatScaling8bit, WeightQuantSolver
):
    """8-bit symmetric weights, ``scale = max|w| / 127`` per output channel."""


# ------------------------------------------------------------------ activations


class Int8ActPerTensorFloat(
    IntQuant, ParamFromRuntimePercentileScaling, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit signed activations; the scale is collected for 300 steps, then learned."""


class Uint8ActPerTensorFloat(
    UintQuant, ParamFromRuntimePercentileScaling, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations; the scale is collected for 300 steps, then learned."""


class Int8ActPerTensorFloatMinMaxInit(
    IntQuant, ParamMinMaxInitScaling, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit signed activations; the scale is learned from ``min_val`` and ``max_val`` on, both required."""


class Uint8ActPerTensorFloatMaxInit(
    UintQuant, ParamMinMaxInitScaling, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations; the scale is learned from ``max_val`` on, which is required."""

    min_val = 0.0


class Int8ActPerTensorFloatBatchQuant1d(
    IntQuant, BatchQuantStatsScaling1d, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit signed activations (N, C, L), scaled by batch statistics as batch normalization is."""


class Int8ActPerTensorFloatBatchQuant2d(
    IntQuant, BatchQuantStatsScaling2d, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit signed activations (N, C, H, W), scaled by batch statistics as batch normalization is."""


class Uint8ActPerTensorFloatBatchQuant1d(
    UintQuant, BatchQuantStatsScaling1d, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations (N, C, L), scaled by batch statistics as batch normalization is."""


class Uint8ActPerTensorFloatBatchQuant2d(
    UintQuant, BatchQuantStatsScaling2d, PerTensorFloatScaling8bit, ActQuantSolver
):
    """8-bit unsigned activations (N, C, H, W), scaled by batch statistics as batch normalization is."""


# ------------------------------------------------------------------ biases


class IntBias(IntQuant, BiasQuantSolver):
    """Signed bias with the scale of the accumulator: input scale times weight scale. ``bit_width`` is required."""

    requires_input_scale = True


class Int8Bias(IntBias):
    """8-bit bias with the scale of the accumulator."""

    bit_width = 8


class Int16Bias(IntBias):
    """16-bit bias with the scale of the accumulator."""

    bit_width = 16


class Int24Bias(IntBias):
    """24-bit bias with the scale of the accumulator."""

    bit_width = 24


class Int32Bias(IntBias):
    """32-bit bias with the scale of the accumulator."""

    bit_width = 32


class Int8BiasPerTensorFloatInternalScaling(
    IntQuant, MaxStatsScaling, PerTensorFloatScaling8bit, BiasQuantSolver
):
    """8-bit bias with a scale of its own, ``max|b| / 128``."""

    requires_input_scale = False


# ------------------------------------------------------------------ searched scales


class Int8WeightPerTensorFloatMSE(MSESymmetricScale, Int8WeightPerTensorFloat):
    """8-bit symmetric weights; the scale has the least squared error, then it is learned."""


class Int8WeightPerChannelFloatMSE(MSESymmetricScale, Int8WeightPerChannelFloat):
    """8-bit symmetric weights; the scale of a channel has the least squared error, then it is learned."""


class Int8WeightPerTensorFloatHQO(HQOSymmetricScale, Int8WeightPerTensorFloat):
    """8-bit symmetric weights; the scale starts from half-quadratic optimization."""


class Int8WeightPerChannelFloatHQO(HQOSymmetricScale, Int8WeightPerChannelFloat):
    """8-bit symmetric weights; a scale per channel starts from half-quadratic optimization."""


class Int8ActPerTensorFloatMSE(MSESymmetricScale, Int8ActPerTensorFloat):
    """8-bit signed activations; the scale of least squared error is collected, then learned."""


class Uint8ActPerTensorFloatMSE(MSESymmetricScale, Uint8ActPerTensorFloat):
    """8-bit unsigned activations; the scale of least squared error is collected, then learned."""
