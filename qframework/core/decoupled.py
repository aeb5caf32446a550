"""Weights whose integers and values have different scales: decoupled, weight-normalized, accumulator-aware.

q = clamp(round(x / pre_scale + pre_zero_point)),   y = (q - zero_point) * scale
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, Stateless, number_of
from qframework.core.following import FollowsParameters, follow
from qframework.core.function_wrapper import RoundToZeroSte
from qframework.core.quant import DecoupledIntQuant
from qframework.core.restrict_val import FloatRestrictValue, RestrictValue, ScaleRestriction
from qframework.core.stats import AbsMax
from qframework.core.tracked import tracked_view
from qframework.functional import compute_dtype, get_upper_bound_on_l1_norm, max_int, upcast

#: Relative room below the bound on a norm, so that rounding in float32 can't lead above it.
_ROUNDING_ROOM = 2.0**-20

#: Stands for the norm of zeros: the norm that is learned starts at this minimum, too.
_NORM_OF_ZEROS = 1e-10

DecoupledOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class UnitThreshold(Stateless):
    """The threshold 1: the statistic is the scale itself."""

    def forward(self, bit_width: Tensor) -> Tensor:
        return torch.ones_like(bit_width)


class AbsMaxStep(AbsMax):
    """The step with which the largest magnitude fits: ``max|x| / max_int``.

    Args:
        signed, narrow_range: the integer range.
        bit_width_impl: called with nothing.
        stats_reduce_dim: axis to reduce, None for all.
        scaling_shape: of the scale; ``()`` takes the largest magnitude of all rows.
    """

    def __init__(
        self,
        signed: bool,
        narrow_range: bool,
        bit_width_impl: nn.Module,
        stats_reduce_dim: int | None = None,
        scaling_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(None if scaling_shape == () else stats_reduce_dim)
        self.signed, self.narrow_range, self.bit_width_impl = signed, narrow_range, bit_width_impl

    def forward(self, x: Tensor) -> Tensor:
        top = max_int(self.signed, self.narrow_range, self.bit_width_impl().detach())
        return super().forward(x) / top


class DecoupledRescalingIntQuant(CoreModule):
    """An integer quantizer of weights with one scale for the integers and another for the values.

    Args:
        decoupled_int_quant: rounds and clamps.
        pre_scaling_impl: scale of the integers, called with ``(x, threshold)``.
        scaling_impl: scale of the values, called with ``(x, threshold)``.
        int_scaling_impl: from the bit width to the integer threshold of both.
        pre_zero_point_impl: called with ``(x, pre_scale, bit_width)``.
        zero_point_impl: called with ``(x, scale, bit_width)``.
        bit_width_impl: called with nothing.
    """

    def __init__(
        self,
        decoupled_int_quant: DecoupledIntQuant,
        pre_scaling_impl: nn.Module,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        pre_zero_point_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
    ) -> None:
        super().__init__()
        self.decoupled_int_quant = decoupled_int_quant
        self.pre_scaling_impl, self.scaling_impl = pre_scaling_impl, scaling_impl
        self.int_scaling_impl = int_scaling_impl
        self.pre_zero_point_impl, self.zero_point_impl = pre_zero_point_impl, zero_point_impl
        self.msb_clamp_bit_width_impl = bit_width_impl

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and bit width of the values."""
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self.int_scaling_impl(bit_width))
        return scale, self.zero_point_impl(x, scale, bit_width), bit_width

    def pre_parameters_for(self, x: Tensor, *of_input: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the integers."""
        bit_width = self.msb_clamp_bit_width_impl()
        pre_scale = self.pre_scaling_impl(x, self.int_scaling_impl(bit_width), *of_input)
        return pre_scale, self.pre_zero_point_impl(x, pre_scale, bit_width)

    def codes(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bit_width: Tensor,
        pre_scale: Tensor,
        pre_zero_point: Tensor,
    ) -> Tensor:
        """The integers of ``x`` by parameters that are known, in a float dtype."""
        quantizer = self.decoupled_int_quant
        viewed = quantizer.input_view_impl(upcast(x))
        return quantizer.int_quant.to_int(pre_scale, pre_zero_point, bit_width, viewed)

    def forward(self, x: Tensor, *of_input: Any) -> DecoupledOutput:
        """Values, scale, zero point, bit width, pre-scale and pre-zero-point.

        Args:
            x: the weight.
            *of_input: what the pre-scale has to know about the input of the layer, if anything.
        """
        pre_scale, pre_zero_point = self.pre_parameters_for(x, *of_input)
        scale, zero_point, bit_width = self.parameters_for(x)
        y = self.decoupled_int_quant(
            pre_scale, pre_zero_point, scale, zero_point, bit_width, upcast(x)
        )
        return y.to(x.dtype), scale, zero_point, bit_width, pre_scale, pre_zero_point


class DecoupledRescalingIntQuantWithInput(DecoupledRescalingIntQuant):
    """The same where the pre-scale takes the input's bit width (0-dim tensor) and sign (bool).

    Raises:
        ValueError: a rounding rule that can lengthen the weight.
    """

    def __init__(
        self,
        decoupled_int_quant: DecoupledIntQuant,
        pre_scaling_impl: nn.Module,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        pre_zero_point_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
    ) -> None:
        super().__init__(
            decoupled_int_quant,
            pre_scaling_impl,
            scaling_impl,
            int_scaling_impl,
            pre_zero_point_impl,
            zero_point_impl,
            bit_width_impl,
        )
        rule = decoupled_int_quant.int_quant.float_to_int_impl
        if not isinstance(rule, RoundToZeroSte):
            raise ValueError(
                f"float_to_int_impl is a {type(rule).__name__}, which can make the norm of the integers exceed what "
                "the accumulator holds; allowed: float_to_int_impl_type='round_to_zero'"
            )

    def forward(self, x: Tensor, *of_input: Any) -> DecoupledOutput:
        """Values, scale, zero point, bit width, pre-scale and pre-zero-point.

        Args:
            x: the weight.
            *of_input: bit width and sign of the layer's input.
        """
        if len(of_input) != 2:
            raise RuntimeError("accumulator-aware weights need bit width and sign of the input")
        return super().forward(x, *of_input)


class ParameterPreScalingWeightNorm(FollowsParameters, CoreModule):
    """Weight normalization: ``pre_scale = scale * ||w|| / g`` with a learned norm ``g`` for each channel.

    So the weight that is quantized by ``scale`` is ``g * w / ||w||`` (https://arxiv.org/abs/1602.07868). ``g``
    starts from ``||w||`` and follows the weight until it has been trained or loaded. State-dict keys: ``value``
    (``g`` in the domain of its restriction) and those of the scale below ``scaling_impl``.

    Args:
        scaling_impl: the scale, called with ``(x, threshold)``.
        normalize_stats_impl: the norm of a channel.
        scaling_stats_input_view_shape_impl: shapes the weight for it.
        tracked_parameter_list: the weights of all layers that share the quantizer.
        pre_scaling_shape: shape of ``g``, that broadcasts to the weight; None for one number.
        restrict_pre_scaling_impl: domain of ``g``.
        pre_scaling_min_val: lower bound of ``g``.
        scaling_stats_input_concat_dim: axis along which several weights' views are joined.
        pre_scaling_scale_impl: a scale of its own in the place of ``scaling_impl``.
    """

    def __init__(
        self,
        scaling_impl: nn.Module,
        normalize_stats_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module,
        tracked_parameter_list: Sequence[Tensor],
        pre_scaling_shape: tuple[int, ...] | None = None,
        restrict_pre_scaling_impl: RestrictValue | None = None,
        pre_scaling_min_val: float | None = None,
        scaling_stats_input_concat_dim: int | None = None,
        pre_scaling_scale_impl: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scaling_impl = pre_scaling_scale_impl or scaling_impl
        self.stats, self.view = normalize_stats_impl, scaling_stats_input_view_shape_impl
        self.tracked_parameter_list = tracked_parameter_list
        self.concat_dim = scaling_stats_input_concat_dim
        self.restriction = ScaleRestriction(
            restrict_pre_scaling_impl or FloatRestrictValue(), None, None, pre_scaling_min_val
        )
        first = tracked_parameter_list[0]
        self.pre_scaling_shape = tuple(pre_scaling_shape or ())
        self._start_following(self.pre_scaling_shape, compute_dtype(first.dtype), first.device)

    is_costly = False

    def origins(self) -> Sequence[Tensor]:
        """The tracked weights."""
        return list(self.tracked_parameter_list)

    def center(self, viewed: Tensor) -> Tensor:
        """For subclasses: the viewed weight that the norm is taken of; that of the start isn't centered."""
        return viewed

    def norm(self, x: Tensor, centered: bool = True) -> Tensor:
        """The norms of the channels, in the shape of ``g``, of ``x`` or of all the tracked weights."""
        if len(self.tracked_parameter_list) > 1:
            viewed = tracked_view(self.tracked_parameter_list, self.view, self.concat_dim)
        else:
            viewed = self.view(x)
        viewed = upcast(viewed)
        if centered:
            viewed = self.center(viewed)
        return self.stats(viewed).reshape(self.pre_scaling_shape)  # type: ignore[no-any-return]

    def computed(self) -> Tensor:
        """The norms of the weights, in the domain of ``g``."""
        return self.restriction.to_domain(self.norm(self.tracked_parameter_list[0], centered=False))

    def learned_norm(self) -> Tensor:
        """``g``."""
        follow(self)
        return self.restriction(number_of(self.value, self.pre_scaling_shape))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        """The pre-scale of the weight ``x``; that of a channel of zeros is positive, too."""
        norm = self.norm(x)
        norm = torch.where(norm == 0, _NORM_OF_ZEROS, norm)
        return self.scaling_impl(x, threshold) * norm / self.learned_norm()  # type: ignore[no-any-return]


class AccumulatorAwareParameterPreScaling(ParameterPreScalingWeightNorm):
    """A2Q: the L1 norm of a channel's integers is bounded, so that no input overflows the accumulator.

    ``pre_scale = ||w||_1 / min(g / scale, T)``, ``T = (2^(P-1) - 1) * 2^(signed - N)``; with rounding to zero
    ``sum|q| <= T`` for inputs of N bits and accumulators of P bits, sign included. (https://arxiv.org/abs/2308.13504)

    Args:
        accumulator_bit_width_impl: P, called with nothing; saved below ``accumulator_bit_width``.
        scaling_impl, normalize_stats_impl, scaling_stats_input_view_shape_impl, tracked_parameter_list, pre_scaling_shape, restrict_pre_scaling_impl, pre_scaling_min_val, scaling_stats_input_concat_dim, pre_scaling_scale_impl:
            see :class:`ParameterPreScalingWeightNorm`; the norm has to be L1.
    """

    def __init__(
        self,
        scaling_impl: nn.Module,
        normalize_stats_impl: nn.Module,
        accumulator_bit_width_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module,
        tracked_parameter_list: Sequence[Tensor],
        pre_scaling_shape: tuple[int, ...] | None = None,
        restrict_pre_scaling_impl: RestrictValue | None = None,
        pre_scaling_min_val: float | None = None,
        scaling_stats_input_concat_dim: int | None = None,
        pre_scaling_scale_impl: nn.Module | None = None,
    ) -> None:
        super().__init__(
            scaling_impl,
            normalize_stats_impl,
            scaling_stats_input_view_shape_impl,
            tracked_parameter_list,
            pre_scaling_shape,
            restrict_pre_scaling_impl,
            pre_scaling_min_val,
            scaling_stats_input_concat_dim,
            pre_scaling_scale_impl,
        )
        self.accumulator_bit_width = accumulator_bit_width_impl
        self.minimum = ScaleRestriction(
            FloatRestrictValue(), None, None, pre_scaling_min_val
        ).clamp_min

    def upper_bound(self, input_bit_width: Tensor, input_signed: bool) -> Tensor:
        """``T``, the largest L1 norm of a channel's integers."""
        return get_upper_bound_on_l1_norm(
            self.accumulator_bit_width(), input_bit_width, input_signed
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, threshold: Tensor, input_bit_width: Tensor, input_signed: bool
    ) -> Tensor:
        """The pre-scale of the weight ``x``."""
        bound = self.upper_bound(input_bit_width, input_signed) * (1 - _ROUNDING_ROOM)
        norm = torch.minimum(self.learned_norm() / self.scaling_impl(x, threshold), bound)
        return self.minimum(self.norm(x) / norm)  # type: ignore[no-any-return]


class AccumulatorAwareZeroCenterParameterPreScaling(AccumulatorAwareParameterPreScaling):
    """A2Q+: the same for weights whose channels have mean 0, ``T = (2^P - 2) / (2^N - 1)``.

    Positive and negative integers of a channel then sum to at most ``T / 2`` each, which is all that an input of
    either sign can reach. Arguments as for :class:`AccumulatorAwareParameterPreScaling`.
    (https://arxiv.org/abs/2401.10432)
    """

    def center(self, viewed: Tensor) -> Tensor:
        """The viewed weight less the means of its rows."""
        return viewed - viewed.mean(dim=1, keepdim=True)

    def upper_bound(self, input_bit_width: Tensor, input_signed: bool) -> Tensor:
        """``T``, the largest L1 norm of a channel's integers."""
        return (2.0 ** self.accumulator_bit_width() - 2) / (2.0**input_bit_width - 1)  # type: ignore[no-any-return]


class PreZeroCenterZeroPoint(CoreModule):
    """Minus the mean of each channel, in integer steps; called with ``(x, pre_scale, bit_width)``.

    Args:
        stats_reduce_dim: axis of the mean, None for all elements.
        pre_zero_point_stats_input_view_shape_impl: brings a channel into a row.
        pre_zero_point_shape: shape of the result, that broadcasts to the weight; None for one number.
    """

    symmetric = False

    def __init__(
        self,
        stats_reduce_dim: int | None,
        pre_zero_point_stats_input_view_shape_impl: nn.Module,
        pre_zero_point_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.stats_reduce_dim = stats_reduce_dim
        self.view = pre_zero_point_stats_input_view_shape_impl
        self.shape = tuple(pre_zero_point_shape or ())

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        viewed = upcast(self.view(x))
        mean = (
            viewed.mean() if self.stats_reduce_dim is None else viewed.mean(self.stats_reduce_dim)
        )
        mean = mean.reshape(self.shape)
        return -mean / scale  # type: ignore[no-any-return]
