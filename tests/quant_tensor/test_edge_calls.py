"""Calls that torch allows, of quantized tensors without axes, by keywords, in text and in batches."""

import copy
import pickle

import pytest
import torch

from qframework.quant_tensor import IntQuantTensor

ONE = IntQuantTensor(torch.tensor(1.5), 0.5, 0, 4, True)
SOME = IntQuantTensor(torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -0.5]]), 0.5, 0, 4, True)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("name", ["sum", "mean", "amax", "amin", "max", "min"])
def test_a_number_without_axes_is_reduced_along_its_only_one(name, dim) -> None:
    found, expected = getattr(ONE, name)(dim), getattr(ONE.value, name)(dim)
    found, expected = (r[0] if isinstance(r, tuple) else r for r in (found, expected))
    assert isinstance(found, IntQuantTensor) and torch.equal(found.value, expected)
    assert found.is_valid


@pytest.mark.parametrize("name", ["sum", "mean", "amax", "max"])
def test_an_axis_that_isnt_there_is_refused_as_by_torch(name) -> None:
    for q in (ONE, SOME):
        with pytest.raises(IndexError):
            getattr(q, name)(4)


def test_a_view_of_the_same_bits_is_a_plain_tensor() -> None:
    for found in (SOME.view(dtype=torch.int32), SOME.view(torch.int32)):
        assert type(found) is torch.Tensor and torch.equal(found, SOME.value.view(torch.int32))
    assert isinstance(SOME.view(3, 2), IntQuantTensor)


def test_where_takes_keywords() -> None:
    found = torch.where(condition=SOME.value > 0, input=SOME, other=0)
    assert isinstance(found, IntQuantTensor)
    assert torch.equal(found.value, torch.where(SOME.value > 0, SOME.value, 0))
    other = torch.where(SOME.value > 0, input=SOME, other=SOME)
    assert torch.equal(other.value, SOME.value)


def test_one_number_is_formatted_as_a_number() -> None:
    assert f"{ONE:.2f}" == "1.50"
    assert f"{SOME}" == repr(SOME)
    with pytest.raises(TypeError):
        format(SOME, ".2f")


def test_samples_are_collated() -> None:
    found = torch.utils.data.default_collate([SOME, SOME])
    assert isinstance(found, IntQuantTensor) and found.shape == (2, 2, 3)
    pairs = torch.utils.data.default_collate([(SOME, 1), (SOME, 2)])
    assert isinstance(pairs[0], IntQuantTensor) and pairs[1].tolist() == [1, 2]


def test_one_number_beside_the_value_prints_in_full() -> None:
    scale = torch.tensor(0.018651068210601807)
    text = repr(IntQuantTensor(torch.zeros(2), scale, 0.0, 8.0, True))
    assert "scale=0.018651068210601807, zero_point=0.0, bit_width=8.0" in text
    learned = IntQuantTensor(torch.zeros(2), scale.requires_grad_() * 1, 0.0, 8.0, True)
    assert "scale=0.018651068210601807" in repr(learned)


def test_codes_that_a_value_is_too_coarse_for_move_with_it() -> None:
    codes = torch.arange(250.0, 256.0).reshape(2, 3)
    scale = torch.tensor(2.02 / 255)
    value = (codes * scale).bfloat16()
    q = IntQuantTensor(value, scale, 0.0, 8.0, False).with_codes(codes)
    assert len(value.unique()) < 6  # two codes, one value
    for found, expected in (
        (q, codes),
        (q.reshape(3, 2), codes.reshape(3, 2)),
        (q.T, codes.T),
        (q[0, 1:], codes[0, 1:]),
        (q.transpose(0, 1).flatten(), codes.T.flatten()),
        (q.chunk(2)[1], codes[1:]),
        (q.detach().clone(), codes),
        (copy.deepcopy(q), codes),
        (pickle.loads(pickle.dumps(q)), codes),
    ):
        assert found.is_valid and torch.equal(found.int().float(), expected)


def test_without_known_codes_an_integer_in_range_that_is_the_value_is_found() -> None:
    scale = torch.tensor(2.02 / 255)
    value = (torch.arange(256.0) * scale).bfloat16()
    q = IntQuantTensor(value, scale, 0.0, 8.0, False)
    assert q.is_valid
    assert torch.equal((q.int().float() * scale).bfloat16(), value)


def test_elements_are_taken_along_no_axis_with_a_scale_for_each_row() -> None:
    scale = torch.tensor([[0.5], [0.25]])
    q = IntQuantTensor(torch.tensor([[0.5, -1.0], [0.25, 1.0]]), scale, 0.0, 4.0, True)
    taken = torch.take_along_dim(q, torch.tensor([3, 0]))
    assert taken.is_valid and torch.equal(taken.value, torch.tensor([1.0, 0.5]))
    assert torch.equal(taken.scale, torch.tensor([0.25, 0.5]))
