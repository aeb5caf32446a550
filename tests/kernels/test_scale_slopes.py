"""Values and derivatives of scales, which fast forms compute among others, against the definitions."""

import itertools

import pytest
import torch

from qframework.functional import ScaleRule, learned_scale, statistic_scale
from qframework.kernels.scales import (
    learned_scale_gradient,
    learned_scale_values,
    statistic_scale_slope,
    statistic_scale_values,
)

COLLECTED = torch.tensor([0.2, 0.3, 0.9, 3.7, 11.0], dtype=torch.float64)
STORED = torch.tensor([-1.5, -0.0, 0.0, 0.7, 2.6], dtype=torch.float64)
UPSTREAM = torch.tensor([0.3, -1.7, 2.2, 0.9, -0.4], dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize(
    ("domain", "rounding", "minimum"),
    [
        *itertools.product(["fp", "log_fp"], ["round"], [None, 0.3]),
        *itertools.product(["power_of_two"], ["round", "ceil", "dpu"], [None, 0.3]),
    ],
)
def test_values_and_derivatives_are_those_of_the_definition(
    domain, rounding, minimum, dtype, rtol
) -> None:
    rule = ScaleRule("absmax", 127.0, domain, rounding, minimum)
    upstream = UPSTREAM.to(dtype)

    statistic = COLLECTED.to(dtype).requires_grad_()
    scale = statistic_scale(statistic, rule)
    assert torch.equal(statistic_scale_values(statistic, rule), scale)
    (grad,) = torch.autograd.grad(scale, statistic, upstream)
    found = upstream * statistic_scale_slope(statistic.detach(), rule)
    torch.testing.assert_close(found, grad, rtol=rtol, atol=0)

    stored = STORED.to(dtype).requires_grad_()
    scale = learned_scale(stored, rule)
    assert torch.equal(learned_scale_values(stored, rule), scale)
    (grad,) = torch.autograd.grad(scale, stored, upstream)
    found = learned_scale_gradient(upstream, stored.detach(), rule)
    torch.testing.assert_close(found, grad, rtol=rtol, atol=0)


@pytest.mark.parametrize("minimum", [None, 0.5])
def test_a_statistic_of_0_has_the_slope_of_the_definition(minimum) -> None:
    rule = ScaleRule("absmax", 4.0, minimum=minimum)
    zero = torch.tensor(0.0, requires_grad=True)
    (grad,) = torch.autograd.grad(statistic_scale(zero, rule), zero)
    assert statistic_scale_slope(zero.detach(), rule) == grad == (0.25 if minimum else 0.0)
