"""The mathematics of GPTQ, GPFQ, Qronos and MagR on a matrix of weights; no model is known here.

Weights are ``(groups, columns, rows)``; ``hessian`` and ``cross`` are ``(groups, columns, columns)``. With the layer's inputs ``X``
as the float model has them and ``Y`` as the quantized one has them, a column of each for every sample:
``hessian`` is the mean of ``Y Y^T`` (times any factor), ``cross`` that of ``Y X^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.graph.error_diffusion import (
    by_input_energy,
    in_first_order,
    largest_eigenvalue,
    quantize_in_sequence,
    reordered,
    reordered_square,
)
from qframework.graph.weight_grid import WeightGrid


class NotSolvable(Exception):
    """The statistics don't allow to go on; the message says why."""


def gptq(
    weights: Tensor, hessian: Tensor, grid: WeightGrid, act_order: bool, damping: float = 0.01
) -> Tensor:
    """GPTQ (Frantar 2022, https://arxiv.org/abs/2210.17323).

    Columns are rounded in order, each one's error spread over the rest: the paper does so by the Cholesky factor ``u`` of the inverse
    Hessian, ``w_j -= (w_i - q_i) / u_ii u_ij``. That moves column ``i`` by ``sum_{s<i} (w_s - q_s) v_si / v_ii`` in all, with the upper
    triangular ``v`` of ``v v^T = H``, for which nothing is inverted.

    Args:
        weights: are overwritten.
        hessian: is overwritten.
        grid: of the weights.
        act_order: columns with the largest inputs first.
        damping: of the mean diagonal, added to the diagonal.

    Raises:
        NotSolvable: the Hessian has no Cholesky factor.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal[dead] = 1
    weights.masked_fill_(dead.unsqueeze(-1), 0)
    order = by_input_energy(hessian) if act_order else None
    if order is not None:
        weights, grid = reordered(weights, order), grid.ordered(order)
        hessian = reordered_square(hessian, order).contiguous()
        diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal.add_(damping * diagonal.mean(dim=1, keepdim=True))
    turned = [hessian.flip(1, 2)]
    del hessian, diagonal  # they may be the largest tensors that there are
    upper = upper_factor(turned)
    ends = upper.diagonal(dim1=1, dim2=2)
    target = weights * ends.unsqueeze(-1)
    result = quantize_in_sequence(target, upper.transpose(1, 2), 1 / ends, grid, weights)
    return result if order is None else in_first_order(result, order)


def upper_factor(turned: list[Tensor]) -> Tensor:
    """Upper triangular ``v`` with ``v v^T = hessian``.

    Args:
        turned: the matrix, ``(groups, columns, columns)``, both axes in reverse order; taken out of the list, so that its memory is
            free again.

    Raises:
        NotSolvable: it isn't positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(turned.pop())
    ends = lower.diagonal(dim1=1, dim2=2)
    if bool(failed.any()) or not bool(torch.isfinite(ends).all()):
        raise NotSolvable(
            "the Hessian is not positive definite; give more samples, or dtype=torch.float64"
        )
    upper: Tensor = lower.flip(1, 2)
    return upper


def gpfq(
    weights: Tensor,
    hessian: Tensor,
    cross: Tensor,
    grid: WeightGrid,
    act_order: bool,
    original: Tensor | None = None,
) -> Tensor:
    """GPFQ (Zhang, Zhou, Saab 2023, https://arxiv.org/abs/2201.11113), in the form with squared norms alone.

    Column ``t`` is rounded from ``(sum_{s<=t} G_ts w_s - sum_{s<t} H_ts q_s) / H_tt``, what undoes the error that the float
    path and the quantized path have up to there. Inputs that are always 0 get 0.

    Args:
        weights: those that are quantized.
        hessian: ``H``.
        cross: ``G``.
        grid: of the weights.
        act_order: columns with the largest inputs first.
        original: float weights that the error is measured against; None for ``weights``.
    """
    original = weights if original is None else original
    order = by_input_energy(hessian) if act_order else None
    if order is not None:
        original, grid = reordered(original, order), grid.ordered(order)
        hessian, cross = reordered_square(hessian, order), reordered_square(cross, order)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    share = torch.where(diagonal != 0, 1 / diagonal, 0.0)
    result = quantize_in_sequence(cross.tril() @ original, hessian, share, grid)
    return result if order is None else in_first_order(result, order)


def qronos(
    weights: Tensor,
    hessian: Tensor,
    cross: Tensor,
    grid: WeightGrid,
    act_order: bool,
    alpha: float = 1e-6,
    original: Tensor | None = None,
) -> Tensor:
    """Qronos (2025, https://openreview.net/pdf?id=7axclBCYul): the error of the inputs is corrected, then that of rounding.

    The first column is rounded from its least-squares solution; the others take the solution for the error that is left,
    ``(w (G + d) - q H) (H + d)^-1`` over the remaining columns, and are rounded as GPTQ does.

    Args:
        weights: those that are quantized.
        hessian: ``H``.
        cross: ``G``.
        grid: of the weights.
        act_order: columns with the largest inputs first.
        alpha: of the largest eigenvalue, added to the diagonal as ``d``.
        original: float weights that the error is measured against; None for ``weights``.

    Raises:
        NotSolvable: the Hessian has no Cholesky factor.
    """
    original = weights if original is None else original
    dead = hessian.diagonal(dim1=1, dim2=2) == 0
    weights = weights.masked_fill(dead.unsqueeze(-1), 0)
    order = by_input_energy(hessian) if act_order else None
    if order is not None:
        weights, original = reordered(weights, order), reordered(original, order)
        hessian, cross = reordered_square(hessian, order), reordered_square(cross, order)
        grid = grid.ordered(order)
    first = hessian[:, :1, :1]
    share = torch.where(first != 0, 1 / first, 0.0)
    start = (cross[:, :1] @ original - hessian[:, :1, 1:] @ weights[:, 1:]) * share
    q = grid.of_columns(0, 1).nearest(start)
    if weights.shape[1] == 1:
        return q
    damping = alpha * largest_eigenvalue(hessian, steps=10)[:, None]
    turned = [hessian[:, 1:, 1:].flip(1, 2)]
    turned[0].diagonal(dim1=1, dim2=2).add_(damping)
    upper = upper_factor(turned)
    right = cross[:, 1:] @ original
    right.add_(original[:, 1:] * damping.unsqueeze(-1))
    right.baddbmm_(hessian[:, 1:, :1], q, alpha=-1)
    # v^T w for the solution w; the columns before are taken from it as they are quantized
    sides = (
        upper.transpose(1, 2),
        right.transpose(1, 2),
    )  # the side on which LAPACK copies nothing
    target = torch.linalg.solve_triangular(*sides, upper=False, left=False).transpose(1, 2)
    share = 1 / upper.diagonal(dim1=1, dim2=2)
    rest = grid.of_columns(1, weights.shape[1])
    found = quantize_in_sequence(target.contiguous(), upper.transpose(1, 2), share, rest)
    result = torch.cat([q, found], dim=1)
    return result if order is None else in_first_order(result, order)


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
