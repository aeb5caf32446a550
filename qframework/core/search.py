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
#: From values, a scale and a zero point, None for 0, to dequantized values.
Values = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def beside(statistic: Tensor, viewed: Tensor) -> Tensor:
    """A number per row as a column that broadcasts to the rows; one number, or one of all axes, as it is."""
    return statistic.reshape(_place(statistic.shape, viewed))


def _place(shape: torch.Size, viewed: Tensor) -> tuple[int, ...]:
    """The shape of :func:`beside` for a statistic of some shape."""
    if len(shape) == viewed.dim():
        return tuple(shape)
    if shape.numel() == 1:
        return ()
    return (-1, *[1] * (viewed.dim() - 1))


def all_beside(statistics: Tensor, viewed: Tensor) -> Tensor:
    """:func:`beside` for each of several statistics along the first axis."""
    return statistics.reshape(len(statistics), *_place(statistics.shape[1:], viewed))


class Trial(Stateless):
    """What a quantizer makes of a candidate, by the rule of its integers and clamp.

    Rounding that is random or learned is replaced by the nearest, so that a search has one answer. Gradients aren't asked for: what
    is computed is computed in place.

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

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest integer."""
        bits = self.bits()
        return self.int_quant.min_int(bits), self.int_quant.max_int(bits)  # type: ignore[operator]

    def integers(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        ends: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``clamp(round(x / scale + zero_point))``; no zero point is one of 0, no ends are the present ones."""
        low, high = self.ends() if ends is None else ends
        steps = x / scale
        if zero_point is not None:
            steps.add_(zero_point)
        steps = steps.round_() if type(self.rounding) is RoundSte else self.rounding(steps)
        # not clamp_, which is slow for bounds that are tensors
        return torch.minimum(torch.maximum(steps, low, out=steps), high, out=steps)

    def values(self) -> Values:
        """What makes dequantized values of ``x``, a scale and a zero point, as the quantizer is now."""
        ends = self.ends()

        def values(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
            steps = self.integers(x, scale, zero_point, ends)
            return (steps if zero_point is None else steps.sub_(zero_point)).mul_(scale)

        return values

    def grid(self, candidates: Tensor, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor | None]:
        """For subclasses: scales and zero points of candidates along the first axis, each beside the rows of ``x``."""
        raise TypeError(f"{type(self).__name__} has to define grid(candidates, x, *context)")


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
        return beside(self._scale(statistic), x)

    def _scale(self, statistic: Tensor) -> Tensor:
        stored = self.restriction.to_domain(statistic)
        return self.restriction(stored, self.threshold())  # type: ignore[no-any-return]

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

    def grid(self, candidates: Tensor, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales of candidates, and the zero points that go with them."""
        scales, offset = all_beside(self._scale(candidates), x), self.offset(x)
        return scales, None if offset is None else self.zero_point(offset, scales)


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
        return self._zero_point(beside(statistic, x), scale)

    def _zero_point(self, offset: Tensor, scale: Tensor) -> Tensor:
        return shift_zero_point(
            offset.abs(), scale, self.bits(), self.int_quant, self.quantize_zero_point
        )

    def grid(self, candidates: Tensor, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale ``context[0]`` for all candidates, and their zero points."""
        scale = beside(context[0].detach(), x)
        zero_points = self._zero_point(all_beside(candidates, x), scale)
        return scale.expand(zero_points.shape), zero_points


def equally_spaced(start: Tensor, iterations: int, bipolar: bool = False) -> Tensor:
    """Candidates from ``start / iterations`` to ``start``, both ends included, along a new first axis.

    Args:
        start: the largest magnitude, any shape.
        iterations: how many, at least 2.
        bipolar: half as many, and as many of the other sign.
    """
    step = start / iterations
    low, high = torch.minimum(step, start), torch.maximum(step, start)
    ranges = [(low, high), (-high, -low)] if bipolar else [(low, high)]
    count = iterations // len(ranges)
    fractions = torch.linspace(1 / (count - 1), 1.0, count - 1, device=start.device)
    fractions = torch.cat([fractions.new_zeros(1), fractions]).to(start.dtype)
    shares = fractions.reshape(-1, *[1] * start.dim())
    return torch.cat([left + (right - left) * shares for left, right in ranges])


#: Elements of a block times candidates, so that what is computed of them stays near the processor.
_BLOCK = 2**16


def squared_errors(
    values: Values, x: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int | None
) -> Tensor:
    """Sums of squared errors for each of several grids, in blocks of ``x``, all grids over one block before the next.

    Args:
        values: what are compared with ``x``.
        x: viewed values.
        scales: one for each grid along the first axis, beside the rows of ``x``.
        zero_points: likewise; None for none.
        axis: of the sum, None for all.
    """
    size = max(_BLOCK // len(scales), 1)

    def errors(part: Tensor, rows: slice = slice(None)) -> Tensor:
        zero = None if zero_points is None else _rows(zero_points, rows)
        found = values(part, _rows(scales, rows), zero).sub_(part)
        return found.mul_(found)

    if axis is None:
        columns = [len(scales), *[1] * (x.dim() - scales.dim() + 1), *scales.shape[1:]]
        scales = scales.reshape(columns)
        zero_points = None if zero_points is None else zero_points.reshape(columns)
        if scales.numel() > len(scales) or x.dim() > 1:
            return errors(x).flatten(1).sum(1)
        return sum((errors(part).sum(1) for part in x.split(size)), scales.new_zeros(len(scales)))
    along = axis if axis < 0 else axis + 1
    if x.dim() < 2 or axis in (0, -x.dim()) or scales.dim() != x.dim() + 1:
        return errors(x).sum(along)
    rows = max(size // max(x[0].numel(), 1), 1)
    starts = range(0, len(x), rows)
    return torch.cat([errors(x[i : i + rows], slice(i, i + rows)).sum(along) for i in starts], 1)


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


def _rows(numbers: Tensor, rows: slice) -> Tensor:
    """Those of some rows, of numbers beside the rows along the second axis."""
    return numbers if numbers.dim() < 2 or numbers.shape[1] == 1 else numbers[:, rows]


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
        start: Tensor = self.mse_init_op(x)
        values: Values = self.mse_trial.values()  # type: ignore[operator]

        def losses(candidates: Tensor) -> Tensor:
            scales, zero_points = self.mse_trial.grid(candidates, x, *context)  # type: ignore[operator]
            found = squared_errors(values, x, scales, zero_points, self.stats_reduce_dim)
            return found.reshape(candidates.shape)

        def loss(candidate: Tensor) -> Tensor:
            return losses(candidate.unsqueeze(0))[0]

        candidates = equally_spaced(start, self.mse_iters, self.mse_bipolar_search)
        errors = losses(candidates)
        errors = torch.where(errors.isnan(), torch.inf, errors)
        place = errors.argmin(0, keepdim=True)
        least = errors.gather(0, place)[0]
        best = torch.where(least < torch.inf, candidates.gather(0, place)[0], start)
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
