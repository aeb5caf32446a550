"""Statistics of tensors: the largest magnitude, elements by their rank, whether all are finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qframework.functional.precision import upcast
from qframework.functional.registry import defined


@defined
def abs_max(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """``max |x|`` in float32 at least; elements of that magnitude share the gradient evenly, along an axis the first gets it.

    Args:
        x: floating-point tensor of any shape, with one element or more.
        dim: axis that is reduced; None for all, which gives a 0-dim tensor.
        keepdim: keep that axis with length 1.
    """
    magnitudes = upcast(x).abs()
    return magnitudes.max() if dim is None else magnitudes.max(dim, keepdim).values


@defined
def kth_smallest(
    x: Tensor, rank: int, magnitude: bool = False, dim: int | None = None, keepdim: bool = False
) -> Tensor:
    """The ``rank``-th smallest element, exactly, in float32 at least; the gradient goes to one such element.

    NaN where one of the elements is, as for a maximum.

    Args:
        x: floating-point tensor of any shape.
        rank: 1 for the smallest.
        magnitude: of ``|x|`` rather than of ``x``.
        dim: axis whose elements are ranked; None for all, which gives a 0-dim tensor.
        keepdim: keep that axis with length 1.
    """
    x = upcast(x).abs() if magnitude else upcast(x)
    if dim is None:
        x, dim, keepdim = x.reshape(-1), 0, False
    found = x.kthvalue(rank, dim, keepdim).values
    return torch.where(x.isnan().any(dim, keepdim), torch.nan, found)


@defined
def extreme(x: Tensor, largest: bool, dim: int, keepdim: bool = False) -> Tensor:
    """The largest or the smallest element along an axis; NaN where one is. The gradient goes to one such element.

    Args:
        x: floating-point tensor.
        largest: rather than the smallest.
        dim: the axis.
        keepdim: keep that axis with length 1.
    """
    return (x.max(dim, keepdim) if largest else x.min(dim, keepdim)).values


def all_finite(x: Tensor) -> Tensor:
    """Whether no element is NaN or infinite, a 0-dim bool tensor; True for no elements.

    The largest magnitude tells: so values are read once.

    Args:
        x: floating-point tensor of any shape.
    """
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.isfinite(abs_max(x.detach()))


def high_rank(q: float, n: int) -> int:
    """The rank among ``n`` numbers, from the smallest, of a high percentile: ``floor(q n / 100 + 1 / 2)``."""
    return min(max(math.floor(0.01 * q * n + 0.5), 1), n)


def low_rank(q: float, n: int) -> int:
    """The rank of a low percentile among ``n`` numbers: ``ceil(q n / 100)``."""
    return min(max(math.ceil(0.01 * q * n), 1), n)
