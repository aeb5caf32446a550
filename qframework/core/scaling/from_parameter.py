"""Scales computed from the parameter that they quantize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated, number_of
from qframework.core.following import FollowsParameters, follow
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.core.scaling.affine import StatsScaling, affine_or_none
from qframework.core.statistic_shape import reshaped
from qframework.core.tracked import tracked_view
from qframework.functional import Granularity, ScaleRule, StatisticRule, compute_dtype


class StatsFromParameterScaling(CoreModule):
    """A statistic of the parameter, taken anew at every call; gradients flow through it.

    Args:
        scaling_stats_impl: the statistic.
        scaling_stats_input_view_shape_impl: shapes the parameter for it.
        scaling_stats_input_concat_dim: axis along which several parameters' views are joined.
        tracked_parameter_list: the parameters of all layers that share the quantizer.
        scaling_shape: shape of the scale, that broadcasts to the parameter.
        force_parameter: always use the tracked parameters rather than the tensor given.
        scaling_affine_rescaling_init, scaling_affine_shifting_init: a learned affine map on the statistic.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
        dtype, device: of the affine parameters.
    """

    def __init__(
        self,
        scaling_stats_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module,
        scaling_stats_input_concat_dim: int | None,
        tracked_parameter_list: Sequence[Tensor],
        scaling_shape: tuple[int, ...],
        force_parameter: bool = False,
        scaling_affine_rescaling_init: float | None = None,
        scaling_affine_shifting_init: float | None = None,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.scaling_stats_impl = scaling_stats_impl
        self.view = scaling_stats_input_view_shape_impl
        self.concat_dim, self.force_parameter = scaling_stats_input_concat_dim, force_parameter
        self.tracked_parameter_list = tracked_parameter_list
        self.scaling_shape = tuple(scaling_shape)
        affine = affine_or_none(
            scaling_affine_rescaling_init,
            scaling_affine_shifting_init,
            self.scaling_shape,
            dtype,
            device,
            "scaling",
        )
        restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        self.stats_scaling_impl = StatsScaling(restriction, affine)
        self._start()

    def _start(self) -> None:
        """For subclasses: the last step of construction."""

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The scale for a threshold, where its statistic is that of the tensor given, or of its channels."""
        if self.force_parameter or len(self.tracked_parameter_list) > 1:
            raise NotStated("the statistic is that of all layers that share the quantizer")
        statistic, view = stated(self.scaling_stats_impl), stated(self.view)
        if statistic.kind not in ("absmax", "minmax"):
            raise NotStated(f"no faster form has the statistic {statistic.kind!r}")
        reduced = group_axis(statistic, view)
        axis = statistic_axis(statistic, view) if reduced is None else None
        source = (statistic.kind, threshold, self.scaling_shape, axis, reduced, view.groups)
        return stated(self.stats_scaling_impl, *source)  # type: ignore[no-any-return]

    def statistic(self, x: Tensor) -> Tensor:
        """The statistic in the shape of the scale, of ``x`` or of all the tracked parameters."""
        if self.force_parameter or len(self.tracked_parameter_list) > 1:
            viewed = tracked_view(self.tracked_parameter_list, self.view, self.concat_dim)
        else:
            viewed = self.view(x)
        return reshaped(
            self.scaling_stats_impl(viewed), self.scaling_stats_impl, self.scaling_shape
        )

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale of the parameter ``x``, for a 0-dim threshold (1 when None)."""
        return self.stats_scaling_impl(self.statistic(x), threshold)  # type: ignore[no-any-return]


def group_axis(statistic: StatisticRule, view: Granularity) -> int | None:
    """The axis of the elements of a group, once they are split; None where there are no groups.

    Raises:
        NotStated: they are reduced in another way.
    """
    if view.groups is None:
        return None
    dim = view.groups[1]
    axis = dim if dim < 0 else dim + 1
    if statistic.axis != axis or not statistic.keepdim:
        raise NotStated(f"the statistic is reduced along axis {statistic.axis} of its groups")
    return axis


def statistic_axis(statistic: StatisticRule, view: Granularity) -> int | None:
    """The axis of the channels that a statistic is taken of; None where it is that of the whole tensor.

    Raises:
        NotStated: it is reduced in another way.
    """
    axis = view.channel_axis
    if view.groups is not None or view.rows:
        raise NotStated("the statistic is that of groups or rows")
    if statistic.axis != (None if axis is None else 1) or statistic.keepdim:
        raise NotStated(f"the statistic is reduced along axis {statistic.axis} of its view")
    return axis


class ParameterFromStatsFromParameterScaling(FollowsParameters, StatsFromParameterScaling):
    """A learned scale that starts from the statistic of the parameter; state-dict key ``value``.

    It starts at construction, and follows the parameter (loaded, re-initialised, edited in place) until it has
    been trained or loaded itself. Arguments as for :class:`StatsFromParameterScaling`.
    """

    def _start(self) -> None:
        first = self.tracked_parameter_list[0]
        self._start_following(self.scaling_shape, compute_dtype(first.dtype), first.device)

    @property
    def is_costly(self) -> bool:  # type: ignore[override]
        """Whether the statistic is searched for."""
        return bool(getattr(self.scaling_stats_impl, "is_search", False))

    def origins(self) -> Sequence[Tensor]:
        """The tracked parameters."""
        return list(self.tracked_parameter_list)

    def computed(self) -> Tensor:
        """The statistic of the tracked parameters, in its domain."""
        viewed = tracked_view(self.tracked_parameter_list, self.view, self.concat_dim)
        statistic = reshaped(
            self.scaling_stats_impl(viewed), self.scaling_stats_impl, self.scaling_shape
        )
        return self.stats_scaling_impl.stored(statistic)

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The learned scale for a threshold."""
        restriction = self.stats_scaling_impl.restriction
        shape = tuple(number_of(self.value, self.scaling_shape).shape)
        return stated(restriction, "learned", threshold, shape)  # type: ignore[no-any-return]

    def saved(self, name: str, number: Tensor) -> Tensor:
        """A positive number."""
        return self.stats_scaling_impl.restriction.saved(number) if name == "value" else number

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A number that is none of a scale."""
        return self.stats_scaling_impl.restriction.why_refused(number)

    def stored(self) -> Tensor:
        """The learned number in its domain."""
        follow(self)
        return number_of(self.value, self.scaling_shape)

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a 0-dim threshold (1 when None); ``x`` is not looked at."""
        return self.stats_scaling_impl.restriction(self.stored(), threshold)  # type: ignore[no-any-return]
