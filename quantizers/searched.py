"""Building blocks for scales and zero points that are searched for: least squared error, half-quadratic."""

from __future__ import annotations

from typing import Any

from torch import nn

from qframework.core.half_quadratic import (
    HalfQuadraticOptimizerScale,
    HalfQuadraticOptimizerZeroPoint,
)
from qframework.core.restrict_val import RestrictValue
from qframework.core.search import MSE, ScaleTrial, ZeroPointTrial
from qframework.core.searched_zero_point import (
    SearchedZeroPointFromParameter,
    SearchedZeroPointFromRuntime,
)
from qframework.core.stats import AbsMax, AbsMinMax, NegativeMinOrZero
from qframework.inject import Injector, this, value
from qframework.inject.enum import MSESearchMethod, ScalingImplType

__all__ = [
    "HQOActZeroPoint",
    "HQOAsymmetricScale",
    "HQOSymmetricScale",
    "HQOWeightZeroPoint",
    "MSEActZeroPoint",
    "MSEAsymmetricScale",
    "MSEAsymmetricScaleSubInjector",
    "MSESubInjectorBase",
    "MSESymmetricScale",
    "MSESymmetricScaleSubInjector",
    "MSEWeightZeroPoint",
    "MSEZeroPointSubInjector",
]


class _ScaleTrial(Injector):
    """How a candidate for the scale is tried: by the integers, clamp and domain of the quantizer itself."""

    @value
    def symmetric_scale_trial(
        int_quant: nn.Module,
        int_scaling_impl: nn.Module,
        bit_width_impl: nn.Module,
        restrict_scaling_impl: RestrictValue,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: RestrictValue | None = None,
        scaling_min_val: float | None = None,
    ) -> Any:
        return ScaleTrial(
            int_quant,
            int_scaling_impl,
            bit_width_impl,
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )

    @value
    def asymmetric_scale_trial(
        int_quant: nn.Module,
        int_scaling_impl: nn.Module,
        bit_width_impl: nn.Module,
        restrict_scaling_impl: RestrictValue,
        zero_point_search_start: nn.Module,
        quantize_zero_point: bool,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: RestrictValue | None = None,
        scaling_min_val: float | None = None,
    ) -> Any:
        return ScaleTrial(
            int_quant,
            int_scaling_impl,
            bit_width_impl,
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
            zero_point_search_start,
            quantize_zero_point,
        )


class _ZeroPointTrial(Injector):
    """How a candidate for the zero point is tried, at the scale that was found."""

    zero_point_search_start = NegativeMinOrZero

    @value
    def zero_point_trial(
        int_quant: nn.Module,
        int_scaling_impl: nn.Module,
        bit_width_impl: nn.Module,
        quantize_zero_point: bool,
    ) -> Any:
        return ZeroPointTrial(int_quant, int_scaling_impl, bit_width_impl, quantize_zero_point)


# ------------------------------------------------------------------ least squared error


class MSESubInjectorBase(Injector):
    """A search for the least squared error, nested in a quantizer."""

    stats_impl = MSE
    stats_reduce_dim = (this << 1).stats_reduce_dim
    keepdim = (this << 1).keepdim
    mse_iters = (this << 1).mse_iters
    mse_search_method = (this << 1).mse_search_method
    mse_bipolar_search = (this << 1).mse_bipolar_search


class MSESymmetricScaleSubInjector(MSESubInjectorBase):
    """Scales without zero point, up to the absolute maximum."""

    mse_init_op = AbsMax
    mse_trial = (this << 1).symmetric_scale_trial


class MSEAsymmetricScaleSubInjector(MSESubInjectorBase):
    """Scales with a zero point, up to the width of the range."""

    mse_init_op = AbsMinMax
    mse_trial = (this << 1).asymmetric_scale_trial


class MSEZeroPointSubInjector(MSESubInjectorBase):
    """Zero points, down to the minimum."""

    mse_init_op = (this << 1).zero_point_search_start
    mse_trial = (this << 1).zero_point_trial


class _MSE(Injector):
    mse_iters = 20
    mse_search_method = MSESearchMethod.GRID
    mse_bipolar_search = False


class MSESymmetricScale(_MSE, _ScaleTrial):
    """The scale, without zero point, that has the least squared error; learned from there on."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    mse_scale: Any = MSESymmetricScaleSubInjector
    scaling_stats_impl = this.mse_scale.stats_impl


class MSEAsymmetricScale(MSESymmetricScale):
    """The scale that has the least squared error beside a zero point; learned from there on."""

    mse_scale = MSEAsymmetricScaleSubInjector


class _MSEZeroPoint(_MSE, _ZeroPointTrial):
    mse_zero_point = MSEZeroPointSubInjector
    zero_point_stats_impl: Any = this.mse_zero_point.stats_impl


class MSEWeightZeroPoint(_MSEZeroPoint):
    """The zero point of a weight that has the least squared error at its scale; learned from there on."""

    zero_point_impl: Any = SearchedZeroPointFromParameter


class MSEActZeroPoint(_MSEZeroPoint):
    """The zero point of activations that has the least squared error, collected, then learned."""

    zero_point_impl: Any = SearchedZeroPointFromRuntime


# ------------------------------------------------------------------ half-quadratic


class HQOSymmetricScale(_ScaleTrial):
    """The scale, without zero point, by half-quadratic optimization; learned from there on."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_impl = HalfQuadraticOptimizerScale
    hqo_scale_trial = this.symmetric_scale_trial
    hqo_init_op_scale: Any = AbsMax
    hqo_beta_scale = 1e5
    hqo_kappa_scale = 1.01
    hqo_lp_norm_scale = 0.7
    hqo_iters_scale = 1000


class HQOAsymmetricScale(HQOSymmetricScale):
    """The scale by half-quadratic optimization beside a zero point; learned from there on."""

    hqo_scale_trial = this.asymmetric_scale_trial
    hqo_init_op_scale = AbsMinMax


class _HQOZeroPoint(_ZeroPointTrial):
    zero_point_stats_impl: Any = HalfQuadraticOptimizerZeroPoint
    hqo_zero_point_trial = this.zero_point_trial
    hqo_init_op_zp = this.zero_point_search_start
    hqo_beta_zp = 1.0
    hqo_kappa_zp = 1.01
    hqo_lp_norm_zp = 0.5
    hqo_iters_zp = 1000
    quantize_zero_point = False


class HQOWeightZeroPoint(_HQOZeroPoint):
    """The zero point of a weight by half-quadratic optimization, not rounded; learned from there on."""

    zero_point_impl: Any = SearchedZeroPointFromParameter


class HQOActZeroPoint(_HQOZeroPoint):
    """The zero point of activations by half-quadratic optimization, not rounded; collected, then learned."""

    zero_point_impl: Any = SearchedZeroPointFromRuntime
