"""Scales of learned numbers and of statistics, against the modules of the core that mean the same."""

import itertools

import pytest
import torch
from torch import Tensor

from qframework.core.function_wrapper import CeilSte, RoundSte
from qframework.core.restrict_val import (
    FloatRestrictValue,
    LogFloatRestrictValue,
    PowerOfTwoRestrictValue,
    ScaleRestriction,
)
from qframework.functional import ScaleRule, learned_scale, statistic_scale

POSITIVE = torch.tensor([0.2, 0.9, 3.7, 11.0], dtype=torch.float64)
SIGNED = torch.tensor([-1.5, 0.0, 0.7, 2.6], dtype=torch.float64)


def restriction_of(rule: ScaleRule) -> ScaleRestriction:
    """The module that a quantizer of these names holds."""
    step = CeilSte() if rule.rounding == "ceil" else RoundSte()
    kind = {
        "fp": FloatRestrictValue(),
        "log_fp": LogFloatRestrictValue(),
        "power_of_two": PowerOfTwoRestrictValue(step),
    }[rule.domain]
    return ScaleRestriction(kind, FloatRestrictValue(), None, rule.minimum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("domain", "rounding", "minimum"),
    [
        *itertools.product(["fp", "log_fp"], ["round"], [None, 0.3]),
        *itertools.product(["power_of_two"], ["round", "ceil"], [None, 0.3]),
    ],
)
def test_scales_are_those_of_the_parts_of_a_quantizer(domain, rounding, minimum, dtype) -> None:
    rule = ScaleRule("absmax", 7.0, domain, rounding, minimum)
    restriction = restriction_of(rule)

    def of_statistic(v: Tensor) -> Tensor:
        return restriction.of_statistic(v, torch.tensor(7.0, dtype=dtype))

    def of_stored(v: Tensor) -> Tensor:
        return restriction(v, torch.tensor(7.0, dtype=dtype))

    for function, composed, v in (
        (statistic_scale, of_statistic, POSITIVE),
        (learned_scale, of_stored, SIGNED),
    ):
        leaf = v.to(dtype).requires_grad_()
        scale, expected = function(leaf, rule), composed(leaf)
        assert torch.equal(scale, expected)
        upstream = torch.arange(1.0, 5.0, dtype=dtype)
        grad, other = (torch.autograd.grad(s, leaf, upstream)[0] for s in (scale, expected))
        torch.testing.assert_close(grad, other, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)  # fmt: skip


def test_a_learned_scale_of_0_can_leave_it() -> None:
    v = torch.tensor([0.0, -0.0], requires_grad=True)
    scale = learned_scale(v, ScaleRule("learned", 4.0))
    assert scale.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(scale.sum(), v)[0].tolist() == [0.25, 0.25]


def test_the_minimum_passes_gradients() -> None:
    v = torch.tensor([0.1, 2.0], requires_grad=True)
    for function in (statistic_scale, learned_scale):
        scale = function(v, ScaleRule("absmax", 4.0, minimum=1.0))
        assert scale.tolist() == [0.25, 0.5]
        assert torch.autograd.grad(scale.sum(), v)[0].tolist() == [0.25, 0.25]
