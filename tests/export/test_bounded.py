"""Bounds on rounding errors hold, and are no wider than they need to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.export.bounded import RULES, Bounded, exact

U = 2.0**-24


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape) * 3


#: Rule, the function in float32, tensor arguments, further ones.
CASES: dict[str, tuple[str, Callable[..., Tensor], tuple[Any, ...], tuple[Any, ...]]] = {
    "add": ("add", torch.add, (randn(500), randn(500)), ()),
    "subtract": ("sub", torch.sub, (randn(500), randn(500)), ()),
    "product": ("mul", torch.mul, (randn(500), randn(500)), ()),
    "quotient": ("div", torch.div, (randn(500), randn(500).abs() + 0.5), ()),
    "linear": ("linear", F.linear, (randn(40, 300), randn(20, 300), randn(20)), ()),
    "matmul": ("matmul", torch.matmul, (randn(3, 20, 100), randn(3, 100, 20)), ()),
    "conv2d": ("conv2d", F.conv2d, (randn(4, 8, 9, 9), randn(6, 8, 3, 3), randn(6)), (1, 1)),
    "conv_transpose1d": (
        "conv_transpose1d",
        F.conv_transpose1d,
        (randn(4, 8, 9), randn(8, 6, 3), randn(6)),
        (2,),
    ),
    "mean": ("mean", torch.mean, (randn(40, 100),), (1,)),
    "avg_pool2d": ("avg_pool2d", F.avg_pool2d, (randn(2, 3, 8, 8),), (2,)),
    "softmax": ("softmax", torch.softmax, (randn(40, 50),), (-1,)),
    "log_softmax": ("log_softmax", torch.log_softmax, (randn(40, 50),), (-1,)),
    "layer_norm": ("layer_norm", F.layer_norm, (randn(40, 64),), ([64],)),
    "group_norm": ("group_norm", F.group_norm, (randn(4, 8, 6, 6),), (2,)),
    "rms_norm": ("rms_norm", F.rms_norm, (randn(40, 64),), ([64], None, 1e-6)),
    "relu": ("relu", torch.relu, (randn(500),), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_stays_within_the_bound_and_uses_some_of_it(case: str) -> None:
    name, function, tensors, how = CASES[case]
    bounded = RULES[name](U, *(exact(t) for t in tensors), *how)
    result = function(*tensors, *how)
    away = (result.double() - bounded.value).abs()
    assert bool((away <= bounded.error).all())
    reference = function(*(t.double() for t in tensors), *how)
    torch.testing.assert_close(bounded.value, reference, rtol=1e-9, atol=1e-9)
    assert float((bounded.error / (reference.abs() + 1)).median()) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_errors_of_arguments_are_handed_on(case: str) -> None:
    name, function, tensors, how = CASES[case]
    size = 1e-3
    moved = [t.double() + size * (torch.rand_like(t, dtype=torch.float64) * 2 - 1) for t in tensors]
    given = (Bounded(t.double(), torch.full_like(t, size, dtype=torch.float64)) for t in tensors)
    bounded = RULES[name](U, *given, *how)
    assert bool(((function(*moved, *how) - bounded.value).abs() <= bounded.error).all())


def test_attention_is_its_parts() -> None:
    q, k, v = (randn(2, 5, 8) for _ in range(3))
    bounded = RULES["scaled_dot_product_attention"](U, exact(q), exact(k), exact(v))
    result = F.scaled_dot_product_attention(q, k, v)
    assert bool(((result.double() - bounded.value).abs() <= bounded.error).all())
