"""Scales computed from the parameter that they quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, wide_dtype, widen
from qframework.core.function_wrapper import OverOutputChannelView, OverTensorView
from qframework.core.pristine import FollowsParameters, Pristine
from qframework.core.restrict_val import FloatRestrictValue, RestrictValue, ScaleRestriction
from qframework.core.scaling.affine import StatsScaling, affine_or_none
from qframework.core.stats import AbsMax, Statistic
from qframework.core.tracked import tracked_view
from qframework.functional import abs_max, abs_max_of_channels, is_fused


def largest_of(stats: Any, view: nn.Module, statistic: type[Statistic] = AbsMax) -> str | None:
    """Of what a statistic, the largest magnitude, is taken: ``'tensor'`` or ``'channel'``; None for another one."""
    if type(stats) is not statistic:
        return None
    if type(view) is OverTensorView and stats.stats_reduce_dim is None:
        return "tensor"
    if type(view) is OverOutputChannelView and stats.stats_reduce_dim == 1 and not stats.keepdim:
        return "channel"
    return None


def _fused_abs_max(stats: nn.Module, view: Any, *parameters: Tensor) -> Tensor | None:
    """The largest magnitude of whole parameters, or of one's channels, in one step; None for other statistics."""
    kind = largest_of(stats, view)
    if kind is None or torch.compiler.is_compiling() or not is_fused():
        return None
    if kind == "tensor" and len({p.dtype for p in parameters}) == 1:
        return widen(abs_max(*parameters))
    if kind == "channel" and len(parameters) == 1:
        return widen(abs_max_of_channels(*parameters, view.permute_dims))
    return None


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
            restrict_scaling_impl or FloatRestrictValue(),
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        self.stats_scaling_impl = StatsScaling(restriction, affine)
        self._start()

    def _start(self) -> None:
        """For subclasses: the last step of construction."""

    def statistic(self, x: Tensor) -> Tensor:
        """The statistic in the shape of the scale, of ``x`` or of all the tracked parameters."""
        several = self.force_parameter or len(self.tracked_parameter_list) > 1
        parameters = self.tracked_parameter_list if several else (x,)
        largest = _fused_abs_max(self.scaling_stats_impl, self.view, *parameters)
        if largest is not None:
            return largest.reshape(self.scaling_shape)
        if several:
            viewed = tracked_view(self.tracked_parameter_list, self.view, self.concat_dim)
        else:
            viewed = self.view(x)
        return self.scaling_stats_impl(viewed).reshape(self.scaling_shape)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale of the parameter ``x``."""
        return self.stats_scaling_impl(self.statistic(x), threshold)  # type: ignore[no-any-return]


class ParameterFromStatsFromParameterScaling(FollowsParameters, StatsFromParameterScaling):
    """A learned scale that starts from the statistic of the parameter; state-dict key ``value``.

    It starts at construction, and follows the parameter (loaded, re-initialised, edited in place) until it has
    been trained or loaded itself. Arguments as for :class:`StatsFromParameterScaling`.
    """

    def _start(self) -> None:
        first = self.tracked_parameter_list[0]
        start = torch.ones(self.scaling_shape, dtype=wide_dtype(first.dtype), device=first.device)
        self.value = nn.Parameter(start)
        self.pristine = Pristine()
        self.init_from_parameters()

    @torch.no_grad()
    def init_from_parameters(self) -> None:
        """Start anew from the statistic of the tracked parameters."""
        viewed = tracked_view(self.tracked_parameter_list, self.view, self.concat_dim)
        statistic = self.scaling_stats_impl(viewed).reshape(self.scaling_shape)
        self.pristine.start(self.value, self.stats_scaling_impl.stored(statistic))

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale; ``x`` is not looked at."""
        self.follow()
        return self.stats_scaling_impl.restriction(self.value, threshold)  # type: ignore[no-any-return]
