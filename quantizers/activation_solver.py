"""How quantizers of activations resolve their policies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qframework.core.groups import RuntimeDynamicGroupStatsScaling
from qframework.inject import PolicyValueError, this, value
from qframework.inject import choices as table
from qframework.inject.enum import (
    FloatToIntImplType,
    QuantType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
)
from qframework.proxy import (
    ActQuantProxyFromInjector,
    QuantProxy,
)
from qframework.quantizers.common_solver import QuantSolver

__all__ = ["ActQuantSolver"]

_CHANNEL, _TENSOR = ScalingPerOutputType.CHANNEL, ScalingPerOutputType.TENSOR
_GROUP = ScalingPerOutputType.GROUP


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
