"""How quantizers of weights and biases resolve their policies."""

from __future__ import annotations

import math
from typing import Any

import torch

from qframework.core.function_wrapper import (
    TensorClamp,
    TensorClampSte,
)
from qframework.functional import grouped_shape
from qframework.inject import PolicyValueError, this, value
from qframework.inject import choices as table
from qframework.inject.enum import (
    BitWidthImplType,
    LearnedRoundImplType,
    QuantType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
)
from qframework.proxy import (
    BiasQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
)
from qframework.quantizers.common_solver import QuantSolver

__all__ = ["BiasQuantSolver", "WeightQuantSolver"]

_CHANNEL, _GROUP = ScalingPerOutputType.CHANNEL, ScalingPerOutputType.GROUP


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
        if not -len(weight_shape) <= group_dim < len(weight_shape):
            raise PolicyValueError(
                f"group_dim={group_dim} is no axis of a weight of shape {tuple(weight_shape)}"
            )
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
