"""Scales, by their definition and fused, against the modules of the core that mean the same."""

import itertools
from collections.abc import Callable

import pytest
import torch
from kernel_case import assert_as_defined
from torch import Tensor

import qframework
from qframework.core.function_wrapper import CeilSte, RoundSte
from qframework.core.restrict_val import (
    FloatRestrictValue,
    LogFloatRestrictValue,
    PowerOfTwoRestrictValue,
    ScaleRestriction,
)
from qframework.functional import ScaleRule, learned_scale, statistic_scale

POSITIVE, SIGNED = torch.tensor([0.2, 0.9, 3.7, 11.0]), torch.tensor([-1.5, 0.0, 0.7, 2.6])


def composed(rule: ScaleRule, of_statistic: bool) -> Callable[[Tensor], Tensor]:
    """The modules that a quantizer of these names holds."""
    step = CeilSte() if rule.rounding == "ceil" else RoundSte()
    kind = {
        "fp": FloatRestrictValue(),
        "log_fp": LogFloatRestrictValue(),
        "power_of_two": PowerOfTwoRestrictValue(step),
    }[rule.domain]
    restriction = ScaleRestriction(kind, FloatRestrictValue(), None, rule.minimum)

    def apply(v: Tensor) -> Tensor:
        stored = restriction.to_domain(v) if of_statistic else v
        return restriction(stored, torch.tensor(rule.threshold, dtype=v.dtype))

    return apply


@pytest.mark.parametrize("kernels", ["fused", "reference"])
@pytest.mark.parametrize(
    ("domain", "rounding", "minimum"),
    [
        *itertools.product(["fp", "log_fp"], ["round"], [None, 0.3]),
        *itertools.product(["power_of_two"], ["round", "ceil"], [None, 0.3]),
    ],
)
def test_scales_are_those_of_the_parts_of_a_quantizer(domain, rounding, minimum, kernels) -> None:
    for kind, function, v in (
        ("absmax", statistic_scale, POSITIVE),
        ("learned", learned_scale, SIGNED),
    ):
        rule = ScaleRule(kind, 8.0, domain, rounding, minimum)
        with qframework.settings.use(kernels=kernels):
            assert_as_defined(
                lambda v, function=function, rule=rule: function(v, rule),
                v,
                expected=composed(rule, kind == "absmax"),
            )


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_a_learned_scale_of_0_can_leave_it(kernels) -> None:
    v = torch.tensor([0.0, -0.0], requires_grad=True)
    with qframework.settings.use(kernels=kernels):
        scale = learned_scale(v, ScaleRule("learned", 4.0))
        assert scale.tolist() == [0.0, 0.0]
        assert torch.autograd.grad(scale.sum(), v)[0].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_the_minimum_passes_gradients(kernels) -> None:
    v = torch.tensor([0.1, 2.0], requires_grad=True)
    with qframework.settings.use(kernels=kernels):
        for function in (statistic_scale, learned_scale):
            scale = function(v, ScaleRule("absmax", 4.0, minimum=1.0))
            assert scale.tolist() == [0.25, 0.5]
            assert torch.autograd.grad(scale.sum(), v)[0].tolist() == [0.25, 0.25]
