"""Quantization by scales that are known, against its definition: values bit for bit, gradients within 1e-6 of those in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import assert_as_defined, gradients, kept_by, values

import qframework
from qframework.core.bit_width import BitWidthConst
from qframework.core.quant import IntQuant, PrescaledRestrictIntQuant
from qframework.functional import ROUNDINGS, IntegerGrid, fake_quantize
from qframework.kernels import prepare
from qframework.kernels.integer import _first_outside
from qframework.kernels.native import tensors

GRANULARITIES = {"tensor": (), "channel": (5, 1), "element": (5, 7)}
LARGE = (9, 37, 1021)  # many pieces for C++ functions, with a ragged end


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> Iterator[None]:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param):
        yield


def operands(dtype: torch.dtype, granularity: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = GRANULARITIES[granularity]
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.3
    zero_point = torch.randint(0, 4, shape, generator=generator).double()
    bounds = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(7.0, dtype=torch.float64)]
    return [t.to(dtype).requires_grad_() for t in (x, scale, zero_point, *bounds)]


def upstream(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(5, 7, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("granularity", "rounding", "clamp_gradient"),
    list(itertools.product(GRANULARITIES, ROUNDINGS, [True, False])),
)
def test_learned_bounds_have_the_gradients_of_the_definition(
    granularity, rounding, clamp_gradient, dtype
) -> None:
    ours, theirs = operands(dtype, granularity), operands(dtype, granularity)
    found = []
    for kernels, leaves in ((qframework.settings.kernels, ours), ("reference", theirs)):
        x, scale, zero_point, *bounds = leaves
        with qframework.settings.use(kernels=kernels):
            y = fake_quantize(x, scale, zero_point, IntegerGrid(*bounds, rounding, clamp_gradient))
        found.append((y, gradients([y], leaves, [upstream(dtype)])))
    (y, mine), (z, others) = found
    assert torch.equal(y, z)  # bit for bit
    for a, b in zip(mine, others, strict=True):
        # The fused scale gradient sums the small differences, the composed one large terms that cancel.
        top = max(b.abs().max().item(), upstream().abs().sum().item())
        assert (a - b).abs().max().item() <= 1e-6 * top


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("rounding", "clamp_gradient"), list(itertools.product(ROUNDINGS, [True, False]))
)
def test_bounds_that_are_numbers_equal_those_that_are_tensors(
    rounding, clamp_gradient, granularity
) -> None:
    x, scale, *_ = operands(torch.float64, granularity)
    fixed = IntegerGrid(-4.0, 3.0, rounding, clamp_gradient)
    zero, low, high = (torch.tensor(v, dtype=torch.float64) for v in (0.0, -4.0, 3.0))
    general = IntegerGrid(low, high, rounding, clamp_gradient)
    y_fixed = fake_quantize(x, scale, None, fixed)
    y_general = fake_quantize(x, scale, zero, general)
    assert torch.equal(y_fixed, y_general)
    for a, b in zip(
        torch.autograd.grad(y_fixed, (x, scale), upstream()),
        torch.autograd.grad(y_general, (x, scale), upstream()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, scale, None, fixed), y_fixed)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bounds", [(-8.0, 7.0), (0.0, 15.0), (0.0, 14.0), (-7.0, 7.0)])
@pytest.mark.parametrize("clamp_gradient", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_range(bounds, clamp_gradient, relu, shape) -> None:
    grid = IntegerGrid(*bounds, "round", clamp_gradient)
    assert_as_defined(
        lambda x, scale: fake_quantize(x, scale, None, grid, relu),
        values(*shape),
        torch.tensor(0.25),
    )


@pytest.mark.parametrize("clamp_gradient", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_range_with_a_zero_point(clamp_gradient, shape) -> None:
    grid = IntegerGrid(0.0, 15.0, "round", clamp_gradient)
    assert_as_defined(
        lambda x, scale, zero: fake_quantize(x, scale, zero, grid),
        values(*shape),
        torch.tensor(0.25),
        torch.tensor(6.0),
        tolerance=2e-6,  # the summands are integers up to 9
    )


@pytest.mark.parametrize("learned_bounds", [False, True])
@pytest.mark.parametrize("scale_learns", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_zero_point_that_cancels_out_has_a_gradient_of_zeros(
    shape, scale_learns, learned_bounds
) -> None:
    # None would be another thing to optimizers with weight decay, and an error in torch.autograd.grad
    x, zero = values(*shape), torch.tensor(6.0, requires_grad=True)
    scale = torch.tensor(0.25, requires_grad=scale_learns)
    bounds = (torch.tensor(0.0), torch.tensor(15.0)) if learned_bounds else (0.0, 15.0)
    grid = IntegerGrid(*bounds, "round", False)
    y = fake_quantize(x, scale, zero, grid)
    (found,) = torch.autograd.grad(y.square().sum(), [zero])
    assert torch.equal(found, torch.zeros(()))


def test_a_relu_is_the_same_as_one_in_front() -> None:
    x, scale, *_ = operands(torch.float64, "tensor")
    for grid in (IntegerGrid(0.0, 5.0), IntegerGrid(-5.0, 5.0), IntegerGrid(0.0, 5.0, "ceil")):
        inside, before = (
            fake_quantize(x, scale, None, grid, relu=True),
            fake_quantize(torch.relu(x), scale, None, grid),
        )
        assert torch.equal(inside, before)
        for a, b in zip(
            gradients([inside], [x, scale], [upstream()]),
            gradients([before], [x, scale], [upstream()]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_channels_last_gives_the_same() -> None:
    x = values(8, 16, 64, 64)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(memory_format=order).requires_grad_()
        scale = torch.tensor(0.25, requires_grad=True)
        y = fake_quantize(leaf, scale, None, IntegerGrid(0.0, 15.0), relu=True)
        found.append((y, torch.autograd.grad((y * y.detach().sin()).sum(), (leaf, scale))))
    (y, (grad, of_scale)), (z, (other, of_other)) = found
    assert torch.equal(y, z) and y.stride() != z.stride()
    assert torch.equal(grad, other)
    torch.testing.assert_close(of_scale, of_other, rtol=1e-6, atol=0)


def test_one_tensor_is_kept_for_the_backward_pass() -> None:
    x, scale = torch.randn(64, 64, requires_grad=True) * 1.0, torch.tensor(0.1, requires_grad=True)
    kept = kept_by(lambda: fake_quantize(x, scale, None, IntegerGrid(0.0, 255.0), relu=True))
    assert sorted(t.numel() for t in kept) == [1, 4096]


@given(st.integers(0, 2**24 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_the_bound_of_a_mask_is_the_first_number_that_rounds_beyond_the_range(
    maximum, dtype
) -> None:
    bound = torch.tensor(_first_outside(float(maximum), dtype), dtype=torch.float64)
    assert bound == bound.to(dtype)
    before = torch.nextafter(bound.to(dtype), torch.tensor(0.0, dtype=dtype))
    assert bound.to(dtype).round() > maximum >= before.round()


@pytest.mark.parametrize("bits", [8, 24, 25, 26, 31, 32, 33, 53, 54, 55, 64])
@pytest.mark.parametrize("width_dtype", [torch.float32, torch.float64])
def test_biases_of_any_width_end_where_the_dtype_of_the_width_does(bits, width_dtype) -> None:
    power, count = 2.0 ** (bits - 1), 24
    ends = [power, power - 1, -power, 1 - power, power * (1 - 2.0**-24), 2 * power]
    for signed, narrow, dtype in itertools.product(
        (True, False), (True, False), (torch.float32, torch.float64, torch.bfloat16)
    ):
        quantizer = PrescaledRestrictIntQuant(
            IntQuant(narrow, signed), BitWidthConst(bits, dtype=width_dtype)
        )
        plan = prepare(quantizer)
        assert plan.form is not None
        torch.manual_seed(bits)
        x = torch.randn(count, dtype=torch.float64) * power * 0.8
        x[: len(ends)] = torch.tensor(ends, dtype=torch.float64)
        x = x.to(dtype).requires_grad_()
        for shape in ((), (count,)):
            scale = torch.full(shape, 0.75, dtype=torch.promote_types(dtype, torch.float32))
            scale.requires_grad_()
            values, *rest = plan.run(x, scale)
            right, *expected = quantizer(x, scale)
            assert torch.equal(values, right)
            assert all(map(torch.equal, rest, expected))
            grad = torch.randn_like(values)
            found = torch.autograd.grad(values, (x, scale), grad)
            wanted = torch.autograd.grad(right, (x, scale), grad)
            close = 1e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(found[0], wanted[0], rtol=close, atol=0)
            summands = (grad.double() * x.detach().double()).abs().sum()
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6 * float(summands))
