"""Weights whose integers and values have different scales: decoupled, weight-normalized, accumulator-aware."""

from __future__ import annotations

from typing import Any

from qframework.core.bit_width import BitWidthStatefulConst
from qframework.core.decoupled import (
    AbsMaxStep,
    AccumulatorAwareParameterPreScaling,
    AccumulatorAwareZeroCenterParameterPreScaling,
    DecoupledRescalingIntQuant,
    DecoupledRescalingIntQuantWithInput,
    ParameterPreScalingWeightNorm,
    PreZeroCenterZeroPoint,
    UnitThreshold,
)
from qframework.core.function_wrapper import (
    CeilSte,
    OverOutputChannelView,
    TensorClamp,
    TensorClampSte,
)
from qframework.core.quant import DecoupledIntQuant
from qframework.core.restrict_val import LogFloatRestrictValue, SignedFloatRestrictValue
from qframework.core.scaling import (
    ParameterFromStatsFromParameterScaling,
    PowerOfTwoIntScaling,
    StatsFromParameterScaling,
)
from qframework.core.stats import AbsMax, AbsMaxL2, L1Norm, L2Norm
from qframework.core.zero_point import ZeroZeroPoint
from qframework.inject import this, value
from qframework.inject.enum import (
    FloatToIntImplType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
)
from qframework.proxy import (
    DecoupledWeightQuantProxyFromInjector,
    DecoupledWeightQuantWithInputProxyFromInjector,
)
from qframework.quantizers.base import NarrowIntQuant
from qframework.quantizers.solver import WeightQuantSolver

__all__ = [
    "AccumulatorAwareWeightQuant",
    "AccumulatorAwareZeroCenterWeightQuant",
    "DecoupledWeightQuant",
    "Int4WeightPerTensorFixedPointDecoupled",
    "Int4WeightPerTensorFloatDecoupled",
    "Int8AccumulatorAwareWeightQuant",
    "Int8AccumulatorAwareZeroCenterWeightQuant",
    "Int8WeightNormL1PerChannelFixedPoint",
    "Int8WeightNormL2PerChannelFixedPoint",
    "Int8WeightNormLinfPerChannelFixedPoint",
    "Int8WeightPerChannelFloatDecoupled",
    "WeightNormPerChannelFloatDecoupled",
    "WeightPerChannelFloatDecoupled",
    "WeightPerTensorFloatDecoupledL2Param",
]

# ------------------------------------------------------------------ building blocks


class DecoupledWeightQuant(NarrowIntQuant):
    """Symmetric weights; the scale of the values starts from that of the integers, then it is learned."""

    tensor_quant: Any = DecoupledRescalingIntQuant
    decoupled_int_quant = DecoupledIntQuant
    proxy_class: Any = DecoupledWeightQuantProxyFromInjector
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    pre_scaling_impl: Any = StatsFromParameterScaling
    pre_zero_point_impl: Any = ZeroZeroPoint
    tensor_clamp_impl: Any = TensorClampSte
    scaling_min_val: Any = 1e-10


class WeightPerTensorFloatDecoupledL2Param(DecoupledWeightQuant):
    """One scale, the quadratic mean of the channels' maxima."""

    scaling_per_output_type = ScalingPerOutputType.TENSOR
    scaling_stats_impl = AbsMaxL2
    scaling_stats_input_view_shape_impl = OverOutputChannelView
    scaling_stats_input_concat_dim = 0
    stats_reduce_dim = 1


class WeightPerChannelFloatDecoupled(DecoupledWeightQuant):
    """A scale per channel, from its maximum."""

    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class WeightNormPerChannelFloatDecoupled(DecoupledWeightQuant):
    """A learned norm and two learned scales per channel; the scales are stored as logarithms.

    With ``scaling_per_output_type='tensor'`` the norms stay those of channels, and the scales are one number each.
    """

    tensor_clamp_impl: Any = TensorClamp
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    scaling_stats_input_view_shape_impl = OverOutputChannelView
    scaling_stats_input_concat_dim = 1
    stats_reduce_dim = 1
    restrict_scaling_type = RestrictValueType.LOG_FP
    scaling_stats_impl = AbsMaxStep
    int_scaling_impl = UnitThreshold
    pre_scaling_impl: Any = ParameterPreScalingWeightNorm
    pre_scaling_scale_impl = ParameterFromStatsFromParameterScaling
    pre_scaling_shape = this.scaling_per_output_channel_shape
    pre_scaling_min_val: Any = 1e-10
    restrict_pre_scaling_impl: Any = SignedFloatRestrictValue
    normalize_stats_impl: Any = L2Norm


