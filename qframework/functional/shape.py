"""Shapes that bring a tensor into rows, for ``x.reshape(shape)``; and the function that leaves a tensor alone."""

from __future__ import annotations

from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """``x`` itself."""
    return x


def over_tensor(x: Tensor) -> int:
    """All elements in one axis: ``-1``."""
    return -1


def over_output_channels(x: Tensor) -> tuple[int, int]:
    """A row for each channel of a weight, whose channels come first: ``(C, -1)``."""
    return x.shape[0], -1


def over_output_features(x: Tensor) -> tuple[int, int]:
    """A row for each position of the leading axes: ``(-1, F)``."""
    return -1, x.shape[-1]


def over_batch_over_tensor(x: Tensor) -> tuple[int, int]:
    """A row for each sample: ``(N, -1)``."""
    return x.shape[0], -1


def over_batch_over_output_channels(x: Tensor) -> tuple[int, int, int]:
    """A row for each sample and channel: ``(N, C, -1)``."""
    return x.shape[0], x.shape[1], -1
