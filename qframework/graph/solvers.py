"""The mathematics of GPTQ, GPFQ, Qronos and MagR on a matrix of weights; no model is known here.

Weights are ``(groups, columns, rows)``; ``hessian`` and ``cross`` are ``(groups, columns, columns)``. With the layer's inputs ``X``
as the float model has them and ``Y`` as the quantized one has them, a column of each for every sample:
``hessian`` is the mean of ``Y Y^T`` (times any factor), ``cross`` that of ``Y X^T``.

Weights are overwritten: what is given back is where they were or beside them. ``hessian`` and ``cross`` are worked on where they
are and afterwards as they were, so that there is no second matrix of their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.graph.error_diffusion import (
    by_input_energy,
    largest_eigenvalue,
    quantize_in_sequence,
)
from qframework.graph.in_place import (
    NotSolvable,
    in_order,
    lower_product,
    reorder_,
    solve_upper_,
    upper_factor,
)
from qframework.graph.weight_grid import WeightGrid

__all__ = ["NotSolvable", "gpfq", "gptq", "magr", "onto_l1_ball", "qronos"]


def gptq(
    weights: Tensor, hessian: Tensor, grid: WeightGrid, act_order: bool, damping: float = 0.01
) -> Tensor:
    """GPTQ (Frantar 2022, https://arxiv.org/abs/2210.17323).

    Columns are rounded in order, each one's error spread over the rest: the paper does so by the Cholesky factor ``u`` of the inverse
    Hessian, ``w_j -= (w_i - q_i) / u_ii u_ij``. That moves column ``i`` by ``sum_{s<i} (w_s - q_s) v_si / v_ii`` in all, with the upper
    triangular ``v`` of ``v v^T = H``, for which nothing is inverted.

    Args:
        weights: are overwritten.
        hessian: symmetric.
        grid: of the weights.
        act_order: columns with the largest inputs first.
        damping: of the mean diagonal, added to the diagonal.

    Raises:
        NotSolvable: the Hessian has no Cholesky factor.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    weights.masked_fill_(dead.unsqueeze(-1), 0)
    energy = diagonal + dead.to(diagonal.dtype)
    added = dead + damping * energy.mean(dim=1, keepdim=True)
    order = by_input_energy(energy) if act_order else None
    if order is not None:
        reorder_(weights, order)
        grid, added = grid.ordered(order), added.gather(1, order)
    with in_order(order, hessian), upper_factor(hessian, added) as upper:
        ends = upper.diagonal(dim1=1, dim2=2)
        target = weights * ends.unsqueeze(-1)
        result = quantize_in_sequence(target, upper.transpose(1, 2), 1 / ends, grid, weights)
    return result if order is None else reorder_(result, order.argsort(dim=1))


def gpfq(
    weights: Tensor, hessian: Tensor, cross: Tensor, grid: WeightGrid, act_order: bool
) -> Tensor:
    """GPFQ (Zhang, Zhou, Saab 2023, https://arxiv.org/abs/2201.11113), in the form with squared norms alone.

    Column ``t`` is rounded from ``(sum_{s<=t} G_ts w_s - sum_{s<t} H_ts q_s) / H_tt``, what undoes the error that the float
    path and the quantized path have up to there. Inputs that are always 0 get 0.

    Args:
        weights: are overwritten.
        hessian: ``H``.
        cross: ``G``.
        grid: of the weights.
        act_order: columns with the largest inputs first.
    """
    order = by_input_energy(hessian.diagonal(dim1=1, dim2=2)) if act_order else None
    if order is not None:
        reorder_(weights, order)
        grid = grid.ordered(order)
    with in_order(order, hessian, cross):
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        share = torch.where(diagonal != 0, 1 / diagonal, 0.0)
        result = quantize_in_sequence(lower_product(cross, weights), hessian, share, grid)
    return result if order is None else reorder_(result, order.argsort(dim=1))


def qronos(
    weights: Tensor,
    hessian: Tensor,
    cross: Tensor,
    grid: WeightGrid,
    act_order: bool,
    alpha: float = 1e-6,
) -> Tensor:
    """Qronos (2025, https://openreview.net/pdf?id=7axclBCYul): the error of the inputs is corrected, then that of rounding.

    The first column is rounded from its least-squares solution; the others take the solution for the error that is left,
    ``(w (G + d) - q H) (H + d)^-1`` over the remaining columns, and are rounded as GPTQ does.

    Args:
        weights: are overwritten.
        hessian: ``H``, symmetric.
        cross: ``G``.
        grid: of the weights.
        act_order: columns with the largest inputs first.
        alpha: of the largest eigenvalue, added to the diagonal as ``d``.

    Raises:
        NotSolvable: the Hessian has no Cholesky factor.
    """
    order = by_input_energy(hessian.diagonal(dim1=1, dim2=2)) if act_order else None
    if order is not None:
        reorder_(weights, order)
        grid = grid.ordered(order)
    with in_order(order, hessian, cross):
        result = _qronos(weights, hessian, cross, grid, alpha)
    return result if order is None else reorder_(result, order.argsort(dim=1))


def _qronos(
    weights: Tensor, hessian: Tensor, cross: Tensor, grid: WeightGrid, alpha: float
) -> Tensor:
    first = hessian[:, :1, :1]
    share = torch.where(first != 0, 1 / first, 0.0)
    target = torch.bmm(cross, weights)
    start = (target[:, :1] - hessian[:, :1, 1:] @ weights[:, 1:]) * share
    q = grid.of_columns(0, 1).nearest(start)
    target[:, :1] = q
    if weights.shape[1] == 1:
        return target
    damping = alpha * largest_eigenvalue(hessian, steps=10)[:, None]
    right = target[:, 1:]
    right.addcmul_(weights[:, 1:], damping.unsqueeze(-1))
    right.baddbmm_(hessian[:, 1:, :1], q, alpha=-1)
    with upper_factor(hessian[:, 1:, 1:], damping) as upper:
        # v^T w for the solution w; the columns before are taken from it as they are quantized
        solve_upper_(upper, right)
        share = 1 / upper.diagonal(dim1=1, dim2=2)
        rest = grid.of_columns(1, weights.shape[1])
        quantize_in_sequence(right, upper.transpose(1, 2), share, rest)
    return target


def magr(weights: Tensor, hessian: Tensor, alpha: float, steps: int) -> Tensor:
    """MagR (Zhang 2024, https://arxiv.org/abs/2406.00800): smaller largest weights, nearly the same outputs.

    Proximal gradient steps on ``1/2 ||X (w - w0)||^2 + alpha' ||w||_inf``.

    Args:
        weights: ``w0``.
        hessian: mean of ``X X^T``, times any factor.
        alpha: weight of the largest magnitude, relative to ``||hessian||_1``.
        steps: of the descent.
    """
    largest = largest_eigenvalue(hessian)[:, None, None]
    norm = torch.linalg.matrix_norm(hessian, ord=1)[:, None, None]
    tiny = torch.finfo(weights.dtype).tiny
    rate = 1 / largest.clamp_min(tiny)
    radius = alpha / (rate * norm).clamp_min(tiny)
    w = weights
    for _ in range(steps):
        v = w - rate * (hessian @ (w - weights))
        w = v - onto_l1_ball(v, radius)
    return w


def onto_l1_ball(v: Tensor, radius: Tensor) -> Tensor:
    """The nearest points whose magnitudes along axis 1 sum to at most a radius.

    Args:
        v: ``(groups, columns, rows)``.
        radius: ``(groups, 1, 1)``, positive.
    """
    magnitude = v.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    count = torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)[None, :, None]
    kept = (ordered * count > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, kept - 1) / kept
    return v.sign() * (magnitude - threshold.clamp_min(0)).clamp_min(0)
