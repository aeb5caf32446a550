"""Zero points whose statistic is searched for, which takes the scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qframework.core.zero_point import (
    ParameterFromRuntimeZeroPoint,
    ParameterFromStatsFromParameterZeroPoint,
    shift_zero_point,
)


class SearchedZeroPointFromParameter(ParameterFromStatsFromParameterZeroPoint):
    """A learned offset that starts from a search over the parameter; state-dict key ``value``.

    Args:
        scaling_impl: the scale of the same quantizer, asked for the scale of the search.
        int_scaling_impl, bit_width_impl: of the same quantizer.
        int_quant, quantize_zero_point, zero_point_stats_input_view_shape_impl, zero_point_stats_input_concat_dim, zero_point_stats_impl, zero_point_shape, tracked_parameter_list:
            see :class:`~qframework.core.zero_point.StatsFromParameterZeroPoint`; the statistic is called with the
            viewed parameter and the scale.
    """

    def __init__(
        self,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        bit_width_impl: nn.Module,
        int_quant: nn.Module,
        quantize_zero_point: bool,
        zero_point_stats_input_view_shape_impl: nn.Module,
        zero_point_stats_input_concat_dim: int | None,
        zero_point_stats_impl: nn.Module,
        zero_point_shape: tuple[int, ...],
        tracked_parameter_list: Sequence[Tensor],
    ) -> None:
        # In a tuple: the modules belong to the tensor quantizer, under their names there.
        parts = (scaling_impl, int_scaling_impl, bit_width_impl)
        self.__dict__["_scale_parts"] = parts
        super().__init__(
            int_quant,
            quantize_zero_point,
            zero_point_stats_input_view_shape_impl,
            zero_point_stats_input_concat_dim,
            zero_point_stats_impl,
            zero_point_shape,
            tracked_parameter_list,
        )

    def context(self) -> tuple[Tensor, ...]:
        """The present scale."""
        parts: Any = self.__dict__["_scale_parts"]
        scaling, threshold, bit_width = parts
        return (scaling(self.tracked_parameter_list[0], threshold(bit_width())),)

    def origins(self) -> Sequence[Tensor]:
        """The tracked parameters, and the scale of the search."""
        return [*self.tracked_parameter_list, *self.context()]


class SearchedZeroPointFromRuntime(ParameterFromRuntimeZeroPoint):
    """An offset that is searched for in each batch at the batch's scale, collected, then learned.

    Arguments and state as for :class:`~qframework.core.zero_point.ParameterFromRuntimeZeroPoint`; the statistic is
    called with the viewed batch and the scale.
    """

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset = self.collect_or_learned(x, scale)
        return shift_zero_point(offset, scale, bit_width, self.int_quant, self.quantize_zero_point)
