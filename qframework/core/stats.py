"""Statistics of a tensor that a scale or a zero point is made of.

Every class takes a tensor that a view has already shaped, and reduces it wholly (``stats_reduce_dim=None``, result
0-dim) or along one axis. Percentiles are order statistics (``kthvalue``), exact on any size.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qframework.core.base import Stated, Stateless, number_of, parameter_of
from qframework.functional import (
    StatisticRule,
    abs_max,
    compute_dtype,
    extreme,
    high_rank,
    kth_smallest,
    low_rank,
    upcast,
)


class Statistic(Stateless):
    """Base: remembers the axis.

    Args:
        stats_reduce_dim: axis to reduce, None for all.
        keepdim: keep the reduced axis with length 1.
    """

    def __init__(self, stats_reduce_dim: int | None = None, keepdim: bool = False) -> None:
        super().__init__()
        self.stats_reduce_dim, self.keepdim = stats_reduce_dim, keepdim

    def _max(self, x: Tensor) -> Tensor:
        if self.stats_reduce_dim is None:
            return x.max()
        return extreme(x, True, self.stats_reduce_dim, self.keepdim)

    def _min(self, x: Tensor) -> Tensor:
        if self.stats_reduce_dim is None:
            return x.min()
        return extreme(x, False, self.stats_reduce_dim, self.keepdim)

    def _mean(self, x: Tensor) -> Tensor:
        if self.stats_reduce_dim is None:
            return x.mean()
        return x.mean(dim=self.stats_reduce_dim, keepdim=self.keepdim)

    def _kth(self, x: Tensor, rank: int, magnitude: bool = False) -> Tensor:
        """The ``rank``-th smallest ``x`` or ``|x|``."""
        return kth_smallest(x, rank, magnitude, self.stats_reduce_dim, self.keepdim)

    def _length(self, x: Tensor) -> int:
        return x.numel() if self.stats_reduce_dim is None else x.shape[self.stats_reduce_dim]


#: Forwards of statistics that are finite only where all elements are.
SEEING_ALL: set[Any] = set()

_Kind = TypeVar("_Kind", bound=type[nn.Module])


def sees_all(statistic: _Kind) -> _Kind:
    """Mark a statistic whose result is finite only where all elements are; a decorator."""
    SEEING_ALL.add(statistic.forward)
    return statistic


def _check_percentile(name: str, q: float) -> float:
    if not 0 <= q <= 100:
        raise ValueError(f"{name} is a percentage, 0 to 100; got {q!r}")
    return q


def at_most_zero(x: Tensor) -> Tensor:
    """``x`` where it is 0 or below, else 0; NaN stays NaN."""
    return torch.where(x > 0, torch.zeros_like(x), x)


def at_least_zero(x: Tensor) -> Tensor:
    """``x`` where it is 0 or above, else 0; NaN stays NaN."""
    return torch.where(x < 0, torch.zeros_like(x), x)


@sees_all
class AbsMax(Statistic):
    """``max|x|``."""

    def rule(self, stated: Stated) -> StatisticRule:
        """The kind ``'absmax'``."""
        return StatisticRule("absmax", self.stats_reduce_dim, self.keepdim)

    def forward(self, x: Tensor) -> Tensor:
        return abs_max(x, self.stats_reduce_dim, self.keepdim)


@sees_all
class SignedAbsMax(Statistic):
    """``-x*`` at the element ``x*`` of largest magnitude, so that it maps to the most negative integer."""

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        if self.stats_reduce_dim is None:
            flat = x.reshape(-1)
            return -flat[flat.abs().argmax()]
        where = x.abs().argmax(dim=self.stats_reduce_dim, keepdim=True)
        out = -x.gather(self.stats_reduce_dim, where)
        return out if self.keepdim else out.squeeze(self.stats_reduce_dim)


@sees_all
class AbsMinMax(Statistic):
    """Width of the range, 0 included: ``max(max(x), 0) - min(min(x), 0)``."""

    def __init__(
        self,
        stats_reduce_dim: int | None = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)

    def rule(self, stated: Stated) -> StatisticRule:
        """The kind ``'minmax'``."""
        return StatisticRule("minmax", self.stats_reduce_dim, self.keepdim)

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        return at_least_zero(self._max(x)) - at_most_zero(self._min(x))


class NegativeMinOrZero(AbsMinMax):
    """``min(min(x), 0)``."""

    def rule(self, stated: Stated) -> StatisticRule:
        """The kind ``'negative_min'``."""
        return StatisticRule("negative_min", self.stats_reduce_dim, self.keepdim)

    def forward(self, x: Tensor) -> Tensor:
        return at_most_zero(self._min(upcast(x)))


@sees_all
class AbsAve(Statistic):
    """``mean|x|``."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mean(upcast(x).abs())


@sees_all
class AbsMaxAve(Statistic):
    """Mean over rows of ``max|x|`` of each row."""

    def forward(self, x: Tensor) -> Tensor:
        return self._max(upcast(x).abs()).mean()


@sees_all
class AbsMaxL2(Statistic):
    """Quadratic mean over the ``C`` rows of ``max|x|`` of each: ``||max|x|||_2 / sqrt(C)``."""

    def forward(self, x: Tensor) -> Tensor:
        top = self._max(upcast(x).abs())
        norm: Tensor = torch.linalg.vector_norm(top)
        return norm / math.sqrt(top.numel())


