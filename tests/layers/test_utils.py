"""Helpers around layers."""

import copy

import pytest
import torch
from torch import nn

from qframework.layers import QuantConv2d
from qframework.layers.utils import (
    check_tensors_same_ptr,
    merge_bn,
    rename_state_dict_by_postfix,
    rename_state_dict_by_prefix,
)


def norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, affine=affine)
    bn(torch.randn(8, channels, 4, 4) * 3 + 1)
    if affine:
        nn.init.uniform_(bn.weight)
        nn.init.uniform_(bn.bias)
    return bn.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("cls", "axis"), [(nn.Conv2d, 0), (nn.ConvTranspose2d, 1), (QuantConv2d, 0)]
)
def test_a_folded_batch_norm_changes_nothing(cls, axis, bias, affine) -> None:
    torch.manual_seed(0)
    how = {"weight_quant": None} if cls is QuantConv2d else {}
    layer, bn = cls(3, 4, 3, bias=bias, **how), norm(4, affine)
    x = torch.randn(2, 3, 6, 6)
    expected = bn(layer(x))
    merge_bn(layer, bn, axis)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("bn", [nn.BatchNorm2d(5), nn.BatchNorm2d(4, track_running_stats=False)])
def test_a_batch_norm_that_doesnt_fit_is_refused(bn) -> None:
    layer = nn.Conv2d(3, 4, 1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="4 output channels"):
        merge_bn(layer, bn)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_keys_are_renamed_in_place_and_in_order() -> None:
    state = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).state_dict()
    held, metadata = state, state._metadata
    rename_state_dict_by_prefix("0.", "linear.", state)
    rename_state_dict_by_postfix(".running_mean", ".mean", state)
    assert list(state) == [
        "linear.weight", "linear.bias", "1.weight", "1.bias", "1.mean", "1.running_var", "1.num_batches_tracked",
    ]  # fmt: skip
    assert state is held and state._metadata is metadata


def test_a_key_isnt_overwritten() -> None:
    state = {"a.weight": 1, "b.weight": 2}
    with pytest.raises(ValueError, match=r"'b\.weight' would be there twice"):
        rename_state_dict_by_prefix("a.", "b.", state)
    assert state == {"a.weight": 1, "b.weight": 2}


def test_tensors_that_share_memory() -> None:
    x = torch.ones(3)
    assert check_tensors_same_ptr([x, x.view(1, 3), x.detach()])
    assert not check_tensors_same_ptr([x, x.clone()])
