"""How each kind of quantizer resolves its policies: one slot, one function, one table.

A solver comes last among the bases of a quantizer. It binds every slot that the quantizer doesn't bind itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from qframework.core.function_wrapper import (
    Identity,
    OverOutputChannelView,
    OverTensorView,
    TensorClamp,
    TensorClampSte,
)
from qframework.core.groups import OverSubChannelBlockView, RuntimeDynamicGroupStatsScaling
from qframework.core.quant import IntQuant
from qframework.core.zero_point import ZeroZeroPoint
from qframework.functional import grouped_shape
from qframework.inject import Injector, PolicyValueError, this, value
from qframework.inject import choices as table
from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    LearnedRoundImplType,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
)
from qframework.proxy import (
    ActQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    QuantProxy,
    WeightQuantProxyFromInjector,
)

__all__ = [
    "ActQuantSolver",
    "BiasQuantSolver",
    "QuantSolver",
    "WeightQuantSolver",
]

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
        scaling_stats_op: StatsOp, restrict_scaling_type: RestrictValueType = RestrictValueType.FP
    ) -> Any:
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


class ParameterQuantSolver(QuantSolver):
    """Weights and biases: the quantizer sees the parameters of its layers."""

    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.MAX
    learned_round_impl_type = LearnedRoundImplType.HARD_SIGMOID

    @value
    def scaling_impl(scaling_impl_type: ScalingImplType) -> Any:
        return table.choose(
            table.PARAMETER_SCALING, "scaling_impl_type", scaling_impl_type, "a parameter"
        )

    @value
    def tensor_clamp_impl(
        bit_width_impl_type: BitWidthImplType, scaling_impl_type: ScalingImplType
    ) -> Any:
        return _clamp(bit_width_impl_type, scaling_impl_type)

    @value
    def scaling_shape(
        scaling_per_output: ScalingPerOutputType, scaling_per_output_channel_shape: tuple[int, ...]
    ) -> Any:
        if scaling_per_output == _GROUP:
            return this.expanded_groupwise_shape
        return scaling_per_output_channel_shape if scaling_per_output == _CHANNEL else ()

    @value
    def scaling_stats_input_concat_dim(scaling_per_output: ScalingPerOutputType) -> Any:
        return 1 if scaling_per_output == _CHANNEL else 0

    zero_point_stats_input_concat_dim = this.scaling_stats_input_concat_dim

    @value
    def scaling_init(
        scaling_impl_type: ScalingImplType,
        tracked_parameter_list: list[torch.Tensor],
        scaling_const: float | None = None,
    ) -> Any:
        if scaling_impl_type == ScalingImplType.HE:
            return _he_scale(tracked_parameter_list)
        if scaling_const is None:
            raise PolicyValueError(
                f"scaling_impl_type={str(scaling_impl_type)!r} needs scaling_const, the largest value of the range"
            )
        return torch.tensor(float(scaling_const), device="cpu")

    @value
    def learned_round_impl(learned_round_impl_type: LearnedRoundImplType) -> Any:
        return table.LEARNED_ROUND[learned_round_impl_type]

    @value
    def learned_round_init(tracked_parameter_list: list[torch.Tensor]) -> Any:
        if len(tracked_parameter_list) > 1:
            raise PolicyValueError(
                "learned rounding belongs to one weight; its quantizer can't be shared"
            )
        return torch.zeros_like(tracked_parameter_list[0])


def _clamp(bit_width_impl_type: BitWidthImplType, scaling_impl_type: ScalingImplType) -> type:
    """A learned range needs the gradient of the clamp; one that follows the parameter doesn't clip."""
    learned = bit_width_impl_type == BitWidthImplType.PARAMETER or scaling_impl_type in (
        ScalingImplType.AFFINE_STATS,
        ScalingImplType.PARAMETER_FROM_STATS,
        ScalingImplType.PARAMETER,
    )
    return TensorClamp if learned else TensorClampSte


