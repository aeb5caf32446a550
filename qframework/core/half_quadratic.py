"""Scales and zero points by half-quadratic optimization (HQQ, https://mobiusml.github.io/hqq_blog).

Outliers are split off the quantization error by a generalized soft threshold, and the scale or zero point is
solved for in closed form against what is left, again and again with a threshold that falls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qframework.core.search import ScaleTrial, ZeroPointTrial, beside
from qframework.core.stats import Statistic
from qframework.functional import repeat_while, upcast


def shrink(error: Tensor, beta: Tensor | float, norm: float) -> Tensor:
    """Generalized soft threshold ``sign(e) * max(|e| - |e|^(p-1) / beta, 0)``, p the norm, 0 to 1."""
    magnitude = error.abs()
    push = 1.0 / beta if norm == 1 else magnitude.pow(norm - 1) / beta
    return error.sign() * torch.relu(magnitude - push)


class HalfQuadratic(Statistic):
    """Base: descends until the mean absolute error of all values no longer falls, and keeps the best.

    Args:
        stats_reduce_dim: axis of a row, None for all values.
        beta: first weight of the split, above 0.
        kappa: factor on it per step, above 0.
        norm: p of the norm that outliers are measured by, above 0 and at most 1.
        iterations: at most so many steps.
        keepdim: keep the axis with length 1.
    """

    is_search = True

    def __init__(
        self,
        stats_reduce_dim: int | None,
        beta: float,
        kappa: float,
        norm: float,
        iterations: int,
        keepdim: bool = False,
    ) -> None:
        super().__init__(stats_reduce_dim, keepdim)
        if not (beta > 0 and kappa > 0 and 0 < norm <= 1 and iterations >= 1):
            raise ValueError(
                f"beta={beta!r} and kappa={kappa!r} must be > 0, the norm {norm!r} above 0 and at most 1, "
                f"the iterations {iterations!r} at least 1"
            )
        self.beta, self.kappa, self.norm, self.iterations = beta, kappa, norm, iterations

    def _descend(
        self, x: Tensor, start: Tensor, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The best statistic.

        Args:
            x: the viewed values.
            start: first statistic.
            step: from a statistic and beta to its error (0-dim) and the next statistic.
        """

        def advance(
            going: Tensor, now: Tensor, best: Tensor, least: Tensor, beta: Tensor
        ) -> tuple[Tensor, ...]:
            error, following = step(now, beta)
            going = going & (error < least)
            best, least = torch.where(going, now, best), torch.where(going, error, least)
            return going, following, best, least, beta * self.kappa

        state = (
            torch.ones((), dtype=torch.bool, device=x.device),
            start,
            start.clone(),
            torch.full((), torch.inf, dtype=x.dtype, device=x.device),
            torch.full((), self.beta, dtype=torch.float64, device=x.device),
        )
        return repeat_while(lambda going, *_: going, advance, state, self.iterations)[2]


class HalfQuadraticOptimizerScale(HalfQuadratic):
    """The statistic of a scale: ``t * median((x - e) / (q - z))`` over integers ``q != z``, ``e`` the outliers.

    Args:
        hqo_scale_trial: quantizes by a candidate.
        hqo_init_op_scale: statistic to start from.
        stats_reduce_dim: axis of a row, None for all values.
        hqo_beta_scale, hqo_kappa_scale, hqo_lp_norm_scale, hqo_iters_scale, keepdim: see :class:`HalfQuadratic`.
    """

    def __init__(
        self,
        hqo_scale_trial: ScaleTrial,
        hqo_init_op_scale: nn.Module,
        stats_reduce_dim: int | None = None,
        hqo_beta_scale: float = 1e5,
        hqo_kappa_scale: float = 1.01,
        hqo_lp_norm_scale: float = 0.7,
        hqo_iters_scale: int = 1000,
        keepdim: bool = False,
    ) -> None:
        super().__init__(
            stats_reduce_dim,
            hqo_beta_scale,
            hqo_kappa_scale,
            hqo_lp_norm_scale,
            hqo_iters_scale,
            keepdim,
        )
        self.trial, self.start = hqo_scale_trial, hqo_init_op_scale

    @torch.no_grad()
    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The best statistic of the viewed ``x``, ``(n,)`` or ``(C, n)``."""
        x, trial = upcast(x), self.trial
        offset, threshold = trial.offset(x), trial.threshold()

        def step(statistic: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
            scale = trial.scale(statistic, x)
            zero_point = trial.zero_point(offset, scale)
            steps = trial.integers(x, scale, zero_point) - zero_point
            error = x - steps * scale
            ratio = (x - shrink(error, beta, self.norm).to(x.dtype)) / steps
            ratio = torch.where(steps == 0, torch.nan, ratio)
            if self.stats_reduce_dim is None:
                middle = ratio.nanmedian()
            else:
                middle = ratio.nanmedian(self.stats_reduce_dim, self.keepdim).values
            return error.abs().mean(), middle * threshold

        return self._descend(x, self.start(x), step)


class HalfQuadraticOptimizerZeroPoint(HalfQuadratic):
    """The statistic of a zero point: ``mean(x - e - (q - min_int) * scale)``, ``e`` the outliers.

    Args:
        hqo_zero_point_trial: quantizes by a candidate.
        hqo_init_op_zp: statistic to start from.
        stats_reduce_dim: axis of a row, None for all values.
        hqo_beta_zp, hqo_kappa_zp, hqo_lp_norm_zp, hqo_iters_zp, keepdim: see :class:`HalfQuadratic`.
    """

    def __init__(
        self,
        hqo_zero_point_trial: ZeroPointTrial,
        hqo_init_op_zp: nn.Module,
        stats_reduce_dim: int | None = None,
        hqo_beta_zp: float = 1.0,
        hqo_kappa_zp: float = 1.01,
        hqo_lp_norm_zp: float = 0.5,
        hqo_iters_zp: int = 1000,
        keepdim: bool = False,
    ) -> None:
        super().__init__(
            stats_reduce_dim, hqo_beta_zp, hqo_kappa_zp, hqo_lp_norm_zp, hqo_iters_zp, keepdim
        )
        self.trial, self.start = hqo_zero_point_trial, hqo_init_op_zp

    @torch.no_grad()
    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The best statistic of the viewed ``x`` at the scale ``context[0]``."""
        x, trial = upcast(x), self.trial
        scale = beside(context[0].detach(), x)
        minimum = trial.int_quant.min_int(trial.bits())  # type: ignore[operator]

        def step(statistic: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
            zero_point = trial.zero_point(statistic, scale, x)
            q = trial.integers(x, scale, zero_point)
            error = x - (q - zero_point) * scale
            rest = x - shrink(error, beta, self.norm).to(x.dtype) - (q - minimum) * scale
            return error.abs().mean(), self._mean(rest)

        return self._descend(x, self.start(x), step)
