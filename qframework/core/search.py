"""Scales and zero points that are searched for: the candidate with the least squared error wins.

A search sees values in the shape of a view, ``(n,)`` or one row per channel ``(C, n)``, and tries candidates of the
shape of the statistic, ``()`` or ``(C,)``. What a candidate gives is told by a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from qframework.core.base import Stateless
from qframework.core.function_wrapper import Rounding, RoundSte
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.core.stats import Statistic
from qframework.core.zero_point import shift_zero_point
from qframework.functional import upcast

#: Scale and zero point that the values of a search are quantized with, where they aren't searched for.
Context = tuple[Tensor, ...]


def beside(statistic: Tensor, viewed: Tensor) -> Tensor:
    """A number per row as a column that broadcasts to the rows; one number, or one of all axes, as it is."""
    if statistic.dim() == viewed.dim():
        return statistic
    if statistic.numel() == 1:
        return statistic.reshape(())
    return statistic.reshape(-1, *[1] * (viewed.dim() - 1))


class Trial(Stateless):
    """What a quantizer makes of a candidate, by the rule of its integers and clamp.

    Rounding that is random or learned is replaced by the nearest, so that a search has one answer.

    Args:
        int_quant: the integer quantizer.
        int_scaling_impl: from the bit width to the integer threshold of the scale.
        bit_width_impl: called with nothing.
    """

    def __init__(
        self, int_quant: nn.Module, int_scaling_impl: nn.Module, bit_width_impl: nn.Module
    ) -> None:
        super().__init__()
        self.int_quant, self.int_scaling_impl = int_quant, int_scaling_impl
        self.bit_width_impl = bit_width_impl
        rule = int_quant.float_to_int_impl
        self.rounding = rule if isinstance(rule, Rounding) else RoundSte()

    def bits(self) -> Tensor:
        """The present bit width, without its gradient."""
        return self.bit_width_impl().detach()  # type: ignore[no-any-return]

    def threshold(self) -> Tensor:
        """The integer that the statistic is mapped to."""
        return self.int_scaling_impl(self.bits())  # type: ignore[no-any-return]

    def integers(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``clamp(round(x / scale + zero_point))``."""
        bits = self.bits()
        low, high = self.int_quant.min_int(bits), self.int_quant.max_int(bits)  # type: ignore[operator]
        return self.rounding(x / scale + zero_point).clamp(low, high)  # type: ignore[no-any-return]

    def values(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The dequantized values."""
        return (self.integers(x, scale, zero_point) - zero_point) * scale


class ScaleTrial(Trial):
    """Trial of a scale's statistic; the zero point is 0, or follows from a statistic of the values.

    Args:
        int_quant, int_scaling_impl, bit_width_impl: see :class:`Trial`.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
        zero_point_stats: statistic (0 or below) that the zero point is minus of; None for no zero point.
        quantize_zero_point: round the zero point to an integer of the range.
    """

    def __init__(
        self,
        int_quant: nn.Module,
        int_scaling_impl: nn.Module,
        bit_width_impl: nn.Module,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
        zero_point_stats: nn.Module | None = None,
        quantize_zero_point: bool = True,
    ) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width_impl)
        self.restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        self.zero_point_stats, self.quantize_zero_point = zero_point_stats, quantize_zero_point

    def scale(self, statistic: Tensor, x: Tensor) -> Tensor:
        """The scale for a statistic, beside the rows of ``x``."""
        stored = self.restriction.to_domain(statistic)
        return beside(self.restriction(stored, self.threshold()), x)

    def offset(self, x: Tensor) -> Tensor | None:
        """Minus the zero point's statistic, beside the rows of ``x``."""
        return None if self.zero_point_stats is None else beside(-self.zero_point_stats(x), x)

    def zero_point(self, offset: Tensor | None, scale: Tensor) -> Tensor:
        """The zero point, in integer steps."""
        if offset is None:
            return torch.zeros_like(scale)
        return shift_zero_point(
            offset, scale, self.bits(), self.int_quant, self.quantize_zero_point
        )

    def of(self, x: Tensor, *context: Tensor) -> Callable[[Tensor], Tensor]:
        """From a candidate to the dequantized values of ``x``."""
        offset = self.offset(x)

        def quantized(statistic: Tensor) -> Tensor:
            scale = self.scale(statistic, x)
            return self.values(x, scale, self.zero_point(offset, scale))

        return quantized


class ZeroPointTrial(Trial):
    """Trial of a zero point's statistic, at a scale that is given.

    Args:
        int_quant, int_scaling_impl, bit_width_impl: see :class:`Trial`.
        quantize_zero_point: round the zero point to an integer of the range.
    """

    def __init__(
        self,
        int_quant: nn.Module,
        int_scaling_impl: nn.Module,
        bit_width_impl: nn.Module,
        quantize_zero_point: bool,
    ) -> None:
        super().__init__(int_quant, int_scaling_impl, bit_width_impl)
        self.quantize_zero_point = quantize_zero_point

    def zero_point(self, statistic: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        """The zero point for a statistic, in integer steps."""
        return shift_zero_point(
            beside(statistic.abs(), x), scale, self.bits(), self.int_quant, self.quantize_zero_point
        )

    def of(self, x: Tensor, *context: Tensor) -> Callable[[Tensor], Tensor]:
        """From a candidate to the dequantized values of ``x`` at the scale ``context[0]``."""
        scale = beside(context[0].detach(), x)

        def quantized(statistic: Tensor) -> Tensor:
            return self.values(x, scale, self.zero_point(statistic, scale, x))

        return quantized


def grid(start: Tensor, iterations: int, bipolar: bool = False) -> Iterator[Tensor]:
    """Candidates from ``start / iterations`` to ``start``, equally spaced, both ends included.

    Args:
        start: the largest magnitude, any shape.
        iterations: how many, at least 2.
        bipolar: half as many, and as many of the other sign.
    """
    step = start / iterations
    low, high = torch.minimum(step, start), torch.maximum(step, start)
    ranges = [(low, high), (-high, -low)] if bipolar else [(low, high)]
    count = iterations // len(ranges)
    for left, right in ranges:
        yield left
        for fraction in torch.linspace(1 / (count - 1), 1.0, count - 1, device=start.device):
            yield left + (right - left) * fraction


def narrowed(
    error: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates of a Fibonacci search, and their errors: the interval becomes that around the lesser of two, again and again.

    Args:
        error: of a candidate, in its shape.
        low: left ends of the intervals, of any shape.
        high: right ends.
        steps: how many candidates, at least 2.
    """
    numbers = [1, 1]
    while len(numbers) <= steps:
        numbers.append(numbers[-1] + numbers[-2])
    share = numbers[-2] / numbers[-1]
    left, right = high - (high - low) * share, low + (high - low) * share
    of_left, of_right = error(left), error(right)
    yield left, of_left
    yield right, of_right
    for at in range(steps - 2):
        share = numbers[-3 - at] / numbers[-2 - at]
        first = of_left < of_right
        low, high = torch.where(first, low, left), torch.where(first, right, high)
        tried = torch.where(first, high - (high - low) * share, low + (high - low) * share)
        of_tried = error(tried)
        left, right = torch.where(first, tried, right), torch.where(first, left, tried)
        of_left, of_right = (
            torch.where(first, of_tried, of_right),
            torch.where(first, of_left, of_tried),
        )
        yield tried, of_tried


class MSE(Statistic):
    """The candidate with the least sum of squared errors, row by row; the first of equals.

    Candidates lie equally spaced between ``m / iterations`` and ``m``, where ``m`` is a statistic such as the
    largest magnitude. With ``mse_search_method='fibonacci'`` the interval between the two, and then the one around the best so
    far, are narrowed down as well, by as many candidates each. The choice is made without gradients; none flow to ``x``.

    Args:
        mse_trial: what a candidate gives.
        mse_init_op: the statistic ``m``.
        stats_reduce_dim: axis of the errors' sum, None for all.
        mse_iters: number of candidates, at least 2.
        mse_bipolar_search: half of the candidates of the other sign.
        keepdim: keep that axis with length 1.
        mse_search_method: ``'grid'`` or ``'fibonacci'``.
    """

    is_search = True

    def __init__(
        self,
        mse_trial: nn.Module,
        mse_init_op: nn.Module,
        stats_reduce_dim: int | None = None,
        mse_iters: int = 20,
        mse_bipolar_search: bool = False,
        keepdim: bool = False,
        mse_search_method: str = "grid",
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)
        if mse_search_method not in ("grid", "fibonacci"):
            raise ValueError(
                f"mse_search_method={mse_search_method!r}; allowed: 'grid', 'fibonacci'"
            )
        self.narrows = mse_search_method == "fibonacci"
        if mse_iters < (4 if mse_bipolar_search else 2):
            least = "4 with mse_bipolar_search" if mse_bipolar_search else "2"
            raise ValueError(f"mse_iters={mse_iters!r} must be at least {least}: both ends")
        self.mse_trial, self.mse_init_op = mse_trial, mse_init_op
        self.mse_iters, self.mse_bipolar_search = mse_iters, mse_bipolar_search

    @torch.no_grad()
    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The best statistic of the viewed ``x``.

        Args:
            x: values, ``(n,)`` or ``(C, n)``.
            *context: for the trial.
        """
        x = upcast(x)
        quantized = self.mse_trial.of(x, *context)  # type: ignore[operator]
        start: Tensor = self.mse_init_op(x)

        def loss(candidate: Tensor) -> Tensor:
            error: Tensor = (quantized(candidate) - x).square()
            if self.stats_reduce_dim is None:
                return error.sum()
            return error.sum(self.stats_reduce_dim, self.keepdim)

        tried = ((c, loss(c)) for c in grid(start, self.mse_iters, self.mse_bipolar_search))
        best, least = _better(start, torch.full_like(start, torch.inf), tried)
        if self.narrows:
            step = (start / self.mse_iters).abs()
            for low, high in ((step.copysign(start), start), (best - step, best + step)):
                best, least = _better(best, least, narrowed(loss, low, high, self.mse_iters))
        return best


def _better(
    best: Tensor, least: Tensor, tried: Iterator[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The best candidate and its error, of one with its error and others with theirs; the first of equals."""
    for candidate, error in tried:
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best, least
