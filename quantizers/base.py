"""Building blocks of the predefined quantizers: each sets one policy, or two that belong together."""

from __future__ import annotations

from typing import Any

from qframework.core.function_wrapper import CeilSte
from qframework.core.stats import NegativeMinOrZero, NegativePercentileOrZero
from qframework.core.zero_point import (
    ParameterFromRuntimeZeroPoint,
    StatsFromParameterZeroPoint,
    ZeroZeroPoint,
)
from qframework.inject import Injector
from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
)

__all__ = [
    "BatchQuantStatsScaling1d",
    "BatchQuantStatsScaling2d",
    "IntQuant",
    "MaxStatsScaling",
    "MinMaxStatsScaling",
    "NarrowIntQuant",
    "ParamFromRuntimeMinMaxScaling",
    "ParamFromRuntimePercentileIntervalScaling",
    "ParamFromRuntimePercentileScaling",
    "ParamMinMaxInitScaling",
    "PerChannelFloatScaling8bit",
    "PerChannelPoTScaling8bit",
    "PerTensorConstScaling2bit",
    "PerTensorFloatScaling8bit",
    "PerTensorPoTScaling8bit",
    "ShiftedMinUintQuant",
    "ShiftedParamFromPercentileUintQuant",
    "SignedBinaryClampedConst",
    "UintQuant",
]

# ------------------------------------------------------------------ integers


class IntQuant(Injector):
    """Signed integers, full range, no zero point."""

    quant_type = QuantType.INT
    bit_width_impl_type = BitWidthImplType.CONST
    float_to_int_impl_type = FloatToIntImplType.ROUND
    narrow_range = False
    signed = True
    zero_point_impl: Any = ZeroZeroPoint


class NarrowIntQuant(IntQuant):
    """Signed integers, symmetric range, no zero point."""

    narrow_range = True


class UintQuant(IntQuant):
    """Unsigned integers, no zero point."""

    signed = False


class ShiftedMinUintQuant(UintQuant):
    """Unsigned integers; the zero point maps the minimum of a parameter, or 0, to 0."""

    zero_point_impl: Any = StatsFromParameterZeroPoint
    zero_point_stats_impl: Any = NegativeMinOrZero
    quantize_zero_point = True


class ShiftedParamFromPercentileUintQuant(UintQuant):
    """Unsigned integers; the zero point is collected from a low percentile of activations, then learned."""

    zero_point_impl: Any = ParameterFromRuntimeZeroPoint
    zero_point_stats_impl: Any = NegativePercentileOrZero
    low_percentile_q = 0.001
    quantize_zero_point = True


# ------------------------------------------------------------------ scales


class MaxStatsScaling(Injector):
    """The absolute maximum, at every call."""

    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.MAX
    scaling_min_val = 1e-10


class MinMaxStatsScaling(Injector):
    """The width of the range, at every call."""

    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.MIN_MAX
    scaling_min_val = 1e-10


class ParamFromRuntimePercentileScaling(Injector):
    """A high percentile of magnitudes, collected, then learned."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.PERCENTILE
    high_percentile_q = 99.999
    collect_stats_steps = 300
    scaling_min_val = 1e-10


class ParamFromRuntimePercentileIntervalScaling(ParamFromRuntimePercentileScaling):
    """The interval between a low and a high percentile, collected, then learned."""

    scaling_stats_op = StatsOp.PERCENTILE_INTERVAL
    low_percentile_q = 0.001


class ParamFromRuntimeMinMaxScaling(Injector):
    """The width of the range, collected, then learned."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.MIN_MAX
    collect_stats_steps = 300
    scaling_min_val = 1e-10


class ParamMinMaxInitScaling(Injector):
    """Learned, from ``min_val`` and ``max_val`` on, which a user gives."""

    scaling_impl_type = ScalingImplType.PARAMETER


class _BatchQuantStatsScaling(Injector):
    scaling_impl_type = ScalingImplType.AFFINE_STATS
    scaling_stats_op = StatsOp.MAX_AVE
    scaling_stats_momentum = None
    scaling_min_val = 1e-10


class BatchQuantStatsScaling1d(_BatchQuantStatsScaling):
    """Mean over channels of the maximum of (N, C, L) inputs, per batch, running mean in evaluation."""

    scaling_stats_permute_dims = (1, 0, 2)


class BatchQuantStatsScaling2d(_BatchQuantStatsScaling):
    """Mean over channels of the maximum of (N, C, H, W) inputs, per batch, running mean in evaluation."""

    scaling_stats_permute_dims = (1, 0, 2, 3)


class PerTensorFloatScaling8bit(Injector):
    """8 bits, one float scale a tensor."""

    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.FP
    bit_width = 8


class PerChannelFloatScaling8bit(PerTensorFloatScaling8bit):
    """8 bits, one float scale an output channel."""

    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class PerTensorPoTScaling8bit(Injector):
    """8 bits, one power-of-two scale a tensor, rounded up."""

    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl: Any = CeilSte
    bit_width = 8


class PerChannelPoTScaling8bit(PerTensorPoTScaling8bit):
    """8 bits, one power-of-two scale an output channel, rounded up."""

    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class PerTensorConstScaling2bit(Injector):
    """2 bits, one fixed float scale a tensor."""

    scaling_per_output_type = ScalingPerOutputType.TENSOR
    scaling_impl_type = ScalingImplType.CONST
    restrict_scaling_type = RestrictValueType.FP
    bit_width = 2


class SignedBinaryClampedConst(Injector):
    """-s and s with a fixed s; the gradient stops outside."""

    quant_type = QuantType.BINARY
    scaling_impl_type = ScalingImplType.CONST
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    restrict_scaling_type = RestrictValueType.FP
    bit_width = 1
    narrow_range = True
    signed = True
