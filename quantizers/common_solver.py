"""What quantizers of all kinds have in common: the slots that are chosen alike."""

from __future__ import annotations

import math
from typing import Any

from qframework.core.function_wrapper import (
    Identity,
    OverOutputChannelView,
    OverTensorView,
)
from qframework.core.groups import OverSubChannelBlockView
from qframework.core.quant import IntQuant
from qframework.core.zero_point import ZeroZeroPoint
from qframework.inject import Injector, PolicyValueError, this, value
from qframework.inject import choices as table
from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingPerOutputType,
    StatsOp,
)
from qframework.proxy import (
    QuantProxy,
)

__all__ = ["QuantSolver"]

_CHANNEL, _TENSOR = ScalingPerOutputType.CHANNEL, ScalingPerOutputType.TENSOR
_GROUP = ScalingPerOutputType.GROUP


class QuantSolver(Injector):
    """What all kinds of quantizers have in common."""

    quant_type = QuantType.INT
    bit_width_impl_type = BitWidthImplType.CONST
    float_to_int_impl_type = FloatToIntImplType.ROUND
    restrict_scaling_type = RestrictValueType.FP
    scaling_per_output_type = _TENSOR
    int_quant = IntQuant
    zero_point_impl: Any = ZeroZeroPoint

    @value
    def input_view_impl(scaling_per_output: ScalingPerOutputType) -> Any:
        return OverSubChannelBlockView if scaling_per_output == _GROUP else Identity

    @value
    def bit_width_impl(bit_width_impl_type: BitWidthImplType) -> Any:
        return table.choose(
            table.BIT_WIDTH, "bit_width_impl_type", bit_width_impl_type, "a quantizer"
        )

    @value
    def float_to_int_impl(float_to_int_impl_type: FloatToIntImplType) -> Any:
        return table.ROUNDING[float_to_int_impl_type]

    @value
    def restrict_scaling_impl(restrict_scaling_type: RestrictValueType) -> Any:
        return table.RESTRICT[restrict_scaling_type]

    @value
    def int_scaling_impl(restrict_scaling_type: RestrictValueType) -> Any:
        return table.INT_THRESHOLD[restrict_scaling_type]

    @value
    def scaling_stats_impl(
        scaling_stats_op: StatsOp,
        scaling_per_output: ScalingPerOutputType = _TENSOR,
        restrict_scaling_type: RestrictValueType = RestrictValueType.FP,
    ) -> Any:
        if scaling_stats_op == StatsOp.MAX_AVE and scaling_per_output != _TENSOR:
            raise PolicyValueError(
                "scaling_stats_op='max_ave' is one number, the mean over channels of their largest magnitudes, and "
                f"scaling_per_output_type={str(scaling_per_output)!r} needs one for each; 'max' is that of each"
            )
        if scaling_stats_op in table.SIGNED_STATISTICS:
            allowed = (RestrictValueType.SIGNED_FP, RestrictValueType.FP, RestrictValueType.INT)
            if restrict_scaling_type not in allowed:
                raise PolicyValueError(
                    f"scaling_stats_op={str(scaling_stats_op)!r} can be negative, which "
                    f"restrict_scaling_type={str(restrict_scaling_type)!r} has no logarithm of; "
                    "use 'signed_fp', or another statistic"
                )
        return table.STATISTIC[scaling_stats_op]

    @value
    def scaling_per_output(
        scaling_per_output_type: ScalingPerOutputType, proxy_class: type[QuantProxy]
    ) -> Any:
        groups = proxy_class.is_groupwise or getattr(proxy_class, "takes_groups", False)
        if scaling_per_output_type == _GROUP and not groups:
            raise PolicyValueError(
                f"scaling_per_output_type='group' needs a proxy for groups, and {proxy_class.__name__} isn't one; "
                "derive from GroupwiseWeightProxyMixin or its kind, or choose 'tensor' or 'channel'"
            )
        return scaling_per_output_type

    @value
    def scaling_per_output_channel(scaling_per_output: ScalingPerOutputType) -> Any:
        return scaling_per_output == _CHANNEL

    @value
    def stats_reduce_dim(
        scaling_per_output: ScalingPerOutputType, scaling_stats_op: StatsOp | None = None
    ) -> Any:
        if scaling_per_output == _GROUP:
            return this.group_stats_reduce_dim
        return 1 if scaling_per_output == _CHANNEL or scaling_stats_op == StatsOp.MAX_AVE else None

    @value
    def group_stats_reduce_dim(group_dim: int) -> Any:
        return group_dim if group_dim < 0 else group_dim + 1

    @value
    def keepdim(scaling_per_output: ScalingPerOutputType) -> Any:
        return scaling_per_output == _GROUP

    @value
    def scaling_stats_input_view_shape_impl(
        scaling_per_output: ScalingPerOutputType, scaling_stats_op: StatsOp | None = None
    ) -> Any:
        if scaling_per_output == _GROUP:
            return OverSubChannelBlockView
        rows = scaling_per_output == _CHANNEL or scaling_stats_op == StatsOp.MAX_AVE
        return OverOutputChannelView if rows else OverTensorView

    @value
    def stats_output_shape(scaling_shape: tuple[int, ...]) -> Any:
        return (
            ()
            if math.prod(scaling_shape) == 1 and len(scaling_shape) == 0
            else (math.prod(scaling_shape),)
        )

    zero_point_stats_input_view_shape_impl = this.scaling_stats_input_view_shape_impl
    zero_point_shape = this.scaling_shape
    #: the zero point's statistic while a scale is searched for
    zero_point_search_start = this.zero_point_stats_impl
