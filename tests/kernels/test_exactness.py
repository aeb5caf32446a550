"""Kernels give the numbers of the definition, bit for bit: for all codes, between them, and for floats of any bits."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import qframework
from qframework.functional import (
    IntegerGrid,
    MinifloatFormat,
    MinifloatGrid,
    ScaleRule,
    codebook_quantize,
    compute_dtype,
    fake_quantize,
    largest_minifloat,
    minifloat_codes,
    minifloat_quantize,
    quantize_by_absmax,
)
from qframework.kernels.native import tensors

FORMATS = [(e, m) for e in range(1, 8) for m in range(8 - e)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch) -> None:
    monkeypatch.setattr(tensors, "SMALLEST", 1)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0)
    )


def assert_exact(function, *args) -> None:
    with qframework.settings.use(kernels="reference"), torch.no_grad():
        expected = function.definition(*args)
    for kernels in ("auto", "fused"):
        with qframework.settings.use(kernels=kernels), torch.no_grad():
            found = function(*args)
        if isinstance(found, Tensor):
            assert same(found, expected), kernels
        else:
            assert all(map(same, found, expected)), kernels


def around(codes: Tensor) -> Tensor:
    """Numbers, what lies half-way between neighbours, and the next floats on both sides of these."""
    ordered = codes.unique()
    points = torch.cat([ordered, (ordered[1:] + ordered[:-1]) / 2, ordered * 2])
    up, down = (
        torch.nextafter(points, torch.full_like(points, end)) for end in (math.inf, -math.inf)
    )
    return torch.cat([points, up, down, special()])


def special() -> Tensor:
    return torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38, -3e38])


def any_floats(n: int, seed: int = 0) -> Tensor:
    """Floats of random bits: all exponents, subnormal numbers, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (n,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def formats(exponent: int, mantissa: int) -> list[MinifloatFormat]:
    bias = 2 ** (exponent - 1) - 1
    largest = largest_minifloat(exponent, mantissa, bias)
    how = itertools.product((True, False), (0.0, math.inf, math.nan))
    return [MinifloatFormat(mantissa, bias, largest, signed, over) for signed, over in how]


@pytest.mark.parametrize(("exponent", "mantissa"), FORMATS)
def test_all_minifloats_and_what_lies_between_them(exponent, mantissa) -> None:
    bias = 2 ** (exponent - 1) - 1
    x = around(torch.tensor(minifloat_codes(exponent, mantissa, bias)))
    for format in formats(exponent, mantissa):
        for scale in (None, torch.tensor(1.0), torch.tensor(0.37)):
            given = x if scale is None else x * scale
            assert_exact(minifloat_quantize, given, scale, format)
    for dtype in DTYPES:
        scale = torch.tensor(0.25, dtype=compute_dtype(dtype))
        assert_exact(minifloat_quantize, (x / 4).to(dtype), scale, format)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rounding", ["round", "ceil", "floor", "round_to_zero"])
def test_all_integers_and_what_lies_between_them(bits, rounding) -> None:
    for low in (0.0, -(2.0 ** (bits - 1))):
        grid = IntegerGrid(low, low + 2**bits - 1, rounding)
        x = around(torch.arange(low - 2, low + 2**bits + 2))
        for scale, zero in ((0.25, None), (0.37, None), (0.37, 3.0)):
            for dtype in DTYPES:
                numbers = [
                    None if n is None else torch.tensor(n, dtype=compute_dtype(dtype))
                    for n in (scale, zero)
                ]
                assert_exact(fake_quantize, (x * scale).to(dtype), *numbers, grid)


@pytest.mark.parametrize(
    "n", [pytest.param(100_000, id="quick"), pytest.param(10_000_000, marks=pytest.mark.exhaustive)]
)
def test_floats_of_any_bits(n) -> None:
    x = any_floats(n)
    e4m3, e5m2 = MinifloatFormat(3, 7, 448.0), MinifloatFormat(2, 15, 57344.0, overflow=math.inf)
    for scale in (torch.tensor(1.0), torch.tensor(3e-5), torch.tensor(2e30)):
        assert_exact(minifloat_quantize, x, scale, e4m3)
        assert_exact(minifloat_quantize, x, scale, e5m2)
        assert_exact(fake_quantize, x, scale, None, IntegerGrid(-128.0, 127.0))
        assert_exact(fake_quantize, x, scale, torch.tensor(5.0), IntegerGrid(0.0, 255.0))
        assert_exact(codebook_quantize, x, scale, torch.tensor([-1.0, -0.3, 0.0, 0.1, 1.0]))


@pytest.mark.parametrize(
    "n", [pytest.param(96_000, id="quick"), pytest.param(9_600_000, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("domain", ["fp", "power_of_two"])
def test_scales_and_values_of_rows(domain, n) -> None:
    x = any_floats(n).clamp(-1e30, 1e30).nan_to_num(0.0)
    how = {"domain": domain, "rounding": "floor", "minimum": 2.0**-110, "reduced_axis": -1}
    for length in (16, 32, 75, 160):
        rows = x.view(-1, length) if n % length == 0 else x[: n // length * length].view(-1, length)
        for grid in (MinifloatGrid(MinifloatFormat(3, 7, 448.0)), IntegerGrid(-127.0, 127.0)):
            assert_exact(quantize_by_absmax, rows, grid, ScaleRule("absmax", 256.0, **how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_half_precision(dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (torch.tensor(1.0), torch.tensor(0.037)):
        assert_exact(minifloat_quantize, x, scale, MinifloatFormat(3, 7, 448.0))
        assert_exact(minifloat_quantize, x, scale, MinifloatFormat(1, 1, 6.0, False))
        assert_exact(fake_quantize, x, scale, None, IntegerGrid(-128.0, 127.0))


@pytest.mark.parametrize(
    "grid", [MinifloatGrid(MinifloatFormat(3, 7, 448.0)), IntegerGrid(-99.0, 99.0)]
)
@pytest.mark.parametrize("rule", [
    ScaleRule("absmax", 128.0),
    ScaleRule("absmax", 128.0, shape=(300, 1), channel_axis=0),
    ScaleRule("absmax", 128.0, reduced_axis=-1),
])  # fmt: skip
def test_any_number_of_threads_gives_the_same_bits(rule, grid) -> None:
    x, before = torch.randn(300, 700), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y, scale = quantize_by_absmax(leaf, grid, rule)
            found.append((y, scale, torch.autograd.grad(y.square().sum() + scale.sum(), leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
