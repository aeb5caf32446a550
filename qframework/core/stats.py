"""Statistics of a tensor that a scale or a zero point is made of.

Every class takes a tensor that a view has already shaped, and reduces it wholly (``stats_reduce_dim=None``, result
0-dim) or along one axis. Percentiles are order statistics (``kthvalue``), exact on any size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qframework.core.base import Stateless, wide_dtype, widen
from qframework.functional import (
    abs_max,
    can_order,
    high_rank,
    is_fused,
    low_rank,
    order_statistic,
    percentile_if,
)

#: Up to how many of the largest or smallest elements a selection beats a partial sort.
_FEW = 64
#: Up to how many elements a partial sort of all of them costs next to nothing.
_SMALL = 1024


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
        return x.max(dim=self.stats_reduce_dim, keepdim=self.keepdim).values

    def _min(self, x: Tensor) -> Tensor:
        if self.stats_reduce_dim is None:
            return x.min()
        return x.min(dim=self.stats_reduce_dim, keepdim=self.keepdim).values

    def _mean(self, x: Tensor) -> Tensor:
        if self.stats_reduce_dim is None:
            return x.mean()
        return x.mean(dim=self.stats_reduce_dim, keepdim=self.keepdim)

    def _kth(self, x: Tensor, rank: int, magnitude: bool = False) -> Tensor:
        """The ``rank``-th smallest ``x`` or ``|x|``; the extremes and what lies near them without sorting the rest."""
        if self.stats_reduce_dim is None and x.numel() <= _SMALL:
            # Nothing to gain; and of elements that tie, the one that torch takes gets the gradient.
            few = widen(x).abs() if magnitude else widen(x)
            return few.reshape(-1).kthvalue(rank).values
        if self.stats_reduce_dim is None:
            n = x.numel()
            largest = n - rank + 1 <= rank
            near = n - rank + 1 if largest else rank
            if near <= _FEW and can_order(x, near) and is_fused():
                return widen(order_statistic(x, near, largest, magnitude))
        x = widen(x).abs() if magnitude else widen(x)
        if self.stats_reduce_dim is None:
            x, dim, keepdim = x.reshape(-1), 0, False
        else:
            dim, keepdim = self.stats_reduce_dim, self.keepdim
        from_top = x.shape[dim] - rank + 1
        if from_top == 1:
            return x.max(dim, keepdim).values
        if rank == 1:
            return x.min(dim, keepdim).values
        if from_top <= _FEW or rank <= _FEW:
            few = x.topk(min(from_top, rank), dim, largest=from_top <= rank, sorted=False).values
            return (
                few.min(dim, keepdim).values if from_top <= rank else few.max(dim, keepdim).values
            )
        return x.kthvalue(rank, dim, keepdim).values

    def only_if(self, x: Tensor, wanted: Tensor) -> Tensor | None:
        """The statistic where ``wanted``, else any number; None where it has no such form.

        Args:
            x: all elements, in any shape.
            wanted: 0-dim bool tensor on the CPU.
        """
        return None

    def _length(self, x: Tensor) -> int:
        return x.numel() if self.stats_reduce_dim is None else x.shape[self.stats_reduce_dim]


def _check_percentile(name: str, q: float) -> float:
    if not 0 <= q <= 100:
        raise ValueError(f"{name} is a percentage, 0 to 100; got {q!r}")
    return q


def _at_most_zero(x: Tensor) -> Tensor:
    return torch.where(x <= 0, x, torch.zeros_like(x))


def _at_least_zero(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, torch.zeros_like(x))


class AbsMax(Statistic):
    """``max|x|``."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stats_reduce_dim is None and is_fused() and not torch.compiler.is_compiling():
            return widen(abs_max(x))
        return self._max(widen(x).abs())


class SignedAbsMax(Statistic):
    """``-x*`` at the element ``x*`` of largest magnitude, so that it maps to the most negative integer."""

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        if self.stats_reduce_dim is None:
            flat = x.reshape(-1)
            return -flat[flat.abs().argmax()]
        where = x.abs().argmax(dim=self.stats_reduce_dim, keepdim=True)
        out = -x.gather(self.stats_reduce_dim, where)
        return out if self.keepdim else out.squeeze(self.stats_reduce_dim)


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

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        return _at_least_zero(self._max(x)) - _at_most_zero(self._min(x))


