"""Whatever the range, the scale and the input: the nearest point of the grid, and the gradient that belongs to it."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from qframework.core.quant import IntQuant

SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 4), (2, 3, 4)])
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1.0, -1.0]


@st.composite
def ranges(draw) -> tuple[int, bool, bool]:
    signed, narrow = draw(st.booleans()), draw(st.booleans())
    return draw(st.integers(2 if narrow else 1, 32)), signed, narrow


@st.composite
def cases(draw) -> tuple[torch.Tensor, torch.Tensor, int, bool, bool]:
    bits, signed, narrow = draw(ranges())
    shape = draw(SHAPES)
    per_channel = len(shape) > 1 and draw(st.booleans())
    scale_shape = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
    exponents = st.floats(-20, 20)
    scale = torch.tensor(
        [2.0 ** draw(exponents) for _ in range(math.prod(scale_shape))], dtype=torch.float64
    ).reshape(scale_shape)
    steps = st.one_of(
        st.floats(-(2.0**33), 2.0**33),
        st.floats(-300, 300),
        st.sampled_from(SPECIAL),
        st.integers(-(2**31), 2**31).map(lambda i: i + 0.5),
    )
    constant = draw(st.booleans())
    n = math.prod(shape)
    numbers = [draw(steps)] * n if constant else [draw(steps) for _ in range(n)]
    x = torch.tensor(numbers, dtype=torch.float64).reshape(shape) * scale
    return x, scale, bits, signed, narrow


def bounds(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


@given(cases(), st.integers(0, 40))
def test_result_is_the_nearest_point_of_the_grid(case, zero) -> None:
    x, scale, bits, signed, narrow = case
    low, high = bounds(bits, signed, narrow)
    zero_point = torch.tensor(float(min(max(zero, low), high)), dtype=torch.float64)
    width = torch.tensor(float(bits), dtype=torch.float64)
    quantize = IntQuant(narrow, signed)
    x = x.clone().requires_grad_()
    y = quantize(scale, zero_point, width, x)
    assert y.shape == x.shape
    with torch.no_grad():
        exact = x / scale + zero_point
        q = (y / scale + zero_point).round()
        assert torch.equal((q - zero_point) * scale, y)  # on the grid
        assert bool(((q >= low) & (q <= high)).all())  # within the range
        error = (q - exact.clamp(low, high)).abs()
        assert bool((error <= 0.5).all())  # the nearest point
        even = (q.remainder(2) == 0) | (q == low) | (q == high)
        assert bool((even | (error < 0.5)).all())  # ties go to even
        assert torch.equal(quantize(scale, zero_point, width, y), y)  # idempotent
    y.sum().backward()
    with torch.no_grad():
        rounded = (x / scale + zero_point).round()
        inside = (rounded >= low) & (rounded <= high)
        assert torch.equal(x.grad, inside.double())


@given(cases())
def test_float32_stays_in_range_at_every_width(case) -> None:
    x, scale, bits, signed, narrow = case
    low, high = bounds(bits, signed, narrow)
    s = scale.float()
    y = IntQuant(narrow, signed)(s, torch.zeros(()), torch.tensor(float(bits)), x.float())
    assert bool(torch.isfinite(y).all())
    q = (y.double() / s.double()).round()
    assert bool(((q >= low - 1e-7 * abs(low)) & (q <= high + 1e-7 * high)).all())
    integers = IntQuant(narrow, signed).to_int(
        s, torch.zeros(()), torch.tensor(float(bits)), x.float()
    )
    assert bool(((integers.double() >= low) & (integers.double() <= high)).all())


def test_nan_passes_through_and_infinity_saturates() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    y = IntQuant(True, True)(torch.tensor(0.5), torch.zeros(()), torch.tensor(4.0), x)
    assert y[0].isnan()
    assert y[1:].tolist() == [3.5, -3.5, 1.0]
