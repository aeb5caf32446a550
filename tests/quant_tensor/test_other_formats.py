"""Tensors of minifloats, groups and codebooks: what keeps them, what lets them decay, what they refuse."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

import qframework.quantizers as q
from qframework.layers import QuantIdentity
from qframework.quant_tensor import (
    CodebookQuantTensor,
    FloatQuantTensor,
    GroupwiseFloatQuantTensor,
    GroupwiseIntQuantTensor,
    IntQuantTensor,
)


@torch.no_grad()
def make(name: str, *shape: int, **keywords) -> object:
    layer = QuantIdentity(getattr(q, name), return_quant_tensor=True, **keywords)
    layer(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return layer.eval()(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def fp8(*shape: int) -> FloatQuantTensor:
    out = make("Fp8e4m3OCPActPerTensorFloat", *shape)
    assert isinstance(out, FloatQuantTensor)
    return out


def mx(*shape: int) -> GroupwiseFloatQuantTensor:
    return make("MXFloat4e2m1Act", *shape, group_dim=-1, group_size=4)


def mxint(*shape: int) -> GroupwiseIntQuantTensor:
    return make("MXInt8OCPAct", *shape, group_dim=-1, group_size=4)


def apot(*shape: int) -> CodebookQuantTensor:
    return make("APoT4ActPerTensorFloat", *shape)


MOVES = {
    "reshape": lambda t: t.reshape(2, -1),
    "view": lambda t: t.view(-1),
    "flatten": lambda t: t.flatten(1),
    "transpose": lambda t: t.transpose(0, 1),
    "permute": lambda t: t.permute(3, 2, 1, 0),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "index": lambda t: t[0, 1:],
    "relu": F.relu,
    "max_pool": lambda t: F.max_pool2d(t, 2),
    "pad": lambda t: F.pad(t, (1, 1)),
    "interpolate": lambda t: F.interpolate(t, scale_factor=2, mode="nearest"),
    "cat": lambda t: torch.cat([t, t], 1),
    "negate": lambda t: -t,
    "abs": abs,
    "dropout": lambda t: F.dropout(t, 0.5, training=False),
}


@pytest.mark.parametrize("name", MOVES)
def test_movements_keep_minifloats(name) -> None:
    x = fp8(2, 4, 6, 6)
    got = MOVES[name](x)
    assert isinstance(got, FloatQuantTensor) and got.is_valid
    assert torch.equal(got.value, MOVES[name](x.value))


@pytest.mark.parametrize("function", [lambda t: t + 1, lambda t: 2 * t, lambda t: t - t, torch.sigmoid, lambda t: t / t.abs(), F.hardtanh, F.relu6, lambda t: F.linear(t, torch.ones(3, 6))])  # fmt: skip
@pytest.mark.parametrize("made", [fp8, mx, mxint, apot])
def test_arithmetic_decays_to_floats(function, made) -> None:
    x = made(2, 6)
    got = function(x)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, function(x.value), equal_nan=True)


@pytest.mark.parametrize("made", [mx, mxint, apot])
def test_groups_and_codebooks_keep_what_leaves_elements_in_place(made) -> None:
    x = made(2, 8)
    for function in (F.relu, lambda t: F.dropout(t, 0.5, training=False)):
        got = function(x)
        assert type(got) is type(x) and got.is_valid
    for moved in (x.reshape(-1), torch.cat([x, x]), x.t(), x.T, x.mT):
        assert type(moved) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_minifloats_are_valid_in_half_precision(dtype) -> None:
    largest = torch.tensor([448.0, -448.0])
    for scale in torch.logspace(-4, 0, 50):
        whole = FloatQuantTensor(largest * scale, scale, 0.0, 4, 3, 7, True, None, ("111",), True)
        assert whole.to(dtype).is_valid
        assert not whole.set(value=whole.value * 1.1).is_valid


@pytest.mark.parametrize("made", [mx, mxint])
def test_values_of_groups_that_were_filled_up_lie_as_others_do(made) -> None:
    assert made(2, 6).value.is_contiguous() and made(2, 6).view(3, 4).shape == (3, 4)


def test_integers_mixed_with_other_formats_decay() -> None:
    integers = make("Int8ActPerTensorFloat", 2, 8)
    assert isinstance(integers, IntQuantTensor)
    for other in (fp8(2, 8), mx(2, 8), mxint(2, 8), apot(2, 8)):
        for got in (
            integers + other,
            other + integers,
            integers * other,
            torch.cat([integers, other]),
        ):
            assert type(got) is torch.Tensor
        assert type(F.linear(integers, other)) is torch.Tensor
        assert type(F.linear(other, integers)) is torch.Tensor


def test_minifloats_of_different_scales_are_not_joined_as_one() -> None:
    assert type(torch.cat([fp8(2, 3), fp8(2, 3)])) is torch.Tensor


@pytest.mark.parametrize("made", [fp8, mx, mxint, apot])
def test_tensors_are_copied_moved_and_saved(made) -> None:
    x = made(2, 8)
    assert torch.equal(copy.deepcopy(x).value, x.value)
    assert x.to(torch.float64).dtype == torch.float64 and x.detach().is_valid
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    again = torch.load(file)
    assert type(again) is type(x) and torch.equal(again.value, x.value) and again.is_valid
    assert type(x).__name__ in repr(x)


def test_a_value_off_the_grid_is_seen() -> None:
    for made in (fp8, mx, mxint, apot):
        x = made(4, 8)
        bad = x.replace(value=x.value * 1.03)
        assert not bad.is_valid
    with pytest.raises(RuntimeError, match="not valid"):
        (x := fp8(4, 8)).replace(value=x.value * 1.03).codes()
    with pytest.raises(RuntimeError, match="not valid"):
        (x := mxint(2, 8)).replace(value=x.value + 0.5 * x.scale).int()


def test_groups_are_made_by_hand() -> None:
    value = torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.5, 0.5]])
    grouped = GroupwiseIntQuantTensor.from_expanded(value, 4, 1)
    scale = torch.tensor([[[1.0], [0.5]]])
    got = GroupwiseIntQuantTensor(grouped, scale, 0.0, 4, 1, 4.0, True, dequant_shape=(1, 6))
    assert got.is_valid and got.int().tolist() == [[1, -2, 3, 0, 1, 1]]
    assert got.scale.tolist() == [[1.0] * 4 + [0.5] * 2]
    with pytest.raises(ValueError, match="isn't grouped"):
        GroupwiseIntQuantTensor(value, scale, 0.0, 4, 1, 4.0, True)
    floats = GroupwiseFloatQuantTensor(
        grouped, scale, 0.0, 4, 1, 2.0, 1.0, 1.0, True, None, None, True, dequant_shape=(1, 6)
    )
    assert floats.is_valid and floats.codes().tolist() == [[2, 12, 5, 0, 2, 2]]


def test_minifloats_are_made_by_hand() -> None:
    x = FloatQuantTensor(torch.tensor([0.5, -6.0, 8.0]), 1.0, 0.0, 2, 1, 1, True, None, None, True)
    assert not x.is_valid
    assert x[:2].is_valid and x[:2].codes().tolist() == [1, 15]
    with pytest.raises(ValueError, match="scale must be positive"):
        FloatQuantTensor(torch.ones(2), 0.0, 0.0, 2, 1, 1, True, None, None, True)


@pytest.mark.slow
@pytest.mark.parametrize("made", [fp8, mx, apot])
def test_they_pass_through_a_compiler(made) -> None:
    x = made(2, 8)
    compiled = torch.compile(lambda t: F.relu(t), fullgraph=True)
    got = compiled(x)
    assert type(got) is type(x) and torch.equal(got.value, F.relu(x.value))


def test_in_training_minifloats_are_joined_on_the_mean_of_their_scales() -> None:
    """As integers are; in evaluation they become floats."""
    layer = QuantIdentity(q.Fp8e4m3OCPActPerTensorFloat, return_quant_tensor=True)
    one, other = layer(torch.randn(2, 3)), layer(4 * torch.randn(2, 3))
    joined = torch.cat([one, other])
    assert isinstance(joined, FloatQuantTensor) and joined.training
    assert torch.equal(joined.value, torch.cat([one.value, other.value]))
    torch.testing.assert_close(joined.scale, (one.scale + other.scale) / 2)
    parts = [t.replace(training=False, source=None) for t in (one, other)]
    assert type(torch.cat(parts)) is torch.Tensor
