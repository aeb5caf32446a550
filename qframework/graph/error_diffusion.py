"""Rounding the columns of a matrix one after the other, each column's error spread over those that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.graph.weight_grid import WeightGrid

#: Columns whose errors reach the columns behind them by one product, and those within that are updated one by one.
_BLOCK, _INNER = 256, 32


def diffuse_errors(weights: Tensor, factor: Tensor, grid: WeightGrid) -> Tensor:
    """Quantize columns in order: ``q = nearest(w_i)``, ``w_j -= (w_i - q) / u_ii * u_ij`` for the columns ``j`` behind.

    Args:
        weights: ``(groups, columns, rows)``; overwritten.
        factor: upper triangular ``u``, ``(groups, columns, columns)``.
        grid: of the matrix.

    Returns:
        Quantized values, of the shape of ``weights``.
    """
    columns = weights.shape[1]
    result = torch.empty_like(weights)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    factor = factor / diagonal.unsqueeze(
        -1
    )  # rows of u over their diagonal: errors needn't be divided
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(weights[:, start:stop])
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
            block = weights[:, first:last]
            spread = factor[:, first:last, first:last]
            for i in range(last - first):
                place = first + i
                w = block[:, i : i + 1]
                q = grid.of_columns(place, place + 1).nearest(w)
                result[:, place : place + 1] = q
                error = errors[:, place - start : place - start + 1]
                torch.sub(w, q, out=error)
                if i + 1 < last - first:
                    block[:, i + 1 :].baddbmm_(
                        spread[:, i : i + 1, i + 1 :].transpose(1, 2), error, alpha=-1
                    )
            if last < stop:
                weights[:, last:stop].baddbmm_(
                    factor[:, first:last, last:stop].transpose(1, 2),
                    errors[:, first - start : last - start],
                    alpha=-1,
                )
        if stop < columns:
            weights[:, stop:].baddbmm_(
                factor[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1
            )
    return result


def by_input_energy(hessian: Tensor) -> Tensor:
    """The order of columns by falling diagonal, ``(groups, columns)``; equal ones stay in order."""
    return hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """A matrix ``(groups, columns, rows)`` whose columns are in another order."""
    return matrix.gather(1, order.unsqueeze(-1).expand(-1, -1, matrix.shape[2]))


def reordered_square(matrix: Tensor, order: Tensor) -> Tensor:
    """A matrix ``(groups, columns, columns)`` with both axes in another order."""
    return reordered(reordered(matrix, order).transpose(1, 2), order).transpose(1, 2)


def in_first_order(matrix: Tensor, order: Tensor) -> Tensor:
    """The inverse of :func:`reordered`."""
    return reordered(matrix, order.argsort(dim=1))


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
    largest = matrix.amax(dim=(1, 2)).abs().clamp_min(tiny)
    scaled = matrix / largest[:, None, None]
    v = start.to(matrix.device).expand(matrix.shape[0], -1).unsqueeze(-1)
    for _ in range(steps):
        v = scaled @ v
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (v * (scaled @ v)).sum(dim=(1, 2)) * largest
