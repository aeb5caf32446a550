"""Integer thresholds: the integer that a scale's statistic is mapped to."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.core.base import Stated, Stateless
from qframework.functional import max_int, min_int


class IntScaling(Stateless):
    """The largest magnitude of the range: signed ``-min_int``, unsigned ``max_int``.

    Args:
        narrow_range, signed: the range.
        dtype: ignored; the result has the dtype of the bit width.
    """

    def __init__(self, narrow_range: bool, signed: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.narrow_range, self.signed = narrow_range, signed

    def rule(self, stated: Stated, bits: int) -> float:
        """The threshold for a width in bits."""
        if self.signed:
            return 2.0 ** (bits - 1) - self.narrow_range
        return 2.0**bits - 1 - self.narrow_range

    def forward(self, bit_width: Tensor) -> Tensor:
        """The threshold, of the shape of ``bit_width``."""
        if self.signed:
            return -min_int(True, self.narrow_range, bit_width)
        return max_int(False, self.narrow_range, bit_width)


class PowerOfTwoIntScaling(Stateless):
    """The power of two above the range: signed ``2^(b-1)``, unsigned ``2^b``.

    Args:
        signed: the range.
        dtype: ignored; the result has the dtype of the bit width.
    """

    def __init__(self, signed: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.signed = signed

    def rule(self, stated: Stated, bits: int) -> float:
        """The threshold for a width in bits."""
        return 2.0 ** (bits - self.signed)

    def forward(self, bit_width: Tensor) -> Tensor:
        """The threshold, of the shape of ``bit_width``."""
        return max_int(self.signed, False, bit_width) + 1


class MicroscalingIntScaling(Stateless):
    """The power of two that the largest magnitude's leading bit is mapped to: ``2^(b-2)``, so that nothing saturates.

    Args:
        dtype: ignored; the result has the dtype of the bit width.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()

    def rule(self, stated: Stated, bits: int) -> float:
        """The threshold for a width in bits."""
        return 2.0 ** (bits - 2)

    def forward(self, bit_width: Tensor) -> Tensor:
        """The threshold, of the shape of ``bit_width``."""
        return 2.0 ** (bit_width - 2)
