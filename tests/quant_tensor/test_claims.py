"""What a record claims of its grid is so: types without 0, zero points out of range, scales that only look alike."""

import pytest
import torch
from exact_tensors import integers, make
from torch.nn import functional as F

from qframework.layers import QuantIdentity
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import SignedBinaryActPerTensorConst, SignedTernaryActPerTensorConst

SHAPE = (1, 2, 4, 4)


def binary(*shape: int, only: float | None = None) -> IntQuantTensor:
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    value = signs if only is None else torch.full(shape, only)
    return IntQuantTensor(value * 0.5, 0.5, 0, 1, signed=True)


WIDENING = [
    ("sum", lambda x: x.sum((2, 3)), lambda q: q.sum((2, 3))),
    ("one", lambda x: x[:, :, :1].sum(2), lambda q: q[:, :, :1].sum(2)),
    ("mean", lambda x: x.mean((2, 3)), lambda q: q.sum((2, 3))),
    ("add", lambda x: x + x, lambda q: q + q),
    ("subtract", lambda x: x - (-x), lambda q: q + q),
    ("multiply", lambda x: x * x, lambda q: q * q),
    ("negate", lambda x: -x, lambda q: -q),
    ("average", lambda x: F.avg_pool2d(x, 2), lambda q: F.avg_pool2d(q, 2) * 4),
    ("padded", lambda x: F.avg_pool2d(x, 2, 2, 1), lambda q: F.avg_pool2d(q, 2, 2, 1) * 4),
    ("matmul", lambda x: torch.matmul(x, x), lambda q: torch.matmul(q, q)),
    ("difference", lambda x: (x - x).masked_fill(x.value > 0, 0), lambda q: q - q),
]


@pytest.mark.parametrize("only", [None, -1.0, 1.0])
@pytest.mark.parametrize(("name", "function", "exact"), WIDENING, ids=[w[0] for w in WIDENING])
def test_sums_of_minus_one_and_one_have_the_bits_that_they_need(
    name, function, exact, only
) -> None:
    x = binary(*SHAPE, only=only)
    got = function(x)
    assert isinstance(got, IntQuantTensor) and got.has_zero
    expected = exact(x.value / 0.5)
    bits = float(got.bit_width)
    assert float(expected.min()) >= -(2.0 ** (bits - 1))
    assert float(expected.max()) <= 2.0 ** (bits - 1) - 1
    assert torch.equal(got.value / got.scale, expected)


ZEROS = [
    lambda x: F.relu(x),
    lambda x: F.pad(x, (1, 1)),
    lambda x: F.unfold(x, 2, padding=1),
    lambda x: x.masked_fill(x.value > 0, 0),
    lambda x: torch.where(x.value > 0, 0.0, x),
    lambda x: x.clamp(min=0),
]


@pytest.mark.parametrize("function", ZEROS)
def test_zeros_leave_a_grid_of_minus_one_and_one(function) -> None:
    assert type(function(binary(*SHAPE))) is torch.Tensor
    layer = QuantIdentity(SignedBinaryActPerTensorConst, return_quant_tensor=True)
    x = layer(torch.randn(SHAPE))
    assert not x.has_zero
    assert type(function(x)) is torch.Tensor
    layer = QuantIdentity(SignedTernaryActPerTensorConst, return_quant_tensor=True)
    got = function(layer(torch.randn(SHAPE)))
    assert isinstance(got, IntQuantTensor) and got.is_valid


def test_a_padded_convolution_of_binary_values_is_exact() -> None:
    x, w = binary(*SHAPE), binary(3, 2, 3, 3)
    got = F.conv2d(x, w, padding=1)
    assert torch.equal(integers(got), F.conv2d(x.value / 0.5, w.value / 0.5, padding=1).double())


def test_another_width_or_zero_point_may_lose_zero() -> None:
    x = make(SHAPE, bits=4)
    assert x.has_zero and not x.set(bit_width=1).has_zero and x.set(bit_width=9).has_zero
    assert x.set(bit_width=1, signed=False).has_zero
    shifted = make(SHAPE, signed=False, zero=9)
    assert shifted.has_zero and not shifted.set(bit_width=3).has_zero
    assert not shifted.set(zero_point=300).has_zero
    assert type(F.relu(shifted.set(zero_point=300))) is torch.Tensor


def test_one_scale_with_other_widths_or_zero_points_is_not_one_grid() -> None:
    source = object()
    mask = torch.rand(SHAPE) > 0.5
    x = make(SHAPE).set(source=source)
    narrow, wide = x + x, x.sum(1, keepdim=True).expand(SHAPE) + x
    assert narrow.source == wide.source
    assert type(torch.where(mask, narrow, wide)) is torch.Tensor
    u = make(SHAPE, signed=False, zero=3).set(source=source)
    assert type(torch.where(mask, -u, u - u)) is torch.Tensor
    same = torch.where(mask, x, x.flip(0))
    assert torch.equal(integers(same), torch.where(mask, integers(x), integers(x).flip(0)))


def test_windows_cut_short_need_a_whole_zero_point() -> None:
    options = {"ceil_mode": True, "divisor_override": 3}
    whole, half = (make((1, 1, 5, 5), signed=False, zero=z) for z in (2.0, 2.5))
    got = F.avg_pool2d(whole, 2, **options)
    sums = F.avg_pool2d(integers(whole) - 2, 2, **options) * 3
    assert torch.equal(integers(got), sums.round() + 4 * 2)
    assert type(F.avg_pool2d(half, 2, **options)) is torch.Tensor


def test_numpy_names_of_axes_are_understood_and_the_mean_of_nothing_is_a_float() -> None:
    x = make(SHAPE)
    assert torch.equal(
        integers(torch.sum(x, axis=1, keepdims=True)), integers(x).sum(1, keepdim=True)
    )
    assert torch.equal(integers(x.amax(axis=1)), integers(x).amax(1))
    assert type(x[:0].mean(0)) is torch.Tensor
    assert integers(x[:0].sum(0)).abs().max() == 0
