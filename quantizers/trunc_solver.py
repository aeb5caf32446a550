"""How quantizers of accumulators resolve their policies."""

from __future__ import annotations

from typing import Any

from qframework.core.function_wrapper import TensorClamp
from qframework.inject import choices as table
from qframework.inject import value
from qframework.inject.enum import (
    QuantType,
    RestrictValueType,
    ScalingImplType,
    StatsOp,
    TruncScalingImplType,
)
from qframework.proxy import TruncQuantProxyFromInjector
from qframework.quantizers.solver import QuantSolver

__all__ = [
    "TruncQuantSolver",
]


class TruncQuantSolver(QuantSolver):
    """Accumulators: the scale is given, a divisor of the integers is sought."""

    proxy_class = TruncQuantProxyFromInjector
    trunc_scaling_impl_type: Any = TruncScalingImplType.MSB
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.PERCENTILE
    scaling_shape: Any = ()
    tensor_clamp_impl = TensorClamp

    @value
    def tensor_quant(quant_type: QuantType) -> Any:
        return table.choose(table.TRUNC_TENSOR_QUANT, "quant_type", quant_type, "an accumulator")

    @value
    def trunc_scaling_impl(trunc_scaling_impl_type: TruncScalingImplType) -> Any:
        return table.TRUNC_SCALING[trunc_scaling_impl_type]

    @value
    def scaling_impl(scaling_impl_type: ScalingImplType) -> Any:
        return table.choose(
            table.ACT_SCALING, "scaling_impl_type", scaling_impl_type, "an accumulator"
        )

    @value
    def trunc_int_scaling_impl(restrict_scaling_type: RestrictValueType) -> Any:
        return table.TRUNC_INT_THRESHOLD[restrict_scaling_type]