def _he_scale(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the parameters of ``sqrt(2 / fan_in)`` (https://arxiv.org/abs/1502.01852)."""
    fans = [math.prod(p.shape[1:]) for p in parameters]
    return torch.tensor(sum(math.sqrt(2.0 / f) for f in fans) / len(fans), device="cpu")


class WeightQuantSolver(ParameterQuantSolver):
    """Weights: scales of the shape of the output channels."""

    proxy_class = WeightQuantProxyFromInjector

    @value
    def tensor_quant(quant_type: QuantType) -> Any:
        return table.choose(table.WEIGHT_TENSOR_QUANT, "quant_type", quant_type, "a weight")

    @value
    def scaling_per_output_channel_shape(
        weight_ndims: int, output_channel_dim: int, out_channels: int
    ) -> Any:
        shape = [1] * weight_ndims
        shape[output_channel_dim] = out_channels
        return tuple(shape)

    @value
    def group_dim(output_channel_dim: int) -> Any:
        return 1 if output_channel_dim == 0 else 0

    @value
    def expanded_groupwise_shape(
        weight_shape: tuple[int, ...], group_size: int, group_dim: int, group_padding: bool = True
    ) -> Any:
        length = weight_shape[group_dim]
        if length % group_size and not group_padding:
            raise PolicyValueError(
                f"group_size={group_size} doesn't divide the {length} elements along axis {group_dim}; choose one that "
                "does, or group_padding=True"
            )
        shape = list(grouped_shape(weight_shape, group_size, group_dim))
        shape[group_dim % len(weight_shape) + 1] = 1
        return tuple(shape)

    @value
    def permute_dims(weight_ndims: int, output_channel_dim: int) -> Any:
        if output_channel_dim == 0:
            return None
        order = list(range(weight_ndims))
        order[0], order[output_channel_dim] = output_channel_dim, 0
        return tuple(order)


class BiasQuantSolver(ParameterQuantSolver):
    """Biases: the scale is given, input scale times weight scale, or their own."""

    proxy_class = BiasQuantProxyFromInjector
    requires_input_scale = True
    permute_dims = this.scaling_stats_permute_dims
    scaling_stats_permute_dims = None

    @value
    def tensor_clamp_impl(
        bit_width_impl_type: BitWidthImplType,
        scaling_impl_type: ScalingImplType,
        requires_input_scale: bool,
    ) -> Any:
        # Under a scale that isn't its own, a bias that saturates gets no gradient.
        return (
            TensorClamp if requires_input_scale else _clamp(bit_width_impl_type, scaling_impl_type)
        )

    @value
    def tensor_quant(quant_type: QuantType, requires_input_scale: bool) -> Any:
        chosen = (
            table.PRESCALED_BIAS_TENSOR_QUANT if requires_input_scale else table.BIAS_TENSOR_QUANT
        )
        return table.choose(chosen, "quant_type", quant_type, "a bias")

    @value
    def scaling_per_output_channel_shape(out_channels: int) -> Any:
        return (out_channels,)

    @value
    def stats_reduce_dim(scaling_per_output: ScalingPerOutputType) -> Any:
        return 1 if scaling_per_output == _CHANNEL else None


class ActQuantSolver(QuantSolver):
    """Activations: statistics are collected at run time."""

    proxy_class = ActQuantProxyFromInjector
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.PERCENTILE

    @value
    def tensor_quant(quant_type: QuantType) -> Any:
        return table.choose(table.ACT_TENSOR_QUANT, "quant_type", quant_type, "an activation")

    @value
    def float_to_int_impl(float_to_int_impl_type: FloatToIntImplType) -> Any:
        if float_to_int_impl_type == FloatToIntImplType.LEARNED_ROUND:
            raise PolicyValueError(
                "float_to_int_impl_type='learned_round' learns a number per element of a weight; "
                "an activation has no fixed elements"
            )
        return table.ROUNDING[float_to_int_impl_type]

    @value
    def scaling_impl(
        scaling_impl_type: ScalingImplType,
        proxy_class: type[QuantProxy],
        scaling_per_output: ScalingPerOutputType,
    ) -> Any:
        if scaling_per_output == _GROUP:
            if scaling_impl_type != ScalingImplType.STATS or not getattr(
                proxy_class, "is_dynamic", False
            ):
                raise PolicyValueError(
                    "the groups of an activation have scales of their own for each input: scaling_impl_type='stats' "
                    f"and a dynamic proxy; got {str(scaling_impl_type)!r} and {proxy_class.__name__}"
                )
            return RuntimeDynamicGroupStatsScaling
        if getattr(proxy_class, "is_dynamic", False):
            if scaling_per_output == _CHANNEL:
                raise PolicyValueError(
                    "scaling_per_output_type='channel' is not for dynamic activations; allowed: 'tensor', or "
                    "scaling_per_row=True"
                )
            return table.choose(
                table.DYNAMIC_ACT_SCALING,
                "scaling_impl_type",
                scaling_impl_type,
                "a dynamic activation",
            )
        return table.choose(
            table.ACT_SCALING, "scaling_impl_type", scaling_impl_type, "an activation"
        )

    @value
    def scaling_shape(scaling_per_output: ScalingPerOutputType) -> Any:
        return this.scaling_per_output_channel_shape if scaling_per_output == _CHANNEL else ()

    @value
    def scaling_per_output_channel_shape(
        per_channel_broadcastable_shape: tuple[int, ...] | None = None,
    ) -> Any:
        if per_channel_broadcastable_shape is None:
            raise PolicyValueError(
                "scaling_per_output_type='channel' on an activation needs per_channel_broadcastable_shape, "
                "the shape of the scale: (1, C, 1, 1) for images with C channels"
            )
        return per_channel_broadcastable_shape

    @value
    def permute_dims(
        scaling_stats_permute_dims: tuple[int, ...] | None = None,
        scaling_per_output: ScalingPerOutputType = _TENSOR,
    ) -> Any:
        if scaling_stats_permute_dims is None and scaling_per_output == _CHANNEL:
            raise PolicyValueError(
                "scaling_per_output_type='channel' on an activation needs scaling_stats_permute_dims, "
                "the order of axes that brings the channels first: (1, 0, 2, 3) for images"
            )
        return scaling_stats_permute_dims

    @value
    def group_dim(module: nn.Module, default_group_dim: int | None = None) -> Any:
        if default_group_dim is not None:
            return default_group_dim
        if isinstance(module, nn.Linear):
            return -1
        if isinstance(module, nn.modules.conv._ConvNd):
            return 1
        raise PolicyValueError(
            f"group_dim has to be given: which axis of the input of a {type(module).__name__} is split into groups; "
            "-1 for features that come last, 1 for the channels of images"
        )

    @value
    def min_val(signed: bool) -> Any:
        if signed:
            raise PolicyValueError(
                "a signed range needs min_val and max_val, its smallest and largest value"
            )
        return 0.0

    @value
    def scaling_init(
        scaling_impl_type: ScalingImplType, min_val: float, max_val: float | None = None
    ) -> Any:
        if max_val is None:
            raise PolicyValueError(
                f"scaling_impl_type={str(scaling_impl_type)!r} needs max_val (and min_val when signed), "
                "the range that the scale starts from"
            )
        if not min_val < max_val:
            raise PolicyValueError(f"min_val={min_val!r} must be below max_val={max_val!r}")
        return torch.tensor(max(abs(float(min_val)), abs(float(max_val))), device="cpu")
