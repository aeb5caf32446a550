"""What stands beside a value may be computed when it is looked at: it is what it would have been at once."""

import copy
import pickle

import pytest
import torch

from qframework.layers import QuantConv2d, QuantIdentity
from qframework.quant_tensor import IntQuantTensor

FIELDS = ("scale", "zero_point", "bit_width")


def made() -> tuple[torch.Tensor, IntQuantTensor]:
    torch.manual_seed(0)
    layer = QuantConv2d(3, 4, 3, return_quant_tensor=True, bias=False)
    x = QuantIdentity(return_quant_tensor=True, collect_stats_steps=1)(torch.randn(2, 3, 6, 6))
    return layer.weight, layer(x)


def waits(y: IntQuantTensor) -> bool:
    return "_later" in vars(y)


def test_the_scale_of_a_product_waits_until_it_is_looked_at() -> None:
    _, y = made()
    assert waits(y)
    assert y.scale.dim() == 0 and float(y.bit_width) > 16 and float(y.zero_point) == 0
    assert not waits(y) and y.scale is y.scale


def test_what_doesnt_need_it_doesnt_look_at_it() -> None:
    _, y = made()
    assert (y + 0).dim() == 4 and y.shape == (2, 4, 4, 4) and y.signed
    assert waits(made()[1].replace(signed=True))


def test_records_of_one_value_share_what_is_found() -> None:
    _, y = made()
    other = y.replace(training=False)
    assert other.scale is y.scale and other.bit_width is y.bit_width


def test_a_replaced_field_stays_replaced() -> None:
    _, y = made()
    other = y.replace(scale=torch.tensor(3.0))
    assert float(other.bit_width) == float(y.bit_width) and float(other.scale) == 3


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_the_scale_has_its_gradient_wherever_it_is_looked_at_first(where) -> None:
    weight, y = made()
    with where():
        scale = y.scale
    assert torch.autograd.grad(scale, weight)[0].any()


def test_without_gradients_it_has_none_wherever_it_is_looked_at() -> None:
    with torch.no_grad():
        _, y = made()
    assert not y.scale.requires_grad


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    copy.copy,
    lambda y: pickle.loads(pickle.dumps(y)),
    lambda y: y.map_tensors(torch.clone),
])  # fmt: skip
def test_copies_are_whole(copied) -> None:
    with torch.no_grad():
        _, y = made()
    other = copied(y)
    for name in ("value", *FIELDS):
        assert torch.equal(getattr(other, name), getattr(y, name))
