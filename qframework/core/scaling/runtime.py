"""Scales from statistics of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, is_recomputing, wide_dtype
from qframework.core.collector import CollectThenLearn, running_update
from qframework.core.function_wrapper import OverBatchOverTensorView, OverTensorView
from qframework.core.restrict_val import FloatRestrictValue, RestrictValue, ScaleRestriction
from qframework.core.scaling.affine import StatsScaling, affine_or_none
from qframework.core.stats import Statistic


class RuntimeStats(CoreModule):
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
            "running_stats", torch.ones(shape, dtype=wide_dtype(dtype), device=device)
        )
        self.register_buffer("collected_steps", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def repeatable(self) -> bool:
        """Training calls are counted."""
        return not self.training

    @property
    def has_statistics(self) -> bool:
        """Whether any batch was seen."""
        return self.collected_steps.device.type != "meta" and int(self.collected_steps) > 0

    def forward(self, x: Tensor) -> Tensor:
        """In training the batch's own statistic, else the running mean."""
        if not self.training or x.numel() == 0:
            return self.running_stats
        statistic: Tensor = self.stats(self.view(x)).reshape(self.shape)
        if is_recomputing():
            return statistic
        with torch.no_grad():
            now, steps = statistic.detach(), self.collected_steps
            self.running_stats.copy_(running_update(self.running_stats, now, steps, self.momentum))
            steps.add_(torch.isfinite(now).all())
        return statistic

    @torch.no_grad()
    def restart_collection(self) -> None:
        """Forget what was collected."""
        self.collected_steps.zero_()

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
            restrict_scaling_impl or FloatRestrictValue(),
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
    def looks_at_input(self) -> bool:
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
            restrict_scaling_impl or FloatRestrictValue(),
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        with torch.no_grad():
            self.value.copy_(self.to_stored(self.value))

    def view_of(self, x: Tensor) -> Tensor:
        """The batch in the shape that the statistic reduces."""
        return self.view(x)  # type: ignore[no-any-return]

    def reduce(self, viewed: Tensor, *context: Tensor) -> Tensor:
        """The statistic of a viewed batch, kept above the minimum, in the shape of the scale."""
        statistic = self.scaling_stats_impl(viewed).reshape(self.value.shape)
        return self.restriction.clamp_min(statistic)  # type: ignore[no-any-return]

    def reduce_if(self, x: Tensor, wanted: Tensor) -> Tensor | None:
        """The statistic of a batch where ``wanted``, kept above the minimum."""
        if type(self.view) is not OverTensorView or not isinstance(
            self.scaling_stats_impl, Statistic
        ):
            return None
        statistic = self.scaling_stats_impl.only_if(x, wanted)
        if statistic is None:
            return None
        return self.restriction.clamp_min(statistic.reshape(self.value.shape))  # type: ignore[no-any-return]

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
        """The scale for the activations ``x``."""
        return (
            self.collect_or_learned(x)
            if threshold is None
            else self.collect_or_learned(x, threshold)
        )
