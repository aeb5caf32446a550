"""Sums, means, extremes, choices and clamps, against the same on exact integers."""

import pytest
import torch
from exact_tensors import integers, make, per_channel
from torch.nn import functional as F

from qframework.quant_tensor import IntQuantTensor

SHAPE = (2, 3, 4, 4)


@pytest.mark.parametrize("dim", [None, 0, -1, (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(("signed", "zero"), [(True, 0.0), (False, 5.0)])
def test_sums_and_means_are_those_of_integers(dim, keepdim, signed, zero) -> None:
    q = make(SHAPE, signed=signed, zero=zero)
    options = {} if dim is None else {"dim": dim, "keepdim": keepdim}
    total = integers(q).sum(**options)
    for got in (q.sum(**options), torch.sum(q, **options), q.mean(**options)):
        assert isinstance(got, IntQuantTensor) and got.shape == total.shape
        assert torch.equal(integers(got), total)
    count = q.numel() // max(total.numel(), 1)
    assert float(q.sum(**options).bit_width) <= 8 + torch.tensor(float(count)).log2().ceil()


@pytest.mark.parametrize("signed", [True, False])
def test_a_sum_is_wide_enough_for_the_worst_case_and_no_wider(signed) -> None:
    low, high = (-8, 7) if signed else (0, 15)
    for value in (low, high):
        q = IntQuantTensor(torch.full((5,), float(value)), 1.0, 0.0, 4.0, signed)
        total = q.sum()
        assert total.is_valid and int(total.int()) == 5 * value
    bits = float(total.bit_width)
    assert 5 * max(-low - 1, high) >= 2 ** (bits - 1 - signed)


def test_scales_per_channel_stay_where_other_axes_go() -> None:
    q = make(SHAPE, scale=per_channel(SHAPE, 1))
    total = q.sum((0, 2, 3))
    assert isinstance(total, IntQuantTensor) and total.scale.shape == (3,)
    assert torch.equal(integers(total), integers(q).sum((0, 2, 3)))
    assert type(q.sum(1)) is torch.Tensor and type(q.sum()) is torch.Tensor
    assert torch.equal(integers(q.amax((2, 3))), integers(q).amax((2, 3)))


@pytest.mark.parametrize("name", ["amax", "amin", "max", "min"])
def test_extremes_keep_the_grid(name) -> None:
    q = make(SHAPE)
    got, expected = getattr(q, name)(1), getattr(integers(q), name)(1)
    if name in ("max", "min"):
        assert torch.equal(got.indices, expected.indices)
        got, expected = got.values, expected.values
    assert torch.equal(integers(got), expected)
    assert torch.equal(integers(getattr(q, name)()), getattr(integers(q), name)())


def test_clamping_to_points_of_the_grid_keeps_it() -> None:
    q = make(SHAPE, scale=0.125)
    for got, low, high in (
        (q.clamp(-1, 2), -8, 16),
        (q.clamp(min=0), 0, None),
        (torch.clamp_max(q, 0.5), None, 4),
    ):
        assert isinstance(got, IntQuantTensor)
        assert torch.equal(integers(got), integers(q).clamp(low, high))
    assert type(q.clamp(-1, 0.3)) is torch.Tensor
    assert type(q.clamp(min=1e6)) is torch.Tensor  # beyond what 8 bits hold
    assert torch.equal(integers(q.clamp(-1e6, 1e6)), integers(q))
    assert type(make(SHAPE, signed=False, zero=2.5).clamp(min=0)) is torch.Tensor


@pytest.mark.parametrize(
    ("scale", "bits", "kept"), [(0.5, 8, True), (0.35, 8, False), (0.35, 4, True)]
)
def test_clipping_functions_keep_a_grid_that_holds_their_bounds(scale, bits, kept) -> None:
    q = make(SHAPE, bits=bits, signed=False, scale=scale)
    got = F.relu6(q)
    assert isinstance(got, IntQuantTensor) == kept
    plain = got.value if kept else got
    assert torch.equal(plain, F.relu6(q.value))
    if kept:
        assert torch.equal(integers(got), integers(q).clamp(0, round(6 / scale)))
    symmetric = make(SHAPE, bits=8, scale=scale)
    assert isinstance(F.hardtanh(symmetric), IntQuantTensor) == (scale == 0.5)
    assert isinstance(F.hardtanh(symmetric, -7 * scale, 11 * scale), IntQuantTensor)
    far = make(SHAPE, bits=8, scale=scale, signed=False, zero=2.5)
    assert type(F.relu6(far)) is torch.Tensor


def test_zeros_may_be_filled_in_where_they_are_on_the_grid() -> None:
    q, mask = make(SHAPE), torch.rand(SHAPE) > 0.5
    for got in (q.masked_fill(mask, 0), torch.where(mask, 0.0, q), torch.where(~mask, q, 0)):
        assert isinstance(got, IntQuantTensor)
        assert torch.equal(integers(got), integers(q).masked_fill(mask, 0))
    assert type(q.masked_fill(mask, 0.01)) is torch.Tensor
    assert type(make(SHAPE, signed=False, zero=2.5).masked_fill(mask, 0)) is torch.Tensor


def test_a_choice_between_two_tensors_of_one_grid_is_on_it() -> None:
    a, b, mask = make(SHAPE), make(SHAPE, seed=1), torch.rand(SHAPE) > 0.5
    got = torch.where(mask, a, b)
    assert torch.equal(integers(got), torch.where(mask, integers(a), integers(b)))
    assert torch.equal(integers(a.where(mask, b)), integers(got))
    other = make(SHAPE, scale=0.25)
    assert type(torch.where(mask, a, other)) is torch.Tensor


@pytest.mark.parametrize("dims", [1, 3])
def test_average_pooling_of_other_dimensions_is_exact(dims) -> None:
    q = make((1, 2, *[4] * dims), signed=False)
    pool, adaptive = getattr(F, f"avg_pool{dims}d"), getattr(F, f"adaptive_avg_pool{dims}d")
    for got, area in ((pool(q, 2), 2**dims), (adaptive(q, 1), 4**dims)):
        assert isinstance(got, IntQuantTensor)
        window = round(area ** (1 / dims))
        assert torch.equal(integers(got), (pool(integers(q), window) * area).round())


def test_windows_are_movements() -> None:
    q = make((1, 2, 5, 5))
    assert torch.equal(integers(F.unfold(q, 3, padding=1)), F.unfold(integers(q), 3, padding=1))
    assert torch.equal(integers(q.unfold(2, 3, 1)), integers(q).unfold(2, 3, 1))
