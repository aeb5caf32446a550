"""Fewer bits for an accumulator: truncate, round, or shift by a learned power of two."""

from __future__ import annotations

from typing import Any

from qframework.core.function_wrapper import CeilSte
from qframework.inject import Injector
from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    StatsOp,
    TruncScalingImplType,
)
from qframework.quantizers.trunc_solver import TruncQuantSolver

__all__ = [
    "IntTrunc",
    "RoundTo8bit",
    "ShiftRoundSaturateTo8bit",
    "TruncTo8bit",
]


class IntTrunc(Injector):
    """The most significant bits, 8 by default."""

    quant_type = QuantType.INT
    bit_width_impl_type = BitWidthImplType.CONST
    bit_width = 8
    trunc_scaling_impl_type: Any = TruncScalingImplType.MSB
    narrow_range = False


class TruncTo8bit(IntTrunc, TruncQuantSolver):
    """The 8 most significant bits, rounded down."""

    float_to_int_impl_type = FloatToIntImplType.FLOOR


class RoundTo8bit(IntTrunc, TruncQuantSolver):
    """The 8 most significant bits, rounded to nearest."""

    float_to_int_impl_type = FloatToIntImplType.ROUND


class ShiftRoundSaturateTo8bit(IntTrunc, TruncQuantSolver):
    """8 bits after a shift that follows from a percentile of the integers, collected, then learned."""

    float_to_int_impl_type = FloatToIntImplType.ROUND
    trunc_scaling_impl_type = TruncScalingImplType.WRAPPER
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.PERCENTILE
    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl = CeilSte
    high_percentile_q = 99.999
    collect_stats_steps = 300
    scaling_min_val = 1e-10