class AccumulatorAwareWeightQuant(WeightNormPerChannelFloatDecoupled):
    """A2Q: rounded to zero, with a bound on the L1 norm of a channel's integers."""

    tensor_quant: Any = DecoupledRescalingIntQuantWithInput
    proxy_class: Any = DecoupledWeightQuantWithInputProxyFromInjector
    pre_scaling_impl: Any = AccumulatorAwareParameterPreScaling
    normalize_stats_impl: Any = L1Norm
    restrict_pre_scaling_impl: Any = LogFloatRestrictValue
    float_to_int_impl_type = FloatToIntImplType.ROUND_TO_ZERO
    accumulator_bit_width = 32

    @value
    def accumulator_bit_width_impl(accumulator_bit_width: Any, device: Any = None) -> Any:
        """The width as a buffer that is saved."""
        return BitWidthStatefulConst(accumulator_bit_width, device=device)


class AccumulatorAwareZeroCenterWeightQuant(AccumulatorAwareWeightQuant):
    """A2Q+: the same around the mean of each channel."""

    pre_scaling_impl: Any = AccumulatorAwareZeroCenterParameterPreScaling
    pre_zero_point_impl: Any = PreZeroCenterZeroPoint
    pre_zero_point_stats_input_view_shape_impl = OverOutputChannelView
    pre_zero_point_shape = this.pre_scaling_shape


# ------------------------------------------------------------------ quantizers


class Int4WeightPerTensorFloatDecoupled(WeightPerTensorFloatDecoupledL2Param, WeightQuantSolver):
    """4-bit symmetric weights; integers by ``||max of a channel||_2 / sqrt(C)``, values by a learned scale."""

    bit_width = 4


class Int8WeightPerChannelFloatDecoupled(WeightPerChannelFloatDecoupled, WeightQuantSolver):
    """8-bit symmetric weights; integers by a channel's maximum, values by a learned scale per channel."""

    bit_width = 8


class Int4WeightPerTensorFixedPointDecoupled(
    WeightPerTensorFloatDecoupledL2Param, WeightQuantSolver
):
    """4-bit symmetric weights with power-of-two scales; integers by a statistic, values by a learned one."""

    bit_width = 4
    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl = CeilSte
    int_scaling_impl = PowerOfTwoIntScaling


class Int8WeightNormL2PerChannelFixedPoint(WeightNormPerChannelFloatDecoupled, WeightQuantSolver):
    """8-bit weights of learned L2 norm per channel. The scales are floats, stored as logarithms."""

    bit_width = 8


class Int8WeightNormL1PerChannelFixedPoint(Int8WeightNormL2PerChannelFixedPoint):
    """8-bit weights of learned L1 norm per channel."""

    normalize_stats_impl: Any = L1Norm


class Int8WeightNormLinfPerChannelFixedPoint(Int8WeightNormL2PerChannelFixedPoint):
    """8-bit weights of learned largest magnitude per channel."""

    normalize_stats_impl: Any = AbsMax


class Int8AccumulatorAwareWeightQuant(AccumulatorAwareWeightQuant, WeightQuantSolver):
    """8-bit weights that no input can overflow ``accumulator_bit_width`` bits with (A2Q).

    https://arxiv.org/abs/2308.13504. The layer's input has to be quantized.
    """

    bit_width = 8


class Int8AccumulatorAwareZeroCenterWeightQuant(
    AccumulatorAwareZeroCenterWeightQuant, WeightQuantSolver
):
    """8-bit weights that no input can overflow ``accumulator_bit_width`` bits with, zero-centered (A2Q+).

    https://arxiv.org/abs/2401.10432. The layer's input has to be quantized.
    """

    bit_width = 8