class NegativeMinOrZero(AbsMinMax):
    """``min(min(x), 0)``."""

    def forward(self, x: Tensor) -> Tensor:
        return _at_most_zero(self._min(widen(x)))


class AbsAve(Statistic):
    """``mean|x|``."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mean(widen(x).abs())


class AbsMaxAve(Statistic):
    """Mean over rows of ``max|x|`` of each row."""

    def forward(self, x: Tensor) -> Tensor:
        return self._max(widen(x).abs()).mean()


class AbsMaxL2(Statistic):
    """Quadratic mean over the ``C`` rows of ``max|x|`` of each: ``||max|x|||_2 / sqrt(C)``."""

    def forward(self, x: Tensor) -> Tensor:
        top = self._max(widen(x).abs())
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

    def forward(self, x: Tensor) -> Tensor:
        return self._kth(x, high_rank(self.q, self._length(x)), magnitude=True)

    def only_if(self, x: Tensor, wanted: Tensor) -> Tensor | None:
        """The statistic where ``wanted``, else any number; None where it has no such form."""
        if self.stats_reduce_dim is not None:
            return None
        return widen(percentile_if(x, wanted, self.q, magnitude=True))


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

    def forward(self, x: Tensor) -> Tensor:
        return _at_most_zero(self._kth(x, low_rank(self.q, self._length(x))))

    def only_if(self, x: Tensor, wanted: Tensor) -> Tensor | None:
        """The statistic where ``wanted``, else any number; None where it has no such form."""
        if self.stats_reduce_dim is not None:
            return None
        return _at_most_zero(widen(percentile_if(x, wanted, self.q, low=True)))


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

    def forward(self, x: Tensor) -> Tensor:
        n = self._length(x)
        low, high = self._kth(x, low_rank(self.low_q, n)), self._kth(x, high_rank(self.high_q, n))
        return _at_least_zero(high) - _at_most_zero(low)

    def only_if(self, x: Tensor, wanted: Tensor) -> Tensor | None:
        """The statistic where ``wanted``, else any number; None where it has no such form."""
        if self.stats_reduce_dim is not None:
            return None
        low = widen(percentile_if(x, wanted, self.low_q, low=True))
        high = widen(percentile_if(x, wanted, self.high_q))
        return _at_least_zero(high) - _at_most_zero(low)


class L1Norm(Statistic):
    """``sum|x|`` of each row, the reduced axis kept."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            widen(x).abs().sum(dim=self.stats_reduce_dim, keepdim=self.stats_reduce_dim is not None)
        )


class L2Norm(Statistic):
    """``sqrt(sum x^2)`` of each row, the reduced axis kept."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.stats_reduce_dim is not None
        norm: Tensor = torch.linalg.vector_norm(widen(x), dim=self.stats_reduce_dim, keepdim=keep)
        return norm


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
        return _mean_sigma(self, widen(x).abs(), self.sigma, self.std_dev_epsilon)


def _mean_sigma(
    stat: Statistic, magnitude: Tensor, sigma: float | Tensor, epsilon: float
) -> Tensor:
    if stat.stats_reduce_dim is None:
        variance = magnitude.var()
    else:
        variance = magnitude.var(dim=stat.stats_reduce_dim, keepdim=stat.keepdim)
    return stat._mean(magnitude) + sigma * torch.sqrt(variance + epsilon)


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
        start = torch.full(stats_output_shape, float(sigma), dtype=wide_dtype(dtype), device=device)
        self.value = nn.Parameter(start)
        self.std_dev_epsilon = std_dev_epsilon
        self._axes = (stats_reduce_dim, False)

    def forward(self, x: Tensor) -> Tensor:
        return _mean_sigma(Statistic(*self._axes), widen(x).abs(), self.value, self.std_dev_epsilon)
