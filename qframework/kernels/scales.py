"""Scales in one differentiable step: a handful of numbers, for which calls cost more than arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    ROUNDINGS,
    ScaleRule,
    add_kernel,
    learned_scale,
    over,
    statistic_scale,
)
from qframework.kernels.autograd import Context, Fused, apply, may_fuse


def _sign(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _bounded(v: Tensor, minimum: float | None) -> Tensor:
    return v.clamp_min(minimum) if minimum else v


def _magnitude(stored: Tensor, rule: ScaleRule) -> Tensor:
    """That of a stored number, before the minimum."""
    if rule.domain == "fp":
        return stored.abs()
    exponent = ROUNDINGS[rule.rounding](stored) if rule.domain == "power_of_two" else stored
    return torch.exp2(exponent)


# ------------------------------------------------------------ of a learned number


def learned_scale_values(stored: Tensor, rule: ScaleRule) -> Tensor:
    """The values of :func:`~qframework.functional.learned_scale`."""
    return over(_bounded(_magnitude(stored, rule), rule.minimum), rule.threshold)


def learned_scale_gradient(grad: Tensor, stored: Tensor, rule: ScaleRule) -> Tensor:
    """The gradient of the stored number for that of the scale."""
    slope = _sign(stored)
    if rule.domain != "fp":
        slope = _magnitude(stored, rule) * math.log(2)
    return over(grad, rule.threshold) * slope


class _LearnedScale(Fused):
    @staticmethod
    def forward(ctx: Context, stored: Tensor, rule: ScaleRule) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(stored)
        ctx.how = (rule,)
        return learned_scale_values(stored, rule)

    @staticmethod
    def define(ctx: Context, stored: Tensor) -> Tensor:  # type: ignore[override]
        return learned_scale.definition(stored, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        (stored,) = ctx.saved_tensors
        return learned_scale_gradient(grad, stored, *ctx.how), None


@add_kernel(learned_scale, "fused", may_fuse)
def _fused_learned_scale(stored: Tensor, rule: ScaleRule) -> Tensor:
    return apply(_LearnedScale, stored, rule)  # type: ignore[no-any-return]


# ------------------------------------------------------------ of a statistic


def statistic_scale_values(statistic: Tensor, rule: ScaleRule) -> Tensor:
    """The values of :func:`~qframework.functional.statistic_scale`."""
    v = _bounded(statistic.abs(), rule.minimum)
    if rule.domain != "fp":
        v = _bounded(_magnitude(torch.log2(v), rule), rule.minimum)
    return over(v, rule.threshold)


def statistic_scale_slope(statistic: Tensor, rule: ScaleRule) -> Tensor:
    """The derivative of the scale by the statistic."""
    slope = _sign(statistic) if rule.minimum else statistic.sign()
    if rule.domain == "fp":
        return over(slope, rule.threshold)
    # d 2^round(log2 v) = 2^round(log2 v) / v dv, and the minimum passes gradients
    v = _bounded(statistic.abs(), rule.minimum)
    return slope * over(_magnitude(torch.log2(v), rule), rule.threshold) / v


class _StatisticScale(Fused):
    @staticmethod
    def forward(ctx: Context, statistic: Tensor, rule: ScaleRule) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(statistic)
        ctx.how = (rule,)
        return statistic_scale_values(statistic, rule)

    @staticmethod
    def define(ctx: Context, statistic: Tensor) -> Tensor:  # type: ignore[override]
        return statistic_scale.definition(statistic, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        (statistic,) = ctx.saved_tensors
        return grad * statistic_scale_slope(statistic, *ctx.how), None


@add_kernel(statistic_scale, "fused", may_fuse)
def _fused_statistic_scale(statistic: Tensor, rule: ScaleRule) -> Tensor:
    return apply(_StatisticScale, statistic, rule)  # type: ignore[no-any-return]
