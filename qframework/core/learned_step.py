"""Learned step sizes and ranges with the gradients of the papers: LSQ, LSQ+, PACT, DoReFa.

What they have in common is that values are clipped before they are rounded, which matters for gradients alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qframework.core.base import CoreModule, NotStated, Stated
from qframework.core.collector import CollectThenLearn
from qframework.core.quant import IntQuant, QuantOutput
from qframework.core.scaling import (
    ParameterFromRuntimeStatsScaling,
    ParameterFromStatsFromParameterScaling,
)
from qframework.core.statistic_shape import reshaped
from qframework.core.stats import Statistic, sees_all
from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    floating,
    max_int,
    min_int,
    round_ste,
    upcast,
)


class _ScaleGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


class _InPlaceOf(Function):
    """The value of one tensor with the gradient of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(surrogate: Tensor, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None


class ClipThenRoundIntQuant(IntQuant):
    """``q = round(clip(x / s + z, low, high))``, differentiated as in LSQ (https://arxiv.org/abs/1902.08153).

    Rounding is straight through; a value on or beyond an end gets no gradient, and ``dy/ds`` is ``q - x/s`` inside,
    ``q`` at the ends (less what the zero point contributes). Arguments as for
    :class:`~qframework.core.quant.IntQuant`.
    """

    def rule(
        self, stated: Stated, bits: int | None, dtype: torch.dtype | None = None
    ) -> IntegerGrid:
        """The integers of a width in bits, clipped first; nothing is stated of a width that isn't a number."""
        if bits is None:
            raise NotStated("values are clipped to learned ends before they are rounded")
        return replace(super().rule(stated, bits, dtype), clamp_gradient=True, clips_first=True)

    def _ends(self, bit_width: Tensor) -> tuple[Tensor, Tensor]:
        return self.min_int(bit_width), self.max_int(bit_width)

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The integers, in the float dtype of ``x``."""
        low, high = self._ends(bit_width)
        steps = upcast(x) / scale + zero_point
        clipped = torch.where(steps >= high, high, torch.where(steps <= low, low, steps))
        return self.float_to_int_impl(clipped)  # type: ignore[no-any-return]


class ClipGradientIntQuant(ClipThenRoundIntQuant):
    """The same values with the gradient of the clip alone (PACT, https://arxiv.org/abs/1805.06085).

    A value inside gets the gradient and the scale none; beyond an end the end gets it, through the scale.
    """

    def rule(
        self, stated: Stated, bits: int | None, dtype: torch.dtype | None = None
    ) -> IntegerGrid:
        """Nothing is stated of a scale that moves with the ends alone."""
        raise NotStated("the gradient of the scale is that of the clip alone")

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The dequantized values of ``x``; arguments as for :meth:`~qframework.core.quant.IntQuant.forward`."""
        viewed = self.input_view_impl(x)
        low, high = (((end - zero_point) * scale) for end in self._ends(bit_width))
        wide = upcast(viewed)
        clipped = torch.where(wide >= high, high, torch.where(wide < low, low, wide))
        with torch.no_grad():
            q = self.to_int(scale, zero_point, bit_width, wide)
            result = (q - zero_point) * scale
        y: Tensor = _InPlaceOf.apply(clipped, result).to(x.dtype)  # type: ignore[no-untyped-call]
        return y if self.delay_wrapper is None else self.delay_wrapper(viewed, y)


# ------------------------------------------------------------------ statistics to start from


class _StepStart(Statistic):
    def __init__(
        self,
        signed: bool,
        narrow_range: bool,
        bit_width_impl: nn.Module,
        stats_reduce_dim: int | None = None,
    ) -> None:
        super().__init__(stats_reduce_dim)
        self.signed, self.narrow_range, self.bit_width_impl = signed, narrow_range, bit_width_impl

    def top(self) -> Tensor:
        """The largest integer, ``Q_P``."""
        return max_int(self.signed, self.narrow_range, self.bit_width_impl().detach())

    def codes(self) -> Tensor:
        """The number of steps, ``Q_P + Q_N``."""
        bits = self.bit_width_impl().detach()
        return self.top() - min_int(self.signed, self.narrow_range, bits)


@sees_all
class LearnedStepStart(_StepStart):
    """``2 mean|x| / sqrt(Q_P)``, the start of LSQ.

    Args:
        signed, narrow_range: the integer range.
        bit_width_impl: called with nothing.
        stats_reduce_dim: axis to reduce, None for all.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self._mean(upcast(x).abs()) / self.top().sqrt()


@sees_all
class ThreeSigmaStepStart(_StepStart):
    """``max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)``, the start of LSQ+ for weights; arguments as in LSQ."""

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        mean, dim = self._mean(x), self.stats_reduce_dim
        sigma = x.std(correction=0) if dim is None else x.std(dim, correction=0)
        reach = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs())
        return reach / (-min_int(True, False, self.bit_width_impl().detach()))


@sees_all
class RangeStepStart(_StepStart):
    """``(max x - min x) / (Q_P + Q_N)``, the start of LSQ+ for activations; arguments as in LSQ."""

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        return (self._max(x) - self._min(x)) / self.codes()


class Minimum(Statistic):
    """``min x``."""

    def forward(self, x: Tensor) -> Tensor:
        return self._min(upcast(x))


# ------------------------------------------------------------------ learned steps


class _Slowed:
    """Divides the gradient of a step by ``sqrt(N Q_P)``, N the values that share it."""

    def _keep(self, signed: bool, narrow_range: bool, bit_width_impl: nn.Module) -> None:
        # In a tuple: the module belongs to the tensor quantizer, under its name there.
        self.__dict__["_range"] = (signed, narrow_range, bit_width_impl)

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """Nothing is stated of a step whose gradient is scaled."""
        raise NotStated("the gradient of the scale is scaled")

    def _slow(self, number: Tensor, count: int) -> Tensor:
        signed, narrow_range, bit_width_impl = self.__dict__["_range"]
        top = max_int(signed, narrow_range, bit_width_impl().detach())
        factor = torch.rsqrt(top * max(count, 1)).to(number.dtype)
        return _ScaleGradient.apply(number, factor)  # type: ignore[no-any-return, no-untyped-call]


class LearnedStepFromParameter(_Slowed, ParameterFromStatsFromParameterScaling):
    """A learned step of weights, its gradient scaled by ``1 / sqrt(N Q_P)``, N the weights that share the step.

    Args:
        signed, narrow_range: the integer range.
        bit_width_impl: called with nothing.
        scaling_stats_impl, scaling_stats_input_view_shape_impl, scaling_stats_input_concat_dim, tracked_parameter_list, scaling_shape, scaling_min_val, dtype, device:
            see :class:`~qframework.core.scaling.StatsFromParameterScaling`.
    """

    def __init__(
        self,
        signed: bool,
        narrow_range: bool,
        bit_width_impl: nn.Module,
        scaling_stats_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module,
        scaling_stats_input_concat_dim: int | None,
        tracked_parameter_list: Sequence[Tensor],
        scaling_shape: tuple[int, ...],
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._keep(signed, narrow_range, bit_width_impl)
        super().__init__(
            scaling_stats_impl,
            scaling_stats_input_view_shape_impl,
            scaling_stats_input_concat_dim,
            tracked_parameter_list,
            scaling_shape,
            scaling_min_val=scaling_min_val,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The step."""
        return self._slow(super().forward(x, threshold), x.numel() // max(self.value.numel(), 1))


class LearnedStepFromRuntime(_Slowed, ParameterFromRuntimeStatsScaling):
    """A learned step of activations, its gradient scaled by ``1 / sqrt(N Q_P)``, N the features of a sample.

    Args:
        signed, narrow_range: the integer range.
        bit_width_impl: called with nothing.
        collect_stats_steps, scaling_stats_impl, scaling_stats_input_view_shape_impl, scaling_shape, scaling_stats_momentum, scaling_min_val, dtype, device:
            see :class:`~qframework.core.scaling.ParameterFromRuntimeStatsScaling`.
    """

    def __init__(
        self,
        signed: bool,
        narrow_range: bool,
        bit_width_impl: nn.Module,
        collect_stats_steps: int,
        scaling_stats_impl: nn.Module,
        scaling_stats_input_view_shape_impl: nn.Module,
        scaling_shape: tuple[int, ...] = (),
        scaling_stats_momentum: float | None = 0.1,
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._keep(signed, narrow_range, bit_width_impl)
        super().__init__(
            collect_stats_steps,
            scaling_stats_impl,
            scaling_stats_input_view_shape_impl,
            scaling_shape,
            scaling_stats_momentum=scaling_stats_momentum,
            scaling_min_val=scaling_min_val,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The step."""
        return self._slow(super().forward(x, threshold), _features(x, self.value.numel()))


def _features(x: Tensor, shares: int) -> int:
    samples = x.shape[0] if x.dim() > 1 else 1
    return int(x.numel() // max(samples, 1) // max(shares, 1))


class LearnedOffset(_Slowed, CollectThenLearn):
    """The offset beta of LSQ+ (https://arxiv.org/abs/2004.09576) as a zero point, ``z = min_int - beta / s``.

    It starts from the minimum of the activations, may have any sign and isn't rounded; its gradient is scaled as that
    of the step. See :class:`~qframework.core.collector.CollectThenLearn` for phases and state-dict keys.

    Args:
        signed, narrow_range: the integer range.
        bit_width_impl: called with nothing.
        collect_stats_steps: training calls that the minimum is collected over.
        zero_point_stats_impl: the statistic, the minimum.
        zero_point_shape: shape of the zero point, that broadcasts to the input.
        zero_point_stats_input_view_shape_impl: shapes the input for the statistic.
        zero_point_stats_momentum: of the running mean; None for the plain mean.
        dtype, device: of parameters and buffers.
    """

    symmetric = False

    def __init__(
        self,
        signed: bool,
        narrow_range: bool,
        bit_width_impl: nn.Module,
        collect_stats_steps: int,
        zero_point_stats_impl: nn.Module,
        zero_point_shape: tuple[int, ...],
        zero_point_stats_input_view_shape_impl: nn.Module,
        zero_point_stats_momentum: float | None = 0.1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._keep(signed, narrow_range, bit_width_impl)
        super().__init__(
            collect_stats_steps,
            tuple(zero_point_shape),
            zero_point_stats_momentum,
            0.0,
            dtype,
            device,
        )
        self.signed, self.narrow_range = signed, narrow_range
        self.stats, self.view = zero_point_stats_impl, zero_point_stats_input_view_shape_impl

    def statistic_part(self) -> nn.Module:
        """The statistic."""
        return self.stats

    def statistic(self, x: Tensor, *context: Tensor) -> Tensor:
        """The minimum of a batch, in the shape of the zero point."""
        return reshaped(self.stats(self.view(x)), self.stats, self.shape, "zero point")

    def from_statistic(self, statistic: Tensor, *context: Tensor) -> Tensor:
        """The statistic itself."""
        return statistic.clone()

    def from_stored(self, stored: Tensor, *context: Tensor) -> Tensor:
        """The learned number itself."""
        return stored.clone()

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        beta = self._slow(self.collect_or_learned(x), _features(x, self.value.numel()))
        return min_int(self.signed, self.narrow_range, bit_width) - beta / scale


# ------------------------------------------------------------------ DoReFa


class CenterZeroPoint(CoreModule):
    """``(2^b - 1) / 2``: half of the codes on either side of 0, which is none of them."""

    symmetric = False

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        return (2.0**bit_width - 1) / 2


class DoReFaWeightQuant(CoreModule):
    """``2 round((2^b - 1) r) / (2^b - 1) - 1``, ``r = tanh(w) / (2 max|tanh(w)|) + 1/2``; r is 1/2 where all of ``w`` is 0.

    Values from -1 to 1, rounding straight through (https://arxiv.org/abs/1606.06160, equation 9).

    Args:
        bit_width_impl: called with nothing; 2 bits or more.
    """

    def __init__(self, bit_width_impl: nn.Module) -> None:
        super().__init__()
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.zero_point_impl = CenterZeroPoint()

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and bit width."""
        bits = self.msb_clamp_bit_width_impl()
        scale = 2 / (2.0**bits - 1)
        return scale, self.zero_point_impl(x, scale, bits), bits

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: Tensor) -> Tensor:
        """The integers of ``x``, in a float dtype."""
        bent = torch.tanh(upcast(x))
        top = bent.abs().max()
        r = bent / torch.where(top == 0, 1.0, top) / 2 + 0.5
        return round_ste(r * (2.0**bit_width - 1))

    def forward(self, x: Tensor) -> QuantOutput:
        x = floating(x)
        scale, zero_point, bits = self.parameters_for(x)
        q = self.codes(x, scale, zero_point, bits)
        return ((q - zero_point) * scale).to(x.dtype), scale, zero_point, bits
