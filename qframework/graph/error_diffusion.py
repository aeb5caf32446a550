"""Rounding the columns of a matrix one after the other, each column's error spread over those that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.graph.weight_grid import WeightGrid

#: Columns that the ones before reach by one product, and those within that are gone through one by one.
_BLOCK, _INNER = 256, 16


def quantize_in_sequence(
    target: Tensor,
    past: Tensor,
    share: Tensor,
    grid: WeightGrid,
    original: Tensor | None = None,
) -> Tensor:
    """Quantize columns in order: ``q_t = nearest(share_t (target_t - sum_{s<t} past_ts (q_s - original_s)))``.

    Args:
        target: ``(groups, columns, rows)``; the result takes its place.
        past: ``(groups, columns, columns)``, of which what is below the diagonal counts.
        share: ``(groups, columns)``.
        grid: of the matrix.
        original: what errors are measured from, which take its place; None for 0.

    Returns:
        Quantized values, in ``target``.
    """
    columns = target.shape[1]
    errors = target if original is None else original
    share = share.unsqueeze(-1)

    def take_up(start: int, stop: int, first: int) -> None:
        if start < first:
            rows = past[:, first:stop, start:first]
            target[:, first:stop].baddbmm_(rows, errors[:, start:first], alpha=-1)

    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        take_up(0, stop, start)
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
            take_up(start, last, first)
            for i in range(first, last):
                take_up(first, i + 1, i)
                q = grid.of_columns(i, i + 1).nearest(target[:, i : i + 1] * share[:, i : i + 1])
                target[:, i : i + 1] = q
                if original is not None:
                    torch.sub(q, original[:, i : i + 1], out=errors[:, i : i + 1])
    return target


def by_input_energy(diagonal: Tensor) -> Tensor:
    """The order of columns by the falling diagonal ``(groups, columns)`` of their Hessian; equal ones stay in order."""
    return diagonal.argsort(dim=1, descending=True, stable=True)


def largest_eigenvalue(matrix: Tensor, steps: int = 30) -> Tensor:
    """An estimate of the largest eigenvalue of each symmetric matrix, by power iteration.

    Args:
        matrix: ``(groups, n, n)``, positive semidefinite.
        steps: of the iteration.

    Returns:
        ``(groups,)``.
    """
    generator = torch.Generator().manual_seed(42)
    start = torch.rand(matrix.shape[1], generator=generator, dtype=matrix.dtype)
    tiny = torch.finfo(matrix.dtype).tiny
    # the largest element of such a matrix is on its diagonal
    largest = matrix.diagonal(dim1=1, dim2=2).amax(dim=1).clamp_min(tiny)[:, None, None]
    v = start.to(matrix.device).expand(matrix.shape[0], -1).unsqueeze(-1)
    for _ in range(steps):
        v = matrix @ (v / largest)
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (v * (matrix @ (v / largest))).sum(dim=(1, 2)) * largest[:, 0, 0]
