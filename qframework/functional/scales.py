"""From a stored number or a statistic to a scale.

scale = max(magnitude, minimum) / threshold, where the magnitude of a stored number ``v`` is

    'fp': |v|        'log_fp': 2^v        'power_of_two': 2^round(v)

and that of a statistic the same of its logarithm. The gradient passes the minimum and the rounding unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.functional.rules import ScaleRule
from qframework.functional.straight_through import (
    abs_binary_sign_grad,
    apply_step,
    scalar_clamp_min_ste,
)


def over(magnitude: Tensor, threshold: float) -> Tensor:
    """``magnitude / threshold``, rounded once on every device: by a number some multiply with its reciprocal.

    Args:
        magnitude: floating-point tensor of any shape.
        threshold: positive number.
    """
    divisor = torch.full((), threshold, dtype=magnitude.dtype, device=magnitude.device)
    return magnitude / divisor


def _bounded(magnitude: Tensor, rule: ScaleRule) -> Tensor:
    return scalar_clamp_min_ste(magnitude, rule.minimum) if rule.minimum else magnitude


def in_shape(stored: Tensor, rule: ScaleRule) -> Tensor:
    """A learned number in the shape of its scale: parameters have a dimension, also where the scale has none.

    Args:
        stored: the number, of the shape of the scale, or of shape ``(1,)``.
        rule: the scale.

    Returns:
        ``stored``; 0-dim where it has one dimension and the scale of the rule none.
    """
    return stored.reshape(()) if stored.dim() == 1 and rule.shape == () else stored


def learned_scale(stored: Tensor, rule: ScaleRule) -> Tensor:
    """The scale of a learned number.

    Args:
        stored: the number in its domain, of the shape of the scale.
        rule: the scale.

    Returns:
        Positive tensor of the shape of ``stored``; at 0 the gradient of ``|v|`` is 1.
    """
    if rule.domain == "fp":
        magnitude = abs_binary_sign_grad(stored)
    else:
        exponent = stored
        if rule.domain == "power_of_two":
            exponent = apply_step(stored, rule.rounding)
        magnitude = torch.exp2(exponent)
    return over(_bounded(magnitude, rule), rule.threshold)


def statistic_scale(statistic: Tensor, rule: ScaleRule) -> Tensor:
    """The scale of a statistic, such as the largest magnitude of a weight.

    Args:
        statistic: 0 or above, in the units of the values, of the shape of the scale.
        rule: the scale.

    Returns:
        Positive tensor of the shape of ``statistic``.
    """
    magnitude = _bounded(statistic, rule)
    if rule.domain == "fp":
        return over(_bounded(magnitude.abs(), rule), rule.threshold)
    return learned_scale(torch.log2(magnitude), rule)
