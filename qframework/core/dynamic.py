"""Scales and zero points that each input has for itself, in training and evaluation alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated
from qframework.core.function_wrapper import OverOutputFeaturesView, OverTensorView
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.core.statistic_shape import reshaped
from qframework.core.zero_point import shift_zero_point
from qframework.functional import Granularity, ScaleRule, StatisticRule, upcast


def _view(per_row: bool) -> nn.Module:
    return OverOutputFeaturesView() if per_row else OverTensorView()


def _shape(x: Tensor, per_row: bool) -> tuple[int, ...]:
    return (*x.shape[:-1], 1) if per_row and x.dim() else ()


def _statistic(statistic: nn.Module, view: nn.Module, x: Tensor, per_row: bool) -> Tensor:
    """The statistic in the shape of the scale; 0 for no elements."""
    shape = _shape(x, per_row)
    if x.numel() == 0:
        return upcast(x).new_zeros(shape)
    return reshaped(statistic(view(x)), statistic, shape)


class RuntimeDynamicStatsScaling(CoreModule):
    """The scale of the input's own statistic; nothing is collected or saved.

    Args:
        scaling_stats_impl: the statistic, of ``(n,)``, or with ``scaling_per_row`` of ``(rows, features)`` along axis 1.
        scaling_per_row: a scale for each row, the last axis of the input; else one for the tensor.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
    """

    def __init__(
        self,
        scaling_stats_impl: nn.Module,
        scaling_per_row: bool = False,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
    ) -> None:
        super().__init__()
        self.scaling_stats_impl, self.per_row = scaling_stats_impl, scaling_per_row
        self.view = _view(scaling_per_row)
        self.restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The scale for a threshold, of the largest magnitude of the tensor or of each row."""
        statistic: StatisticRule = stated(self.scaling_stats_impl)
        axis = 1 if self.per_row else None
        if stated(self.view) != Granularity(rows=self.per_row):
            raise NotStated("the statistic is of another view")
        if statistic.kind != "absmax" or statistic.axis != axis or statistic.keepdim:
            raise NotStated(f"no faster form has the statistic {statistic.kind!r} of each input")
        rows = -1 if self.per_row else None
        return stated(self.restriction, "absmax", threshold, (), None, rows)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for ``x``: 0-dim, or of the shape of ``x`` with a last axis of 1."""
        statistic = _statistic(self.scaling_stats_impl, self.view, x, self.per_row)
        return self.restriction.of_statistic(statistic, threshold)


class RuntimeDynamicStatsZeroPoint(CoreModule):
    """The zero point of the input's own statistic, which is 0 or below.

    Args:
        zero_point_stats_impl: the statistic, as for :class:`RuntimeDynamicStatsScaling`.
        int_quant: the integer quantizer that the zero point is for.
        quantize_zero_point: round it to an integer of the range.
        scaling_per_row: a zero point for each row, the last axis of the input; else one for the tensor.
    """

    symmetric = False

    def __init__(
        self,
        zero_point_stats_impl: nn.Module,
        int_quant: nn.Module,
        quantize_zero_point: bool,
        scaling_per_row: bool = False,
    ) -> None:
        super().__init__()
        self.stats, self.int_quant = zero_point_stats_impl, int_quant
        self.quantize_zero_point, self.per_row = quantize_zero_point, scaling_per_row
        self.view = _view(scaling_per_row)

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset = torch.neg(_statistic(self.stats, self.view, x, self.per_row))
        return shift_zero_point(offset, scale, bit_width, self.int_quant, self.quantize_zero_point)
