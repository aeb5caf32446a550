"""Scales and zero points of weights that stay what they were when the weights were saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qframework.core.base import CoreModule


class Kept(CoreModule):
    """A number that was computed from float weights which are no longer there; state-dict key ``kept``.

    Taken anew from quantized weights, a scale would differ in its last bit.

    Args:
        number: of the shape that it is used in.
    """

    depends_on_input = False
    kept: Tensor

    def __init__(self, number: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", number.detach().clone())

    def forward(self, x: Tensor, *how: object) -> Tensor:
        """The number; nothing is looked at."""
        return self.kept


class KeptScale(Kept):
    """A scale that stays as it is."""

    @property
    def scaling_shape(self) -> tuple[int, ...]:
        """The shape of the scale."""
        return tuple(self.kept.shape)

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A number that is none of a scale; those of a search may be negative."""
        allowed = bool((torch.isfinite(number) & (number != 0)).all())
        return None if allowed else "finite numbers other than 0"


class KeptZeroPoint(Kept):
    """A zero point that stays as it is."""

    symmetric = False
