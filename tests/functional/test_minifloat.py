"""Rounding to minifloats, by the definition and by what runs: against ml_dtypes and torch's casts."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from qframework.functional import (
    MinifloatFormat,
    largest_minifloat,
    minifloat_codes,
    minifloat_quantize,
    power_below,
    round_to_minifloat,
)

INF, NAN = math.inf, math.nan
# mantissa bits, bias, largest, overflow when it doesn't saturate; exponent bits
FORMATS = {
    "float8_e4m3fn": (MinifloatFormat(3, 7, 448.0, overflow=NAN), 4),
    "float8_e5m2": (MinifloatFormat(2, 15, 57344.0, overflow=INF), 5),
    "float8_e4m3fnuz": (MinifloatFormat(3, 8, 240.0, overflow=NAN), 4),
    "float8_e5m2fnuz": (MinifloatFormat(2, 16, 57344.0, overflow=NAN), 5),
    "float8_e4m3": (MinifloatFormat(3, 7, 240.0, overflow=INF), 4),
    "float8_e3m4": (MinifloatFormat(4, 3, 15.5, overflow=INF), 3),
    "float6_e3m2fn": (MinifloatFormat(2, 3, 28.0), 3),
    "float6_e2m3fn": (MinifloatFormat(3, 1, 7.5), 2),
    "float4_e2m1fn": (MinifloatFormat(1, 1, 6.0), 2),
    "bfloat16": (MinifloatFormat(7, 127, float(torch.finfo(torch.bfloat16).max), overflow=INF), 8),
    "float16": (MinifloatFormat(10, 15, 65504.0, overflow=INF), 5),
}


FUNCTIONS = {"definition": minifloat_quantize.definition, "what runs": minifloat_quantize}


@pytest.fixture(params=FUNCTIONS)
def quantize(request):
    return FUNCTIONS[request.param]


def samples(fmt: MinifloatFormat) -> torch.Tensor:
    """Random numbers of all magnitudes, all midpoints between codes near by, and their neighbours."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), generator=generator, dtype=torch.int64)
    anything = bits.to(torch.int32).view(torch.float32)
    near = torch.randn(500_000, generator=generator) * fmt.largest / 3
    small = torch.randn(200_000, generator=generator) * 2.0 ** (1 - fmt.exponent_bias)
    if fmt.mantissa_bits < 7:
        exponents = max(int(math.log2(fmt.largest)) + fmt.exponent_bias, 1).bit_length()
        codes = minifloat_codes(exponents, fmt.mantissa_bits, fmt.exponent_bias)
        codes = torch.tensor(sorted(set(codes)))
        middle = (codes[1:] + codes[:-1]) / 2
        ties = torch.cat([codes, middle])
        ties = torch.cat(
            [ties, ties.nextafter(torch.tensor(INF)), ties.nextafter(-torch.tensor(INF))]
        )
    else:
        ties = torch.zeros(1)
    return torch.cat([anything, near, small, ties])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("name", FORMATS)
def test_millions_of_floats_round_as_ml_dtypes_does(name, quantize) -> None:
    fmt, _ = FORMATS[name]
    x = samples(fmt)
    if (
        fmt.saturates
    ):  # their casts of formats without special numbers saturate, infinities and NaN too
        x = x[x.isfinite()]
    with np.errstate(all="ignore"):
        dtype = np.float16 if name == "float16" else getattr(ml_dtypes, name)
        expected = torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))
    got = quantize(x, None, fmt)
    assert same(got, expected), x[~((got == expected) | (got.isnan() & expected.isnan()))][:10]


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_finite_floats_round_as_torch_casts_do(name, quantize) -> None:
    fmt, _ = FORMATS[name]
    x = samples(fmt)
    x = x[x.abs() <= fmt.largest]
    expected = x.to(getattr(torch, name)).float()
    assert same(quantize(x, None, fmt), expected)


