"""The fast form of quantizers to two values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qframework.functional import quantize_to_signs
from qframework.kernels.plan import Plan
from qframework.kernels.trust import is_plain


def plan_signs(plan: Plan, clamp_gradient: bool) -> None:
    """Find the form of a plan.

    Args:
        plan: of a binary quantizer.
        clamp_gradient: whether a differentiated clamp is in front.
    """
    quantizer: Any = plan.quantizer

    def run(x: Tensor) -> Any:
        scale = quantizer.scaling_impl(x)
        if is_plain(scale):
            y = quantize_to_signs(x, scale, clamp_gradient)
        else:
            y = quantize_to_signs.definition(x, scale, clamp_gradient)
        return y, scale, quantizer.number(0.0), quantizer.number(quantizer.bits)

    plan.name, plan.form = "quantize_to_signs", run
