"""From a stored number or a statistic to a scale, in one differentiable step.

scale = max(magnitude, minimum) / threshold, where the magnitude of a stored number ``v`` is

    'fp': |v|        'log_fp': 2^v        'power_of_two': 2^round(v)

and that of a statistic the same of its logarithm. The gradient passes the minimum and the rounding unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.autograd import apply, keep, kept
from qframework.functional.straight_through import ROUNDINGS

#: The domains that have a fused form.
DOMAINS = ("fp", "log_fp", "power_of_two")


def _sign(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1."""
    return torch.where(x >= 0, 1.0, -1.0)


def _minimum(v: Tensor, minimum: float | None) -> Tensor:
    return v.clamp_min(minimum) if minimum else v


class _StoredScale(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        stored: Tensor, threshold: Tensor, domain: str, rounding: str, minimum: float | None
    ) -> Tensor:
        if domain == "fp":
            v = stored.abs()
        else:
            v = torch.exp2(ROUNDINGS[rounding](stored) if domain == "power_of_two" else stored)
        return _minimum(v, minimum) / threshold

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        stored, threshold, ctx.domain, ctx.rounding, ctx.minimum = inputs
        keep(ctx, stored, threshold, always=True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        stored, threshold = kept(ctx)
        grad_stored = grad_threshold = None
        settings = (ctx.domain, ctx.rounding)
        if ctx.needs_input_grad[0]:
            grad_stored = grad / threshold * slope_of_stored(stored, threshold, *settings)
        if ctx.needs_input_grad[1]:
            scale = _StoredScale.forward(stored, threshold, *settings, ctx.minimum)
            grad_threshold = (-grad * scale / threshold).sum_to_size(threshold.shape)
        return grad_stored, grad_threshold, None, None, None


def slope_of_stored(stored: Tensor, threshold: Tensor, domain: str, rounding: str) -> Tensor:
    """The derivative of the magnitude by the stored number."""
    if domain == "fp":
        return _sign(stored)
    one = torch.ones_like(threshold)
    return _StoredScale.forward(stored, one, domain, rounding, None) * math.log(2)


class _StatisticScale(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        statistic: Tensor, threshold: Tensor, domain: str, rounding: str, minimum: float | None
    ) -> Tensor:
        v = _minimum(statistic.abs(), minimum)
        if domain != "fp":
            exponent = torch.log2(v)
            exponent = ROUNDINGS[rounding](exponent) if domain == "power_of_two" else exponent
            v = _minimum(torch.exp2(exponent), minimum)
        return v / threshold

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        statistic, threshold, ctx.domain, ctx.rounding, ctx.minimum = inputs
        keep(ctx, statistic, threshold, always=True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        statistic, threshold = kept(ctx)
        settings = (ctx.domain, ctx.rounding, ctx.minimum)
        grad_statistic = grad_threshold = None
        if ctx.needs_input_grad[0]:
            slope = _sign(statistic) if ctx.minimum else statistic.sign()
            if ctx.domain != "fp":  # d 2^round(log2 v) = 2^round(log2 v) / v dv
                one = torch.ones_like(threshold)
                v = _minimum(statistic.abs(), ctx.minimum)
                slope = slope * _StatisticScale.forward(statistic, one, *settings) / v
            grad_statistic = grad / threshold * slope
        if ctx.needs_input_grad[1]:
            scale = _StatisticScale.forward(statistic, threshold, *settings)
            grad_threshold = (-grad * scale / threshold).sum_to_size(threshold.shape)
        return grad_statistic, grad_threshold, None, None, None


def stored_scale(
    stored: Tensor,
    threshold: Tensor,
    domain: str = "fp",
    rounding: str = "round",
    minimum: float | None = None,
) -> Tensor:
    """The scale of a learned number.

    Args:
        stored: the number in its domain, of the shape of the scale.
        threshold: positive integer that the magnitude is divided by, 0-dim.
        domain: one of :data:`DOMAINS`.
        rounding: of the exponent, a name of :data:`ROUNDINGS`.
        minimum: lower bound of the magnitude, None for none.

    Returns:
        Positive tensor of the shape of ``stored``; at 0 the gradient of ``|v|`` is 1.
    """
    return apply(_StoredScale, stored, threshold, domain, rounding, minimum)  # type: ignore[no-any-return]


def statistic_scale(
    statistic: Tensor,
    threshold: Tensor,
    domain: str = "fp",
    rounding: str = "round",
    minimum: float | None = None,
) -> Tensor:
    """The scale of a statistic, such as the largest magnitude of a weight.

    Arguments and result as for :func:`stored_scale`, ``statistic`` being in the units of the values.
    """
    return apply(_StatisticScale, statistic, threshold, domain, rounding, minimum)  # type: ignore[no-any-return]
