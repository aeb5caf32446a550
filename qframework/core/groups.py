"""Scales and zero points of groups of neighbours along one axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated, Stateless
from qframework.core.naming import where
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.core.scaling.from_parameter import group_axis
from qframework.core.zero_point import shift_zero_point
from qframework.functional import (
    Granularity,
    MinifloatFormat,
    ScaleRule,
    StatisticRule,
    minifloat_quantize,
    split_groups,
)


class OverSubChannelBlockView(Stateless):
    """One axis split into groups, the last filled up with zeros: (8, 70) becomes (8, 3, 32).

    Args:
        group_size: elements of a group.
        group_dim: the axis.
        group_padding: fill up; else an axis that the groups don't divide is a ValueError.
    """

    def __init__(self, group_size: int, group_dim: int, group_padding: bool = True) -> None:
        super().__init__()
        self.group_size, self.group_dim, self.padding = group_size, group_dim, group_padding

    def rule(self, stated: Stated) -> Granularity:
        """The groups."""
        return Granularity(None, (self.group_size, self.group_dim))

    def forward(self, x: Tensor) -> Tensor:
        if not -x.dim() <= self.group_dim < x.dim():
            raise ValueError(
                f"{where()}group_dim={self.group_dim} is no axis of an input of shape {tuple(x.shape)}"
            )
        if x.shape[self.group_dim] % self.group_size and not self.padding:
            raise ValueError(
                f"{where()}group_size={self.group_size} doesn't divide axis {self.group_dim} of an input of shape "
                f"{tuple(x.shape)}; choose one that does, or group_padding=True"
            )
        return split_groups(x, self.group_size, self.group_dim)


DynamicOverSubChannelBlockView = OverSubChannelBlockView


class RuntimeDynamicGroupStatsScaling(CoreModule):
    """A scale for each group of the input, from its own statistic; nothing is collected or saved.

    Args:
        group_size, group_dim: as the view has them; not looked at.
        input_view_impl: splits the input into groups.
        scaling_stats_impl: the statistic, along the elements of a group, the axis kept.
        scaling_min_val, restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
    """

    def __init__(
        self,
        group_size: int,
        group_dim: int,
        input_view_impl: nn.Module,
        scaling_stats_impl: nn.Module,
        scaling_min_val: float | None = None,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view, self.scaling_stats_impl = input_view_impl, scaling_stats_impl
        self.restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The scales for a threshold, of the largest magnitudes of groups."""
        statistic: StatisticRule = stated(self.scaling_stats_impl)
        view: Granularity = stated(self.view)
        axis = group_axis(statistic, view)
        if statistic.kind != "absmax" or axis is None:
            raise NotStated(f"no faster form has the statistic {statistic.kind!r} of groups")
        return stated(self.restriction, "absmax", threshold, (), None, axis, view.groups)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scales for ``x``, of its grouped shape with 1 for the elements of a group."""
        statistic: Tensor = self.scaling_stats_impl(self.view(x))
        return self.restriction.of_statistic(statistic, threshold)


class RuntimeDynamicGroupZeroPoint(CoreModule):
    """A zero point for each group of the input, from its own statistic, which is 0 or below.

    Args:
        input_view_impl: splits the input into groups.
        zero_point_stats_impl: the statistic, along the elements of a group, the axis kept.
        int_quant: the integer quantizer that the zero point is for.
        quantize_zero_point: round it to an integer of the range.
    """

    symmetric = False

    def __init__(
        self,
        input_view_impl: nn.Module,
        zero_point_stats_impl: nn.Module,
        int_quant: nn.Module,
        quantize_zero_point: bool,
    ) -> None:
        super().__init__()
        self.view, self.stats = input_view_impl, zero_point_stats_impl
        self.int_quant, self.quantize_zero_point = int_quant, quantize_zero_point

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset = torch.neg(self.stats(self.view(x)))
        return shift_zero_point(offset, scale, bit_width, self.int_quant, self.quantize_zero_point)


class TwoLevelGroupScaling(CoreModule):
    """A scale for each group, in E4M3 times one float32 scale for the tensor, as NVFP4 has it.

    ``s = e4m3(max|group| / t / g) * g`` with the threshold ``t`` and ``g = max|x| / (t * 448)``, so that the group with
    the largest element has the largest E4M3 number for a scale.

    Args:
        input_view_impl: splits the input into groups.
        scaling_stats_impl: the statistic, along the elements of a group, the axis kept.
        scaling_min_val: lower bound of the statistic of the tensor.
    """

    def __init__(
        self,
        input_view_impl: nn.Module,
        scaling_stats_impl: nn.Module,
        scaling_min_val: float | None = None,
    ) -> None:
        super().__init__()
        self.view, self.scaling_stats_impl = input_view_impl, scaling_stats_impl
        self.least = scaling_min_val or 0.0

    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        """The scales for ``x``, of its grouped shape with 1 for the elements of a group."""
        needed = self.scaling_stats_impl(self.view(x)) / threshold
        top = needed.max() if needed.numel() else needed.new_zeros(())
        whole = top.clamp_min(self.least) / _E4M3.largest
        # The smallest number above 0 keeps a group of zeros from dividing by 0.
        group = minifloat_quantize(needed / whole, None, _E4M3)
        return group.clamp_min(_LEAST) * whole  # type: ignore[no-any-return]


_E4M3 = MinifloatFormat(mantissa_bits=3, exponent_bias=7, largest=448.0)
_LEAST = 2.0**-9
