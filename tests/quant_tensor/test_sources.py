"""What is known to lie on one scale, and what never may be taken for it."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from qframework.quant_tensor import IntQuantTensor, product_source


class Source:
    """Stands for a quantizer."""


def make(shape=(2, 4), scale=0.125, source=None, seed=0, bits=4, **fields) -> IntQuantTensor:
    q = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).double()
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return IntQuantTensor(q * scale, scale, 0.0, bits, True, source=source, **fields)


def per_axis(shape, axis) -> torch.Tensor:
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return (2.0 ** -torch.arange(1, shape[axis] + 1)).reshape(size)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x: x + x.t(),
        lambda x: x - x.transpose(0, 1),
        lambda x: x + x.T,
        lambda x: x[:, :2] + x[:, 2:],
        lambda x: torch.add(*x.chunk(2, 1)),
        lambda x: x + x.flip(1),
        lambda x: x + torch.roll(x, 1, 1),
        lambda x: x + x.reshape(2, 8).reshape(4, 4).mT,
    ],
)
def test_scales_that_moved_differently_are_not_one_scale(combine) -> None:
    x = make((4, 4), per_axis((4, 4), 1), Source())
    with pytest.raises(RuntimeError, match="scales"):
        combine(x)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.permute(1, 0),
        lambda x: x.permute([1, 0]),
        lambda x: x[:, 1:3],
        lambda x: x[..., None],
        lambda x: x.flatten(),
        lambda x: x.chunk(2, 1)[1],
        lambda x: F.pad(x, (1, 2)),
    ],
)
def test_scales_that_moved_alike_are_known_to_be_equal(move) -> None:
    source = Source()
    a, b = (make((4, 4), per_axis((4, 4), 1), source, seed) for seed in (0, 1))
    moved_a, moved_b = move(a), move(b)
    assert moved_a.source is not None
    assert moved_a.source == moved_b.source != a.source
    assert hash(moved_a.source) == hash(moved_b.source)
    assert (moved_a + moved_b).is_valid


def test_movements_that_cannot_be_named_leave_no_source() -> None:
    x = make((4, 4), per_axis((4, 4), 1), Source())
    assert x[:, torch.tensor([0, 2])].source is None
    one = make(source=Source())
    assert one[:, torch.tensor([0, 2])].source is one.source  # one scale doesn't move


LOWEST = torch.full((2, 4), -8.0, dtype=torch.float64) * 0.125


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda x: -x, "bit widths"),
        (lambda x: x + x, "bit widths"),
        (lambda x: x + 0.3, "zero points"),
        (lambda x: abs(x), "signed and unsigned"),
    ],
)
def test_results_of_one_source_are_joined_only_on_one_grid(join, other, difference) -> None:
    x = make(source=Source()).set(value=LOWEST)
    with pytest.raises(RuntimeError, match=difference):
        join([x, other(x)])
    assert (x + other(x)).value.shape == (2, 4)  # sums need one scale only


def test_joins_in_training_hold_every_part() -> None:
    x = make(source=Source()).set(value=LOWEST, training=True)
    for other in (x + x, -x, x + 0.3):
        joined = torch.cat([x, other])
        assert joined.is_valid
        assert torch.equal(joined.int(), torch.cat([x.int(), other.int()]).to(torch.int8))


def test_sums_of_products_know_their_scale_alone() -> None:
    x, w = make((2, 6), source=Source()), make((3, 6), source=Source(), seed=1)
    bias = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    plain, moved = F.linear(x, w), F.linear(x, w, bias)
    assert plain.source == moved.source != product_source(x, w)
    assert (plain + moved).is_valid
    with pytest.raises(RuntimeError, match="zero points"):
        torch.cat([plain, moved])


def test_a_bias_on_the_source_of_the_product_needs_no_look_at_its_scale() -> None:
    x, w = make((2, 6), source=Source()), make((3, 6), source=Source(), seed=1)
    scale = x.scale * w.scale
    for of in ((x, w), (-x, w)):
        bias = IntQuantTensor(
            torch.arange(3) * scale, scale, 0.0, 4, True, source=product_source(*of)
        )
        assert F.linear(x, w, bias).symmetric


def test_equal_sources_mean_nothing_in_training() -> None:
    source = Source()
    a, b = make(source=source, training=True), make(scale=0.25, source=source, training=True)
    assert (a + b).scale.item() == pytest.approx((0.125 + 0.25) / 2)


def test_changed_fields_take_back_what_was_known() -> None:
    x = make(source=Source())
    assert x.set(scale=0.25).source is None
    with pytest.raises(RuntimeError, match="different scales"):
        x + x.set(scale=0.25)
    shifted = x.set(zero_point=3)
    assert (shifted.symmetric, shifted.has_zero) == (False, True)
    assert x.set(zero_point=0.5).has_zero is False
    with pytest.raises(RuntimeError, match="zero points"):
        x * shifted
    with pytest.raises(RuntimeError, match="bit widths"):
        torch.cat([x, x.set(bit_width=8)])
    assert isinstance(x.set(bit_width=8).bit_width, torch.Tensor)
    assert x.set(value=x.value).source is x.source
    with pytest.raises(TypeError, match="bit_width must be a number or a tensor"):
        x.set(bit_width="8")


def test_a_source_is_kept_by_a_copy_of_the_whole_and_dropped_by_a_file() -> None:
    x = make(source="a name")
    assert copy.deepcopy(x).source == "a name"
    assert pickle.loads(pickle.dumps(x)).source is None


def test_scales_for_different_numbers_of_channels_are_told_apart_kindly() -> None:
    x, y = (make((2, n), per_axis((2, n), 1)) for n in (3, 5))
    with pytest.raises(RuntimeError, match=r"scales of shapes \(1, 3\) and \(1, 5\)"):
        torch.cat([x, y], 1)
