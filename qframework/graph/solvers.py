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
    diffuse_errors,
    in_first_order,
    largest_eigenvalue,
    reordered,
    reordered_square,
)
from qframework.graph.weight_grid import WeightGrid

#: What an inverse is multiplied by before its Cholesky factor is taken, and the root divided by after.
_LIFT = 1e4


class NotSolvable(Exception):
    """The statistics don't allow to go on; the message says why."""


def gptq(
    weights: Tensor, hessian: Tensor, grid: WeightGrid, act_order: bool, damping: float = 0.01
) -> Tensor:
    """GPTQ (Frantar 2022, https://arxiv.org/abs/2210.17323).

    Columns are rounded in order; each one's error is spread over the rest by the Cholesky factor of the inverse Hessian.

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
    factor = upper_factor_of_inverse(hessian)
    result = diffuse_errors(weights, factor, grid)
    return result if order is None else in_first_order(result, order)


def upper_factor_of_inverse(hessian: Tensor) -> Tensor:
    """Upper triangular ``u`` with ``u^T u = hessian^-1``.

    Raises:
        NotSolvable: there is none.
    """
    return _upper_factor(inverse_of(hessian))


def inverse_of(hessian: Tensor) -> Tensor:
    """The inverse of symmetric positive definite matrices.

    Raises:
        NotSolvable: they aren't.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed.any()) or not bool(torch.isfinite(lower).all()):
        raise NotSolvable(
            "the Hessian is not positive definite; give more samples, or dtype=torch.float64"
        )
    return torch.cholesky_inverse(lower)


def _upper_factor(inverse: Tensor) -> Tensor:
    upper, failed = torch.linalg.cholesky_ex(inverse * _LIFT, upper=True)
    if bool(failed.any()) or not bool(torch.isfinite(upper).all()):
        raise NotSolvable(
            "the inverse Hessian is not positive definite; give more samples, or dtype=torch.float64"
        )
    return upper.div_(_LIFT**0.5)  # type: ignore[no-any-return]


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
    weight_of = torch.where(diagonal != 0, 1 / diagonal, 0.0).unsqueeze(-1)
    target = (cross.tril() * weight_of) @ original
    past = hessian.tril(-1) * weight_of
    result = _substitute(target, past, grid)
    return result if order is None else in_first_order(result, order)


def _substitute(target: Tensor, past: Tensor, grid: WeightGrid, block: int = 64) -> Tensor:
    """``q_t = nearest(target_t - sum_{s<t} past_ts q_s)``, in blocks."""
    result = torch.empty_like(target)
    columns = target.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if start:
            target[:, start:stop].baddbmm_(past[:, start:stop, :start], result[:, :start], alpha=-1)
        for i in range(start, stop):
            q = grid.of_columns(i, i + 1).nearest(target[:, i : i + 1])
            result[:, i : i + 1] = q
            if i + 1 < stop:
                target[:, i + 1 : stop].baddbmm_(past[:, i + 1 : stop, i : i + 1], q, alpha=-1)
    return result


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
        weights: those that are quantized; overwritten.
        hessian: ``H``.
        cross: ``G``.
        grid: of the weights.
        act_order: columns with the largest inputs first.
        alpha: of the largest eigenvalue, added to the diagonal as ``d``.
        original: float weights that the error is measured against; None for ``weights``.

    Raises:
        NotSolvable: the Hessian has no Cholesky factor.
    """
    original = weights.clone() if original is None else original
    dead = hessian.diagonal(dim1=1, dim2=2) == 0
    weights = weights.masked_fill_(dead.unsqueeze(-1), 0)
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
    damping = alpha * largest_eigenvalue(hessian)[:, None]
    damped = hessian[:, 1:, 1:].clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping)
    inverse = inverse_of(damped)
    right = cross[:, 1:] @ original
    right.add_(original[:, 1:] * damping.unsqueeze(-1))
    right.baddbmm_(hessian[:, 1:, :1], q, alpha=-1)
    rest = inverse @ right
    factor = _upper_factor(inverse)
    result = diffuse_errors(rest, factor, grid.of_columns(1, weights.shape[1]))
    result = torch.cat([q, result], dim=1)
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
