"""Values and derivatives of scales, for functions that have them among others in one differentiable step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qframework.functional import ROUNDINGS, ScaleRule, over


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
