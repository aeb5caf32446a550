"""Arithmetic on quantized tensors against Python's integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframework.quant_tensor import IntQuantTensor

SCALE = 0.125  # a power of two, so that values are exact


def make(
    integers: list[int], zero: int, bits: int, signed: bool, scale: float = SCALE
) -> IntQuantTensor:
    q = torch.tensor(integers, dtype=torch.float64)
    return IntQuantTensor((q - zero) * scale, scale, float(zero), float(bits), signed)


@st.composite
def operands(draw, zero_points: bool) -> tuple[list[int], int, int, bool]:
    signed, bits = draw(st.booleans()), draw(st.integers(1, 8))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    integers = draw(
        st.lists(
            st.one_of(st.integers(low, high), st.sampled_from([low, high])), min_size=4, max_size=4
        )
    )
    zero = draw(st.integers(low, high)) if zero_points else 0
    return integers, zero, bits, signed


def check(result: IntQuantTensor, expected: list[int], zero: int) -> None:
    """The integers are those that Python computes, and fit the declared type."""
    q = (result.value / result.scale + result.zero_point).tolist()
    assert q == expected
    assert result.zero_point.item() == zero
    bits = result.bit_width.item()
    assert bits == int(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if result.signed else (0, 2**bits - 1)
    assert all(low <= e <= high for e in expected)
    if bits > 1:
        assert result.is_valid
        assert result.int().tolist() == expected


@given(operands(True), operands(True))
def test_sum_and_difference(a, b) -> None:
    x, y = make(*a), make(*b)
    check(x + y, [p + q for p, q in zip(a[0], b[0], strict=True)], a[1] + b[1])
    check(x - y, [p - q for p, q in zip(a[0], b[0], strict=True)], a[1] - b[1])
    check(torch.add(x, y), [p + q for p, q in zip(a[0], b[0], strict=True)], a[1] + b[1])
    check(torch.sub(x, y), [p - q for p, q in zip(a[0], b[0], strict=True)], a[1] - b[1])


@given(operands(True))
def test_negation_with_a_zero_point(a) -> None:
    x = make(*a)
    check(-x, [-p for p in a[0]], -a[1])
    assert torch.equal((-x).value, -x.value)
    assert torch.equal((x - x).value, torch.zeros(4, dtype=torch.float64))


@given(operands(False), operands(False))
def test_product_without_zero_points(a, b) -> None:
    check(make(*a) * make(*b), [p * q for p, q in zip(a[0], b[0], strict=True)], 0)


@given(operands(False))
def test_absolute_value(a) -> None:
    check(abs(make(*a)), [abs(p) for p in a[0]], 0)


@given(operands(True), st.integers(-20, 20))
def test_a_number_moves_the_zero_point(a, steps) -> None:
    number = steps * SCALE
    x = make(*a)
    expected = x.value + number
    for result in (
        x + number,
        number + x,
        x + torch.tensor(number),
        torch.tensor(number) + x,
        x - -number,
    ):
        assert isinstance(result, IntQuantTensor)
        assert torch.equal(result.value, expected)
        assert (result.value / result.scale + result.zero_point).tolist() == a[0]
    assert torch.equal((number - x).value, number - x.value)
    assert torch.equal((torch.tensor(number) - x).value, number - x.value)


def test_eight_bits_and_eight_bits_are_nine() -> None:
    a, b = make([-128, 127], 0, 8, True), make([-128, 127], 0, 8, True)
    assert (a + b).bit_width.item() == 9
    assert (a - b).bit_width.item() == 9
    assert (a * b).bit_width.item() == 16
    c = make([0, 255], 0, 8, False)
    assert (c - c).bit_width.item() == 10
    assert (c + c).bit_width.item() == 9
    assert (a + c).bit_width.item() == 10


def test_the_most_negative_integer_has_a_negative_and_a_magnitude() -> None:
    """-(-128) = 128 needs nine bits signed; |-128| = 128 eight bits unsigned."""
    x = make([-128, 5], 0, 8, True)
    assert (-x).int().tolist() == [128, -5]
    assert abs(x).int().tolist() == [128, 5]
    assert abs(x).int().dtype == torch.uint8


def test_magnitudes_of_shifted_integers_are_floats() -> None:
    x = make([0, 3, 200], 7, 8, False)
    assert type(abs(x)) is torch.Tensor
    assert torch.equal(abs(x), x.value.abs())


def test_floats_times_integers_are_floats() -> None:
    x = make([1, 2], 0, 4, True)
    for result in (x * 2.5, 2.5 * x, x / 2.0, x * torch.ones(2), torch.ones(2) / x, 1 / x):
        assert type(result) is torch.Tensor
    assert torch.equal(2.5 * x, x.value * 2.5)


def test_quotient_has_the_scale_of_a_fixed_point_quotient() -> None:
    a, b = make([6, -4], 0, 8, True), make([1, 2], 0, 4, True, scale=0.5)
    quotient = a / b
    assert quotient.scale.item() == pytest.approx(SCALE / (0.5 * 2**3))
    assert quotient.bit_width.item() == 12
    assert torch.equal(quotient.value, a.value / b.value)


def test_different_scales_are_refused_in_evaluation_with_a_remedy() -> None:
    a, b = make([1, 2], 0, 4, True), make([1, 2], 0, 4, True, scale=0.25)
    for combine in (lambda: a + b, lambda: a - b, lambda: torch.cat([a, b])):
        with pytest.raises(
            RuntimeError, match=r"different scales: 0.125 and 0.25.*act_quant=other.act_quant"
        ):
            combine()


def test_different_scales_in_training_give_their_mean_and_an_honest_is_valid() -> None:
    a, b = make([1, 3], 0, 4, True).set(training=True), make([1, 1], 0, 4, True, scale=0.3)
    total = a + b
    assert total.scale.item() == pytest.approx((0.125 + 0.3) / 2)
    assert total.training
    assert not total.is_valid


def test_products_of_shifted_tensors_are_refused() -> None:
    a, b = make([1, 2], 1, 4, False), make([1, 2], 0, 4, False)
    for combine in (lambda: a * b, lambda: a / b):
        with pytest.raises(RuntimeError, match="zero points"):
            combine()


def test_gradients_flow_through_value_scale_and_width() -> None:
    value, scale = torch.randn(3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    bits = torch.tensor(4.0, requires_grad=True)
    x = IntQuantTensor.unchecked(value, scale, torch.zeros(()), bits, True, False, None, True)
    y = (x + x) * x
    (y.value.sum() + y.scale + y.bit_width).backward()
    torch.testing.assert_close(value.grad, 4 * value.detach())
    assert scale.grad.item() == pytest.approx(2 * 0.5)
    assert bits.grad.item() > 0
