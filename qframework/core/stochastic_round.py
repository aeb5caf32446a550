"""Stochastic rounding: up with the probability of the fraction, so that the mean is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.core.base import CoreModule
from qframework.functional import floor_ste, round_ste


class StochasticRoundSte(CoreModule):
    """``floor(x + u)``, ``u`` uniform in [0, 1): unbiased, with a straight-through gradient.

    Args:
        deterministic_inference: round to nearest in evaluation.
        seed: of a generator of its own; None uses torch's.
        device: ignored; the generator is on the device of the numbers.
    """

    def __init__(
        self,
        deterministic_inference: bool = True,
        seed: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.deterministic_inference, self.seed = deterministic_inference, seed
        self._generator: torch.Generator | None = None

    def _source(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(self.seed)
        return self._generator

    def forward(self, x: Tensor) -> Tensor:
        if self.deterministic_inference and not self.training:
            return round_ste(x)
        uniform = torch.rand(
            x.shape, dtype=x.dtype, device=x.device, generator=self._source(x.device)
        )
        return floor_ste(x + uniform)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generator": None}
