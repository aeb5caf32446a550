"""Zero points, in integer steps; all are called with ``(x, scale, bit_width)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated, number_of, parameter_of
from qframework.core.collector import CollectThenLearn, whole_statistic
from qframework.core.following import FollowsParameters, follow
from qframework.core.scaling.affine import affine_or_none
from qframework.core.scaling.from_parameter import statistic_axis
from qframework.core.statistic_shape import reshaped
from qframework.core.tracked import tracked_view
from qframework.functional import Granularity, StatisticRule, abs_binary_sign_grad, compute_dtype


def shift_zero_point(
    offset: Tensor, scale: Tensor, bit_width: Tensor, int_quant: Any, quantize: bool
) -> Tensor:
    """From an offset in the units of the values to a zero point in integer steps.

    ``offset / scale + min_int``, rounded and clamped into the integer range when ``quantize``.
    """
    minimum: Tensor = int_quant.min_int(bit_width)
    if quantize:
        return int_quant.to_int(scale, minimum, bit_width, offset)  # type: ignore[no-any-return]
    return offset / scale + minimum


class ZeroZeroPoint(CoreModule):
    """No shift: 0-dim 0, in the dtype and on the device of the scale.

    Args:
        dtype, device: not looked at.
    """

    symmetric = True
    depends_on_input = False

    def __init__(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()

    def rule(self, stated: Stated) -> None:
        """There is no zero point."""

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """0."""
        return torch.zeros((), dtype=scale.dtype, device=scale.device)


class ParameterZeroPoint(CoreModule):
    """A learned offset; state-dict key ``value``.

    Args:
        zero_point_init: initial offset in the units of the values, 0 or above.
        int_quant: the integer quantizer that the zero point is for.
        quantize_zero_point: round it to an integer of the range.
        zero_point_shape: shape of the zero point, that of ``zero_point_init`` when None.
        dtype, device: of the parameter.
    """

    symmetric = False
    depends_on_input = False

    def __init__(
        self,
        zero_point_init: float | Tensor,
        int_quant: nn.Module,
        quantize_zero_point: bool,
        zero_point_shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        init = (
            torch.as_tensor(zero_point_init, dtype=compute_dtype(dtype), device=device)
            .detach()
            .clone()
        )
        if zero_point_shape is not None:
            init = init.expand(zero_point_shape).clone()
        self.shape = tuple(init.shape)
        self.value = parameter_of(init)
        self.int_quant, self.quantize_zero_point = int_quant, quantize_zero_point

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset = abs_binary_sign_grad(number_of(self.value, self.shape))
        return shift_zero_point(offset, scale, bit_width, self.int_quant, self.quantize_zero_point)


class StatsFromParameterZeroPoint(CoreModule):
    """An offset that is minus a statistic (which is 0 or below) of the parameter, taken at every call.

    Args:
        int_quant: the integer quantizer that the zero point is for.
        quantize_zero_point: round it to an integer of the range.
        zero_point_stats_input_view_shape_impl: shapes the parameter for the statistic.
        zero_point_stats_input_concat_dim: axis along which several parameters' views are joined.
        zero_point_stats_impl: the statistic.
        zero_point_shape: shape of the zero point, that broadcasts to the parameter.
        tracked_parameter_list: the parameters of all layers that share the quantizer.
        scale_shift_zero_point_impl: replaces the map from offset to zero point; called with
            ``(offset, scale, bit_width)``.
        zero_point_affine_rescaling_init, zero_point_affine_shifting_init: a learned affine map on the offset.
        dtype, device: of the affine parameters.
    """

    symmetric = False

    def __init__(
        self,
        int_quant: nn.Module,
        quantize_zero_point: bool,
        zero_point_stats_input_view_shape_impl: nn.Module,
        zero_point_stats_input_concat_dim: int | None,
        zero_point_stats_impl: nn.Module,
        zero_point_shape: tuple[int, ...],
        tracked_parameter_list: Sequence[Tensor],
        scale_shift_zero_point_impl: nn.Module | None = None,
        zero_point_affine_rescaling_init: float | None = None,
        zero_point_affine_shifting_init: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.int_quant, self.quantize_zero_point = int_quant, quantize_zero_point
        self.view, self.stats = zero_point_stats_input_view_shape_impl, zero_point_stats_impl
        self.concat_dim, self.tracked_parameter_list = (
            zero_point_stats_input_concat_dim,
            tracked_parameter_list,
        )
        self.zero_point_shape = tuple(zero_point_shape)
        self.scale_shift_zero_point_impl = scale_shift_zero_point_impl
        self.affine_rescaling = affine_or_none(
            zero_point_affine_rescaling_init,
            zero_point_affine_shifting_init,
            self.zero_point_shape,
            dtype,
            device,
            "zero_point",
        )
        self._start()

    def _start(self) -> None:
        """For subclasses: the last step of construction."""

    def rule(self, stated: Stated) -> Granularity:
        """That the zero point is minus the smallest element, or 0, as an integer, of the tensor or of each channel."""
        if not self.quantize_zero_point or self.scale_shift_zero_point_impl is not None:
            raise NotStated("the zero point isn't rounded as the values are")
        if self.affine_rescaling is not None or len(self.tracked_parameter_list) > 1:
            raise NotStated("the zero point isn't that of the tensor's own range")
        statistic = stated(self.stats)
        if statistic.kind != "negative_min":
            raise NotStated(f"no faster form has a zero point of the statistic {statistic.kind!r}")
        return Granularity(statistic_axis(statistic, stated(self.view)))

    def context(self) -> tuple[Tensor, ...]:
        """For subclasses: what the statistic is called with beside the parameter."""
        return ()

    def statistic(self, x: Tensor | None) -> Tensor:
        """The statistic in the shape of the zero point, of ``x`` or of all the tracked parameters."""
        if x is None or len(self.tracked_parameter_list) > 1:
            viewed = tracked_view(self.tracked_parameter_list, self.view, self.concat_dim)
        else:
            viewed = self.view(x)
        statistic = self.stats(viewed, *self.context())
        return reshaped(statistic, self.stats, self.zero_point_shape, "zero point")

    def offset(self, x: Tensor) -> Tensor:
        """Minus the statistic."""
        offset = -self.statistic(x)
        return offset if self.affine_rescaling is None else self.affine_rescaling(offset)

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset = self.offset(x)
        if self.scale_shift_zero_point_impl is not None:
            return self.scale_shift_zero_point_impl(offset, scale, bit_width)  # type: ignore[no-any-return]
        return shift_zero_point(offset, scale, bit_width, self.int_quant, self.quantize_zero_point)


class ParameterFromStatsFromParameterZeroPoint(FollowsParameters, StatsFromParameterZeroPoint):
    """A learned offset that starts from a statistic of the parameter; state-dict key ``value``.

    It starts at construction and follows the parameter until it has been trained or loaded itself. Arguments as
    for :class:`StatsFromParameterZeroPoint`. ``value`` holds the statistic itself, which is 0 or below.
    """

    def _start(self) -> None:
        first = self.tracked_parameter_list[0]
        self._start_following(self.zero_point_shape, compute_dtype(first.dtype), first.device)

    def rule(self, stated: Stated) -> Granularity:
        """Nothing is stated of a learned offset."""
        raise NotStated("the zero point is learned")

    @property
    def is_costly(self) -> bool:  # type: ignore[override]
        """Whether the statistic is searched for."""
        return bool(getattr(self.stats, "is_search", False))

    def origins(self) -> Sequence[Tensor]:
        """The tracked parameters."""
        return list(self.tracked_parameter_list)

    def computed(self) -> Tensor:
        """The statistic of the tracked parameters."""
        statistic = self.statistic(None)
        if self.affine_rescaling is not None:
            statistic = -self.affine_rescaling(-statistic)
        return statistic

    def offset(self, x: Tensor) -> Tensor:
        """The magnitude of the learned number."""
        follow(self)
        return abs_binary_sign_grad(number_of(self.value, self.zero_point_shape))


class ParameterFromRuntimeZeroPoint(CollectThenLearn):
    """Collects a statistic (0 or below) of the activations over N training calls, then learns the offset.

    See :class:`~qframework.core.collector.CollectThenLearn` for phases and state-dict keys. ``value`` holds the
    statistic itself, which is 0 or below.

    Args:
        collect_stats_steps: N, at least 1.
        int_quant: the integer quantizer that the zero point is for.
        quantize_zero_point: round it to an integer of the range.
        zero_point_stats_impl: the statistic.
        zero_point_shape: shape of the zero point, that broadcasts to the input.
        zero_point_stats_input_view_shape_impl: shapes the input for the statistic.
        zero_point_stats_momentum: of the running mean; None for the plain mean.
        dtype, device: of parameters and buffers.
    """

    symmetric = False

    def __init__(
        self,
        collect_stats_steps: int,
        int_quant: nn.Module,
        quantize_zero_point: bool,
        zero_point_stats_impl: nn.Module,
        zero_point_shape: tuple[int, ...],
        zero_point_stats_input_view_shape_impl: nn.Module,
        zero_point_stats_momentum: float | None = 0.1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            collect_stats_steps,
            tuple(zero_point_shape),
            zero_point_stats_momentum,
            0.0,
            dtype,
            device,
        )
        self.int_quant, self.quantize_zero_point = int_quant, quantize_zero_point
        self.stats, self.view = zero_point_stats_impl, zero_point_stats_input_view_shape_impl

    def statistic_part(self) -> nn.Module:
        """The statistic."""
        return self.stats

    def statistic(self, x: Tensor, *context: Tensor) -> Tensor:
        """The statistic of a batch, in the shape of the zero point."""
        return reshaped(self.stats(self.view(x), *context), self.stats, self.shape, "zero point")

    def statistic_rule(self, stated: Stated) -> StatisticRule:
        """The statistic, where it is one of all elements."""
        return whole_statistic(stated, self.stats, self.view)

    def from_statistic(self, statistic: Tensor, *context: Tensor) -> Tensor:
        """The magnitude of the statistic."""
        return abs_binary_sign_grad(statistic)

    def from_stored(self, stored: Tensor, *context: Tensor) -> Tensor:
        """The magnitude of the learned number."""
        return abs_binary_sign_grad(stored)

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset = self.collect_or_learned(x)
        return shift_zero_point(offset, scale, bit_width, self.int_quant, self.quantize_zero_point)
