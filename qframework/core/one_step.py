"""Which tensor quantizers are done in one step, and how.

A step is made when a quantizer runs first and after any change of its parts; see :class:`~qframework.changes.Changes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.changes import changes
from qframework.core.bit_width import BitWidthConst
from qframework.core.function_wrapper import Identity
from qframework.core.scaling.from_parameter import StatsFromParameterScaling, largest_of
from qframework.core.scaling.runtime import ParameterFromRuntimeStatsScaling
from qframework.core.scaling.standalone import ParameterScaling
from qframework.core.stats import AbsMax, AbsMinMax, NegativeMinOrZero, Statistic
from qframework.core.zero_point import StatsFromParameterZeroPoint, ZeroZeroPoint
from qframework.functional import (
    LargestScaled,
    LearnedScaled,
    quantize_by_largest,
    quantize_by_span,
    quantize_by_stored,
    traced_largest,
)

Output = tuple[Tensor, Tensor, Tensor, Tensor]


class OneStep:
    """One step for a quantizer with a constant width, and no zero point or that of a weight's own range.

    Attributes:
        count: of changes that it was made at.
    """

    def __init__(self, quantizer: Any) -> None:
        self.count = changes.count
        self.quantizer = quantizer
        self.scaling: Any = quantizer.scaling_impl
        self.largest: LargestScaled | None = None
        self.learned: LearnedScaled | None = None
        self.collects = False
        self._threshold: tuple[Tensor, Tensor] | None = None
        self.spans = False
        fixed = _fixed_range(quantizer)
        if fixed is None:
            return
        scaling, zero_point = self.scaling, quantizer.zero_point_impl
        if type(zero_point) is not ZeroZeroPoint:
            if type(scaling) is StatsFromParameterScaling and _follows_range(
                zero_point, scaling, quantizer
            ):
                self.largest = _largest(scaling, fixed, AbsMinMax)
                self.spans = True
        elif type(scaling) is StatsFromParameterScaling:
            self.largest = _largest(scaling, fixed, AbsMax)
        elif type(scaling) in (ParameterScaling, ParameterFromRuntimeStatsScaling):
            domain = scaling.restriction.fused()
            self.learned = None if domain is None else LearnedScaled(*fixed, *domain)
            self.collects = type(scaling) is ParameterFromRuntimeStatsScaling
        self.restriction: Any = (
            scaling.stats_scaling_impl.restriction
            if self.largest is not None
            else getattr(scaling, "restriction", None)
        )

    def run(self, x: Tensor, rectify: bool) -> Output | None:
        """Quantize ``x``; None where the present call takes the ordinary way.

        Args:
            x: floating-point values.
            rectify: quantize ``relu(x)``.
        """
        quantizer = self.quantizer
        if self.learned is not None:
            if self.collects and self.scaling.hand_over_if_due() >= 0:
                return None
            width, threshold = self._width()
            stored = self.scaling._parameters["value"]
            y, scale = quantize_by_stored(x, stored, threshold, self.learned, rectify)
        elif self.largest is not None and len(self.scaling.tracked_parameter_list) == 1:
            width, threshold = self._width()
            x = torch.relu(x) if rectify else x
            if self.spans:
                return *quantize_by_span(x, threshold, self.largest), width
            y, scale = quantize_by_largest(x, threshold, self.largest)
        else:
            return None
        return y, scale, quantizer.zero_point_impl._buffers["zero"], width

    def _width(self) -> tuple[Tensor, Tensor]:
        """The bit width and the threshold in its domain, computed once."""
        width = self.quantizer.msb_clamp_bit_width_impl._buffers["bit_width"]
        known = self._threshold
        if known is None or known[0] is not width:
            threshold = self.restriction.threshold(self.quantizer.int_scaling_impl(width))
            self._threshold = known = (width, threshold)
        return known


def traced_weight(quantizer: Any, x: Tensor) -> Output | None:
    """A weight in a graph that is being traced, by an operator of its own; None where there is none.

    Args:
        quantizer: the tensor quantizer.
        x: the weight.
    """
    scaling = quantizer.scaling_impl
    if (
        type(scaling) is not StatsFromParameterScaling
        or type(quantizer.zero_point_impl) is not ZeroZeroPoint
        or len(scaling.tracked_parameter_list) != 1
    ):
        return None
    fixed = _fixed_range(quantizer)
    how = None if fixed is None else _largest(scaling, fixed, AbsMax)
    if how is None or how.order is not None:
        return None
    width = quantizer.msb_clamp_bit_width_impl()
    restriction: Any = scaling.stats_scaling_impl.restriction
    threshold = restriction.threshold(quantizer._threshold(width))
    found = traced_largest(x, threshold, how)
    return None if found is None else (*found, quantizer.zero_point_impl.zero, width)


def _fixed_range(quantizer: Any) -> tuple[float, float, str, bool] | None:
    """Bounds, rounding and clamp gradient, where all of them are constant and fused."""
    quant, width = quantizer.int_quant, quantizer.msb_clamp_bit_width_impl
    if type(width) is not BitWidthConst:
        return None
    bounds = quant.fixed_range(width.initial) if hasattr(quant, "fixed_range") else None
    if bounds is None or type(quant.input_view_impl) is not Identity:
        return None
    return *bounds, quant.float_to_int_impl.rule, quant.tensor_clamp_impl.masked


def _follows_range(zero_point: Any, scaling: StatsFromParameterScaling, quantizer: Any) -> bool:
    """Whether a zero point is that of the range that the scale is taken from, rounded as the values are."""
    return (
        type(zero_point) is StatsFromParameterZeroPoint
        and type(zero_point.stats) is NegativeMinOrZero
        and zero_point.quantize_zero_point
        and zero_point.affine_rescaling is None
        and zero_point.scale_shift_zero_point_impl is None
        and zero_point.int_quant is quantizer.int_quant
        and zero_point.zero_point_shape == scaling.scaling_shape
        and largest_of(zero_point.stats, zero_point.view, NegativeMinOrZero)
        == largest_of(scaling.scaling_stats_impl, scaling.view, AbsMinMax)
        and getattr(zero_point.view, "permute_dims", None)
        == getattr(scaling.view, "permute_dims", None)
    )


def _largest(
    scaling: StatsFromParameterScaling,
    fixed: tuple[float, float, str, bool],
    statistic: type[Statistic],
) -> LargestScaled | None:
    minimum, maximum, rounding, masked = fixed
    view: Any = scaling.view
    domain, kind = (
        scaling.stats_scaling_impl.fused(),
        largest_of(scaling.scaling_stats_impl, view, statistic),
    )
    if domain is None or kind is None or masked or scaling.force_parameter:
        return None
    order = view.permute_dims if kind == "channel" else None
    return LargestScaled(
        minimum, maximum, rounding, *domain, scaling.scaling_shape, order, kind == "channel"
    )
