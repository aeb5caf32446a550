"""Rounding to minifloats in one step, against its definition, for any format."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import kept_by
from torch import Tensor

import qframework
from qframework.functional import (
    MinifloatFormat,
    largest_minifloat,
    minifloat_quantize,
    power_below,
)
from qframework.kernels.rounding import _power_below

ROUNDINGS = ["round", "floor", "ceil", "round_to_zero", "dpu"]


def quantized(kernels: str, *args: Any) -> Tensor:
    with qframework.settings.use(kernels=kernels):
        return minifloat_quantize(*args)


@given(
    st.integers(1, 8).flatmap(lambda e: st.tuples(st.just(e), st.integers(0, 10))),
    st.booleans(),
    st.booleans(),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([(), (6, 1)]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients_are_those_of_the_definition(
    widths, signed, clamp_gradient, rounding, shape, dtype
) -> None:
    exponent_bits, mantissa_bits = widths
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent_bits == 8:
        exponent_bits -= 1
    largest = largest_minifloat(exponent_bits, mantissa_bits, bias)
    fmt = MinifloatFormat(mantissa_bits, bias, largest, signed)
    how = (fmt, rounding, clamp_gradient)
    generator = torch.Generator().manual_seed(mantissa_bits)
    x = torch.randn(6, 50, generator=generator, dtype=dtype) * min(largest, 1e4) / 2
    x[0, :20] *= 2.0**-bias / 100
    x[1, 0] = 0.0
    probe = torch.randn(x.shape, generator=generator, dtype=dtype)
    scale = torch.full(shape, 0.37, dtype=dtype)
    assert torch.equal(quantized("fused", x, scale, *how), quantized("reference", x, scale, *how))
    results = []
    # In float64 the composed gradients, differences of large numbers, are exact enough; x / 0.25 is exact in both.
    for kernels, compute in (("fused", dtype), ("reference", torch.float64)):
        scale = torch.full(shape, 0.25, dtype=compute, requires_grad=True)
        leaf = x.to(compute).clone().requires_grad_()
        y = quantized(kernels, leaf, scale, *how)
        (y * probe.to(compute)).sum().backward()
        results.append((y.detach().double(), leaf.grad.double(), scale.grad.double()))
    (y, gx, gs), (y2, gx2, gs2) = results
    assert torch.equal(y, y2)
    torch.testing.assert_close(gx, gx2, rtol=1e-6, atol=1e-9)
    assert float((gs - gs2).abs().max()) <= 1e-6 * float((probe.double() * y).abs().sum()) / 0.25


@pytest.mark.parametrize("overflow", [float("inf"), float("nan")])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_overflows_is_what_overflows_by_the_definition(overflow, rounding) -> None:
    fmt = MinifloatFormat(2, 15, 57344.0, overflow=overflow)
    edge = torch.tensor([57344.0, 61439.0, 61440.0, 65536.0, float("inf"), float("nan")])
    edge = torch.cat([edge, edge.nextafter(torch.tensor(0.0))])
    for x in (edge, -edge):
        one, other = (quantized(k, x, None, fmt, rounding) for k in ("fused", "reference"))
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_power_below_is_that_of_the_definition_but_for_subnormal_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite() & (x.abs() >= torch.finfo(torch.float32).tiny)]
    for v in (x, x.double(), torch.tensor([0.0, float("inf")])):
        assert torch.equal(_power_below(v), power_below(v))
    assert _power_below(torch.tensor(1e-40)) == 0


def test_one_tensor_is_kept_for_the_backward_pass() -> None:
    x, scale = torch.randn(64, 64, requires_grad=True) * 1.0, torch.tensor(0.1, requires_grad=True)
    kept = kept_by(lambda: quantized("fused", x, scale, MinifloatFormat(3, 7, 448.0)))
    assert sorted(t.numel() for t in kept) == [1, 4096]
