"""A histogram that grows with what is added to it."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel
from torch import Tensor

_BINS = 512


class Histogram(BaseModel):
    """Counts of values in bins of equal width.

    Attributes:
        low: left edge of the first bin.
        high: right edge of the last bin.
        counts: of each bin.
    """

    low: float
    high: float
    counts: list[int]

    @property
    def edges(self) -> list[float]:
        """The edges of the bins, one more than bins."""
        n = max(1, len(self.counts))
        return [self.low + (self.high - self.low) * i / n for i in range(n + 1)]


class GrowingHistogram:
    """Bins over ``-reach`` to ``reach``; a value beyond doubles the reach, and joins bins by pairs."""

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count finite values, of any shape."""
        values = values.detach().float().flatten()
        largest = float(values.abs().max()) if values.numel() else 0.0
        if largest > self.reach:
            self._grow(largest)
        reach = self.reach or 1.0
        self.counts += torch.histc(values, _BINS, -reach, reach).double().cpu()

    def _grow(self, largest: float) -> None:
        reach = 2.0 ** math.ceil(math.log2(largest))
        while self.reach and self.reach < reach:
            joined = self.counts.view(-1, 2).sum(1)
            quarter = torch.zeros(_BINS // 4, dtype=torch.float64)
            self.counts = torch.cat([quarter, joined, quarter])
            self.reach *= 2
        if not self.reach:
            self.reach = reach  # zeros so far lie in the middle, whatever the reach

    def result(self) -> Histogram:
        """The bins that hold values, and what lies between them."""
        used = self.counts.nonzero().flatten().tolist()
        reach = self.reach or 1.0
        width = 2 * reach / _BINS
        first, last = (used[0], used[-1]) if used else (0, _BINS - 1)
        counts = [int(c) for c in self.counts[first : last + 1].tolist()]
        # few values don't fill many bins
        joined = max(1, len(counts) // max(20, int(4 * math.sqrt(sum(counts)))))
        counts += [0] * (-len(counts) % joined)
        high = -reach + width * (first + len(counts))
        counts = [sum(counts[i : i + joined]) for i in range(0, len(counts), joined)]
        return Histogram(low=-reach + width * first, high=high, counts=counts)