class AbsPercentile(Statistic):
    """The ``k``-th smallest ``|x|``, ``k = floor(0.01 q n + 0.5)``.

    Args:
        high_percentile_q: ``q`` in percent, above 0 and at most 100.
        stats_reduce_dim, keepdim: as in :class:`Statistic`.
    """

    def __init__(
        self, high_percentile_q: float, stats_reduce_dim: int | None = None, keepdim: bool = False
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)
        self.q = _check_percentile("high_percentile_q", high_percentile_q)

    def rule(self, stated: Stated) -> StatisticRule:
        """The kind ``'percentile'``."""
        return StatisticRule("percentile", self.stats_reduce_dim, self.keepdim, high=self.q)

    def forward(self, x: Tensor) -> Tensor:
        return self._kth(x, high_rank(self.q, self._length(x)), magnitude=True)


class NegativePercentileOrZero(Statistic):
    """``min(k-th smallest x, 0)``, ``k = ceil(0.01 q n)``.

    Args:
        low_percentile_q: ``q`` in percent, 0 to 100.
        stats_reduce_dim, keepdim: as in :class:`Statistic`.
    """

    def __init__(
        self, low_percentile_q: float, stats_reduce_dim: int | None = None, keepdim: bool = False
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)
        self.q = _check_percentile("low_percentile_q", low_percentile_q)

    def rule(self, stated: Stated) -> StatisticRule:
        """The kind ``'negative_percentile'``."""
        return StatisticRule("negative_percentile", self.stats_reduce_dim, self.keepdim, self.q)

    def forward(self, x: Tensor) -> Tensor:
        return at_most_zero(self._kth(x, low_rank(self.q, self._length(x))))


class PercentileInterval(Statistic):
    """Width of the range between two percentiles, 0 included: ``max(hi, 0) - min(lo, 0)``.

    Args:
        low_percentile_q, high_percentile_q: in percent, low below high.
        stats_reduce_dim, keepdim: as in :class:`Statistic`.
    """

    def __init__(
        self,
        low_percentile_q: float,
        high_percentile_q: float,
        stats_reduce_dim: int | None = None,
        keepdim: bool = False,
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)
        self.low_q = _check_percentile("low_percentile_q", low_percentile_q)
        self.high_q = _check_percentile("high_percentile_q", high_percentile_q)
        if not self.low_q < self.high_q:
            raise ValueError(
                f"low_percentile_q={low_percentile_q} must be below {high_percentile_q=}"
            )

    def rule(self, stated: Stated) -> StatisticRule:
        """The kind ``'percentile_interval'``."""
        ends = (self.low_q, self.high_q)
        return StatisticRule("percentile_interval", self.stats_reduce_dim, self.keepdim, *ends)

    def forward(self, x: Tensor) -> Tensor:
        n = self._length(x)
        low, high = self._kth(x, low_rank(self.low_q, n)), self._kth(x, high_rank(self.high_q, n))
        return at_least_zero(high) - at_most_zero(low)


@sees_all
class L1Norm(Statistic):
    """``sum|x|`` of each row, the reduced axis kept."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            upcast(x)
            .abs()
            .sum(dim=self.stats_reduce_dim, keepdim=self.stats_reduce_dim is not None)
        )


@sees_all
class L2Norm(Statistic):
    """``sqrt(sum x^2)`` of each row, the reduced axis kept."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.stats_reduce_dim is not None
        norm: Tensor = torch.linalg.vector_norm(upcast(x), dim=self.stats_reduce_dim, keepdim=keep)
        return norm


@sees_all
class MeanSigmaStd(Statistic):
    """``mean|x| + sigma * sqrt(var|x| + epsilon)``, with the unbiased variance.

    Args:
        sigma: how many standard deviations.
        stats_reduce_dim, keepdim: as in :class:`Statistic`.
        std_dev_epsilon: added to the variance.
    """

    def __init__(
        self,
        sigma: float,
        stats_reduce_dim: int | None = None,
        std_dev_epsilon: float = 1e-8,
        keepdim: bool = False,
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)
        self.sigma, self.std_dev_epsilon = sigma, std_dev_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _mean_sigma(self, upcast(x).abs(), self.sigma, self.std_dev_epsilon)


def _mean_sigma(
    stat: Statistic, magnitude: Tensor, sigma: float | Tensor, epsilon: float
) -> Tensor:
    if stat.stats_reduce_dim is None:
        variance = magnitude.var()
    else:
        variance = magnitude.var(dim=stat.stats_reduce_dim, keepdim=stat.keepdim)
    return stat._mean(magnitude) + sigma * torch.sqrt(variance + epsilon)


@sees_all
class MeanLearnedSigmaStd(nn.Module):
    """:class:`MeanSigmaStd` with a learned ``sigma``, one per scale; state-dict key ``value``.

    Args:
        sigma: initial number of standard deviations.
        stats_output_shape: shape of the statistic before it takes the shape of the scale, ``()`` or ``(C,)``.
        stats_reduce_dim: axis to reduce, None for all.
        std_dev_epsilon: added to the variance.
        dtype, device: of the parameter.
    """

    def __init__(
        self,
        sigma: float,
        stats_output_shape: tuple[int, ...] = (),
        stats_reduce_dim: int | None = None,
        std_dev_epsilon: float = 1e-8,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        start = torch.full(
            stats_output_shape, float(sigma), dtype=compute_dtype(dtype), device=device
        )
        self.shape = tuple(stats_output_shape)
        self.value = parameter_of(start)
        self.std_dev_epsilon = std_dev_epsilon
        self._axes = (stats_reduce_dim, False)

    def forward(self, x: Tensor) -> Tensor:
        return _mean_sigma(
            Statistic(*self._axes),
            upcast(x).abs(),
            number_of(self.value, self.shape),
            self.std_dev_epsilon,
        )
