"""Linear algebra on matrices so large that there should be no second one: factored, reordered and multiplied where they are.

Working storage is that of a strip or a block, whatever the size of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Columns of a block that LAPACK is given, and numbers in a strip.
_BLOCK, _STRIP = 256, 2**14


class NotSolvable(Exception):
    """The statistics don't allow to go on; the message says why."""


def strips(size: int, other: int, least: int = 1) -> Iterator[slice]:
    """Parts of an axis, each with at most a fixed number of elements.

    Args:
        size: of the axis.
        other: elements for each place of it.
        least: so many places are in each part all the same, for products, which thin parts make slow.
    """
    step = max(_STRIP // max(other, 1), least)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def reorder_(matrix: Tensor, order: Tensor) -> Tensor:
    """Bring axis 1 of ``(groups, columns, rows)`` into another order, ``(groups, columns)``."""
    groups, columns, rows = matrix.shape
    for part in strips(rows, groups * columns, 16):
        strip = matrix[:, :, part]
        strip.copy_(strip.gather(1, order.unsqueeze(-1).expand(-1, -1, strip.shape[2])))
    return matrix


@contextmanager
def in_order(order: Tensor | None, *squares: Tensor) -> Iterator[None]:
    """Let square matrices have both axes in another order for a while; None for the order that they have."""
    if order is None:
        yield
        return
    back = order.argsort(dim=1)
    for square in squares:
        reorder_(reorder_(square, order).transpose(1, 2), order)
    try:
        yield
    finally:
        for square in squares:
            reorder_(reorder_(square, back).transpose(1, 2), back)


def mirror_(matrix: Tensor, from_upper: bool) -> Tensor:
    """Make square matrices symmetric by what one of their triangles holds."""
    size = matrix.shape[1]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        block = matrix[:, start:stop, start:stop]
        half = block.triu() if from_upper else block.tril()
        other = half.triu(1) if from_upper else half.tril(-1)
        block.copy_(half + other.transpose(1, 2))
        for far in range(stop, size, _BLOCK):
            right = matrix[:, start:stop, far : far + _BLOCK]
            below = matrix[:, far : far + _BLOCK, start:stop].transpose(1, 2)
            below.copy_(right) if from_upper else right.copy_(below)
    return matrix


@contextmanager
def upper_factor(matrix: Tensor, added: Tensor) -> Iterator[Tensor]:
    """Upper triangular ``v`` with ``v v^T = matrix + diag(added)``, in the upper triangle of the matrix, until the context ends.

    The lower triangle keeps the matrix, which is as it was afterwards, also where there is no factor.

    Args:
        matrix: ``(groups, columns, columns)``, symmetric.
        added: to the diagonal; ``(groups, columns)`` or what broadcasts to it.

    Yields:
        The matrix, whose lower triangle isn't that of ``v``.

    Raises:
        NotSolvable: it isn't positive definite.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    try:
        diagonal.add_(added)
        _factor_(matrix)
        yield matrix
    finally:
        mirror_(matrix, from_upper=False)
        diagonal.copy_(before)


def _factor_(matrix: Tensor) -> None:
    """From the last block of columns to the first: what those behind leave of it, its own factor, what is above."""
    size = matrix.shape[1]
    for start in reversed(range(0, size, _BLOCK)):
        stop = min(start + _BLOCK, size)
        block, above = matrix[:, start:stop, start:stop], matrix[:, :start, start:stop]
        left = block.clone()
        if stop < size:
            behind = matrix[:, start:stop, stop:].transpose(1, 2)
            left.baddbmm_(behind.transpose(1, 2), behind, alpha=-1)
            above.baddbmm_(matrix[:, :start, stop:], behind, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(left.flip(1, 2))
        ends = lower.diagonal(dim1=1, dim2=2)
        if bool(failed.any()) or not bool(torch.isfinite(ends).all()):
            if not bool(torch.isfinite(left).all()):
                raise NotSolvable("the inputs that it was given hold NaN or infinity")
            raise NotSolvable(
                "the Hessian is not positive definite; give more samples, or dtype=torch.float64"
            )
        factor = lower.flip(1, 2)
        block.copy_(factor + block.tril(-1))
        for part in strips(start, matrix.shape[0] * _BLOCK, 512):
            strip = above[:, part]
            turned = factor.transpose(1, 2)
            strip.copy_(torch.linalg.solve_triangular(turned, strip, upper=False, left=False))


def solve_upper_(upper: Tensor, right: Tensor) -> Tensor:
    """Overwrite ``right`` with ``x``, ``v x = right``.

    Args:
        upper: ``v``, ``(groups, columns, columns)``; only its upper triangle counts.
        right: ``(groups, columns, rows)``.
    """
    size = upper.shape[1]
    for start in reversed(range(0, size, _BLOCK)):
        stop = min(start + _BLOCK, size)
        own = right[:, start:stop]
        if stop < size:
            own.baddbmm_(upper[:, start:stop, stop:], right[:, stop:], alpha=-1)
        block = upper[:, start:stop, start:stop].contiguous()
        for part in strips(right.shape[2], upper.shape[0] * _BLOCK, 512):
            strip = own[:, :, part]
            strip.copy_(torch.linalg.solve_triangular(block, strip, upper=True))
    return right


def lower_product(matrix: Tensor, right: Tensor) -> Tensor:
    """``tril(matrix) @ right``.

    Args:
        matrix: ``(groups, columns, columns)``.
        right: ``(groups, columns, rows)``.
    """
    size, found = matrix.shape[1], torch.empty_like(right)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        own = found[:, start:stop]
        torch.bmm(matrix[:, start:stop, start:stop].tril(), right[:, start:stop], out=own)
        if start:
            own.baddbmm_(matrix[:, start:stop, :start], right[:, :start])
    return found
