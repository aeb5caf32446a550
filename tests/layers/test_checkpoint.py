"""torch.utils.checkpoint: a forward pass that runs again inside the backward pass counts nothing twice."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qframework.layers import QuantConv2d, QuantIdentity, QuantReLU
from qframework.quantizers import (
    Int8WeightPerChannelFloat,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)

QUANTIZERS = {
    "plain": (Int8WeightPerChannelFloat, Uint8ActPerTensorFloat),
    "shifted": (ShiftedUint8WeightPerTensorFloat, ShiftedUint8ActPerTensorFloat),
}


def block(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    weight, act = QUANTIZERS[kind]
    conv = QuantConv2d(2, 4, 3, weight_quant=weight, weight_bit_width=4)
    return nn.Sequential(conv, QuantReLU(act_quant=act, collect_stats_steps=2), QuantIdentity())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_gradients_and_statistics_are_those_without_it(kind, reentrant) -> None:
    plain = block(kind)
    again = copy.deepcopy(plain)
    for _ in range(5):  # collects twice, hands over, learns
        x = torch.randn(2, 2, 6, 6, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        for model in (plain, again):
            model.zero_grad()
        expected = plain(x)
        out = checkpoint(again, y, use_reentrant=reentrant)
        assert torch.equal(out, expected)
        expected.pow(2).sum().backward()
        out.pow(2).sum().backward()
        assert torch.equal(x.grad, y.grad)
        for a, b in zip(plain.parameters(), again.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)
        mine, theirs = again.state_dict(), plain.state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_delay_counts_a_call_once(reentrant) -> None:
    model = QuantReLU(quant_delay_steps=2, collect_stats_steps=1)
    seen = []
    for _ in range(4):
        x = torch.rand(8, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        seen.append(int(model.act_quant.tensor_quant.int_quant.delay_wrapper.steps_left))
    assert seen == [1, 0, -1, -1]