@pytest.mark.parametrize("name", [n for n in FORMATS if "16" not in n])
def test_every_code_is_a_fixed_point(name, quantize) -> None:
    fmt, exponent_bits = FORMATS[name]
    codes = torch.tensor(minifloat_codes(exponent_bits, fmt.mantissa_bits, fmt.exponent_bias))
    usable = codes[codes.abs() <= fmt.largest]
    assert torch.equal(quantize(usable, None, fmt), usable)
    raw = np.arange(2 ** (1 + exponent_bits + fmt.mantissa_bits), dtype=np.uint8)
    theirs = torch.from_numpy(raw.view(getattr(ml_dtypes, name)).astype(np.float32))
    finite = theirs.isfinite() & (codes.abs() <= fmt.largest) & (theirs != 0)
    assert torch.equal(codes[finite], theirs[finite])


def test_the_largest_number_follows_from_the_widths() -> None:
    assert largest_minifloat(4, 3, 7) == 480
    assert largest_minifloat(5, 2, 15) == 114688
    assert largest_minifloat(2, 1, 1) == 6
    assert max(minifloat_codes(3, 2, 3)) == largest_minifloat(3, 2, 3)


def test_the_power_below_is_exact_next_to_powers_of_two() -> None:
    powers = 2.0 ** torch.arange(-126.0, 128.0)
    assert torch.equal(power_below(powers), powers)
    below = powers[1:].nextafter(torch.tensor(0.0))
    assert torch.equal(power_below(-below), powers[:-1])
    assert torch.equal(power_below(powers.double()), powers.double())
    assert power_below(torch.tensor([0.0, INF])).tolist() == [0.0, INF]


def test_saturation_clamps_what_is_finite_and_keeps_nan(quantize) -> None:
    fmt = MinifloatFormat(3, 7, 448.0)
    got = quantize(torch.tensor([1e30, -1e30, NAN, 465.0]), None, fmt)
    assert got[:2].tolist() == [448.0, -448.0] and got[2].isnan() and got[3] == 448.0


def test_an_unsigned_format_has_no_negative_numbers(quantize) -> None:
    fmt = MinifloatFormat(3, 7, 448.0, signed=False)
    assert quantize(torch.tensor([-3.0, 0.3, 1e9]), None, fmt).tolist() == [
        0.0,
        0.3125,
        448.0,
    ]
    over = fmt._replace(overflow=INF)
    assert quantize(torch.tensor([-1e9, 1e9]), None, over).tolist() == [0.0, INF]


def test_gradients_follow_the_value(quantize) -> None:
    fmt = MinifloatFormat(1, 1, 6.0)
    x = torch.tensor([0.0, 0.3, 0.99, 1.3, 2.6, 6.5, 7.0, -100.0], requires_grad=True)
    y = quantize(x, None, fmt)
    y.sum().backward()
    v = x.detach()
    expected = torch.where(v.abs() >= 1, y.detach() / v, 1.0)
    expected[-2:] = 0.0
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_brain_floats_are_computed_in_float32(quantize) -> None:
    fmt = MinifloatFormat(3, 7, 448.0)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.tensor(0.0123)
    got = quantize(x, scale, fmt)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, quantize(x.float(), scale, fmt).bfloat16())


def test_transforms_of_functions_differentiate_and_batch(quantize) -> None:
    fmt = MinifloatFormat(3, 7, 448.0)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.01)
    f = lambda row: quantize(row, scale, fmt).square().sum()  # noqa: E731
    got = torch.func.vmap(torch.func.grad(f))(x)
    leaf = x.clone().requires_grad_()
    quantize(leaf, scale, fmt).square().sum().backward()
    torch.testing.assert_close(got, leaf.grad)


def test_composed_widths_may_be_tensors_with_gradients() -> None:
    mantissa = torch.tensor(3.0, requires_grad=True)
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    y = round_to_minifloat(x, None, mantissa, 7, 448.0)
    assert torch.equal(y.detach(), minifloat_quantize(x, None, MinifloatFormat(3, 7, 448.0)))
    y.sum().backward()
    assert mantissa.grad is not None and mantissa.grad.isfinite() and mantissa.grad != 0
