"""Groups of neighbours along one axis.

A grouped shape has the axis split in two: (8, 70) in groups of 32 along axis 1 becomes (8, 3, 32), the last group
padded with zeros. Scales and zero points have it with length 1 there: (8, 3, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def grouped_shape(shape: Sequence[int], group_size: int, group_dim: int) -> tuple[int, ...]:
    """The grouped shape of a shape, the last group whole."""
    dim = group_dim % len(shape)
    return (*shape[:dim], -(-shape[dim] // group_size), group_size, *shape[dim + 1 :])


def split_groups(x: Tensor, group_size: int, group_dim: int) -> Tensor:
    """``x`` in its grouped shape; zeros fill up the last group."""
    dim = group_dim % x.dim()
    lacking = -x.shape[dim] % group_size
    if lacking:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, lacking])
    return x.unflatten(dim, (-1, group_size))  # type: ignore[no-any-return]


def join_groups(x: Tensor, group_dim: int, shape: Sequence[int] | None = None) -> Tensor:
    """A grouped tensor in its ungrouped shape.

    Args:
        x: grouped, or a scale of grouped shape, which is spread over its groups when ``shape`` is given.
        group_dim: the axis of the groups, counted in the ungrouped shape.
        shape: ungrouped; None for no padding to cut.
    """
    dim = group_dim % (x.dim() - 1)
    joined = x.flatten(dim, dim + 1)
    if shape is None or joined.shape[dim] == shape[dim]:
        return joined
    return joined.narrow(dim, 0, shape[dim]).contiguous()  # as of a tensor without padding
