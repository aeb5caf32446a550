"""Scales from statistics of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, Stated
from qframework.core.collector import (
    CollectThenLearn,
    counts,
    running_update,
    share,
    whole_statistic,
    why_no_count,
)
from qframework.core.function_wrapper import OverBatchOverTensorView
from qframework.core.notice import LeftOut, add_left_out
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.core.scaling.affine import StatsScaling, affine_or_none
from qframework.core.statistic_shape import reshaped
from qframework.functional import ScaleRule, StatisticRule, compute_dtype, is_recomputing


def why_no_magnitude(number: Tensor) -> str | None:
    """Why a number of a state dict can't be a statistic that a scale is made of; None where it can."""
    allowed = bool((torch.isfinite(number) & (number >= 0)).all())
    return None if allowed else "finite numbers from 0 on"


class RuntimeStats(LeftOut):
    """A statistic of each batch, with a running mean for evaluation.

    State-dict keys ``running_stats`` and ``collected_steps`` (0-dim int64, how many batches it is made of; those that
    weren't finite don't count).

    Args:
        stats: the statistic.
        view: shapes the input for it.
        shape: of the statistic.
        momentum: of the running mean; None for the plain mean.
        dtype, device: of the buffers.
    """

    running_stats: Tensor
    collected_steps: Tensor

    def __init__(
        self,
        stats: nn.Module,
        view: nn.Module,
        shape: tuple[int, ...],
        momentum: float | None,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.stats, self.view, self.shape, self.momentum = stats, view, tuple(shape), momentum
        self.register_buffer(
            "running_stats", torch.ones(shape, dtype=compute_dtype(dtype), device=device)
        )
        self.register_buffer("collected_steps", torch.zeros((), dtype=torch.int64, device=device))
        add_left_out(self, device)

    @property
    def has_data(self) -> bool:
        """Whether any batch counts; True on the meta device."""
        return self.collected_steps.is_meta or int(self.collected_steps) > 0

    @property
    def has_statistics(self) -> bool:
        """Whether any batch counts; True on the meta device."""
        return self.has_data

    def forward(self, x: Tensor) -> Tensor:
        """In training the batch's own statistic, else the running mean."""
        if not self.training:
            return self.running_stats
        if x.numel() == 0:
            return share(self, self.running_stats)
        statistic = reshaped(self.stats(self.view(x)), self.stats, self.shape)
        statistic = share(self, statistic)
        if is_recomputing():
            return statistic
        with torch.no_grad():
            now, steps = statistic.detach(), self.collected_steps
            finite = counts(now, x.detach(), self.stats)
            running = running_update(self.running_stats, now, steps, self.momentum, finite)
            self.running_stats.copy_(running)
            steps.add_(finite)
            self.leave_out(finite)
        return statistic

    @torch.no_grad()
    def restart_collection(self) -> None:
        """Forget what was collected."""
        self.collected_steps.zero_()

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A count below 0, or a statistic that isn't finite or is below 0."""
        if name == "collected_steps":
            return why_no_count(number, 0)
        return why_no_magnitude(number)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state dict without the number of batches is one whose mean is made of many."""
        if prefix + "running_stats" in state_dict and prefix + "collected_steps" not in state_dict:
            state_dict[prefix + "collected_steps"] = torch.ones((), dtype=torch.int64)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RuntimeStatsScaling(CoreModule):
    """The batch's own statistic in training (with its gradient), the running mean in evaluation.

    Args:
        scaling_stats_impl: the statistic.
        scaling_stats_input_view_shape_impl: shapes the input for it.
        scaling_shape: shape of the scale, that broadcasts to the input.
        scaling_affine_rescaling_init, scaling_affine_shifting_init: a learned affine map on the statistic.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
        scaling_stats_momentum: of the running mean; None for the plain mean.
        dtype, device: of parameters and buffers.
    """

    def __init__(
        self,
        scaling_stats_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module,
        scaling_shape: tuple[int, ...],
        scaling_affine_rescaling_init: float | None = None,
        scaling_affine_shifting_init: float | None = None,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_stats_momentum: float | None = 0.1,
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        affine = affine_or_none(
            scaling_affine_rescaling_init,
            scaling_affine_shifting_init,
            tuple(scaling_shape),
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
        self.runtime_stats = RuntimeStats(
            scaling_stats_impl,
            scaling_stats_input_view_shape_impl,
            scaling_shape,
            scaling_stats_momentum,
            dtype,
            device,
        )
        self.stats_scaling_impl = StatsScaling(restriction, affine)

    @property
    def depends_on_input(self) -> bool:
        """Whether the scale is that of the batch."""
        return self.training

    @property
    def has_statistics(self) -> bool:
        """Whether any batch was seen."""
        return self.runtime_stats.has_statistics

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for the activations ``x``."""
        return self.stats_scaling_impl(self.runtime_stats(x), threshold)  # type: ignore[no-any-return]


class ParameterFromRuntimeStatsScaling(CollectThenLearn):
    """Collects a statistic of the activations over N training calls, then learns the scale.

    While collecting, the scale is the batch's own statistic over the threshold, unrestricted; see
    :class:`~qframework.core.collector.CollectThenLearn` for phases and state-dict keys.

    Args:
        collect_stats_steps: N, at least 1.
        scaling_stats_impl: the statistic.
        scaling_stats_input_view_shape_impl: shapes the input for it.
        scaling_shape: shape of the scale, that broadcasts to the input.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
        scaling_stats_momentum: of the running mean; None for the plain mean.
        dtype, device: of parameters and buffers.
    """

    def __init__(
        self,
        collect_stats_steps: int,
        scaling_stats_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module | None = None,
        scaling_shape: tuple[int, ...] = (),
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_stats_momentum: float | None = 0.1,
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            collect_stats_steps, tuple(scaling_shape), scaling_stats_momentum, 1.0, dtype, device
        )
        self.scaling_stats_impl = scaling_stats_impl
        self.view = scaling_stats_input_view_shape_impl or OverBatchOverTensorView()
        self.restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        with torch.no_grad():
            self.value.copy_(self.to_stored(self.value))

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The scale for a threshold, once it is learned."""
        return stated(self.restriction, "learned", threshold, tuple(self.stored().shape))  # type: ignore[no-any-return]

    def saved(self, name: str, number: Tensor) -> Tensor:
        """A positive number."""
        return self.restriction.saved(number)

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A learned number that is none of a scale, a statistic below 0, or a counter of another kind."""
        if name == "value":
            if self.is_as_collected(number, entries):
                return None
            return self.restriction.why_refused(number)
        return (
            why_no_magnitude(number)
            if name == "running_stats"
            else super().why_refused(name, number, entries)
        )

    def statistic_part(self) -> nn.Module:
        """The statistic."""
        return self.scaling_stats_impl

    def statistic(self, x: Tensor, *context: Tensor) -> Tensor:
        """The statistic of a batch, kept above the minimum, in the shape of the scale."""
        return self.shaped(self.scaling_stats_impl(self.view(x)))

    def statistic_rule(self, stated: Stated) -> StatisticRule:
        """The statistic, where it is one of all elements."""
        return whole_statistic(stated, self.scaling_stats_impl, self.view)

    def shaped(self, statistic: Tensor) -> Tensor:
        """In the shape of the scale, above the minimum."""
        statistic = reshaped(statistic, self.scaling_stats_impl, self.shape)
        return self.restriction.clamp_min(statistic)  # type: ignore[no-any-return]

    def to_stored(self, statistic: Tensor) -> Tensor:
        """The statistic in the domain of the restriction."""
        return self.restriction.to_domain(statistic)

    def from_statistic(self, statistic: Tensor, *context: Tensor) -> Tensor:
        """The statistic over the threshold, unrestricted."""
        return self.restriction.divide(statistic, *context)

    def from_stored(self, stored: Tensor, *context: Tensor) -> Tensor:
        """The restricted number over the threshold."""
        return self.restriction(stored, *context)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for the activations ``x`` and a 0-dim threshold (1 when None)."""
        return (
            self.collect_or_learned(x)
            if threshold is None
            else self.collect_or_learned(x, threshold)
        )
