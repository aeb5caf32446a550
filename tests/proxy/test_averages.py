"""Averages of models: what decides what a quantizer does is averaged or copied with the model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qframework.layers import QuantIdentity, QuantReLU
from qframework.quantizers import ShiftedUint8ActPerTensorFloat

STEPS = 8


def build(kind: str) -> nn.Module:
    if kind == "shifted":
        return QuantIdentity(
            act_quant=ShiftedUint8ActPerTensorFloat,
            return_quant_tensor=True,
            collect_stats_steps=STEPS,
        )
    return QuantReLU(collect_stats_steps=STEPS, return_quant_tensor=True)


def scale(layer: nn.Module) -> float:
    with torch.no_grad():
        return layer.eval()(torch.linspace(-1, 3, 50)).scale.item()


def train(layer: nn.Module, number: int) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    layer.train()
    x = (torch.linspace(-1, 2, 64) * (1 + min(number, STEPS) / 4)).requires_grad_()
    layer(x).value.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["relu", "shifted"])
def test_an_average_made_before_the_switch_goes_by_the_statistics_and_follows_then(
    kind, compiled
) -> None:
    layer = build(kind)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    evaluated = torch.compile(average.module) if compiled else average.module
    for number in range(STEPS):
        train(layer, number)
        average.update_parameters(layer)
        assert scale(evaluated) == pytest.approx(scale(layer), rel=1e-6)
    for number in range(STEPS, 10 * STEPS):
        train(layer, number)
        average.update_parameters(layer)
    assert average.module.act_quant.tensor_quant.scaling_impl.is_learned
    assert scale(evaluated) == pytest.approx(scale(layer), rel=0.02)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_an_average_of_buffers_too_knows_that_scales_are_learned(decay) -> None:
    layer = build("relu")
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for number in range(STEPS + 1):
        train(layer, number)
        average.update_parameters(layer)
    found = average.module.act_quant.tensor_quant.scaling_impl
    assert found.is_learned
    kept = found.value.detach().clone()
    average.module.train()(torch.ones(64))  # as one who renews batch norms does
    assert torch.equal(found.value, kept)
    fresh = build("relu")
    fresh.load_state_dict(average.module.state_dict())
    assert scale(fresh) == scale(average.module)


def test_an_average_of_parameters_alone_goes_by_them() -> None:
    layer = build("relu")
    for number in range(3):
        train(layer, number)
    average = copy.deepcopy(layer)  # while statistics are collected
    for number in range(3, 10 * STEPS):
        train(layer, number)
        with torch.no_grad():
            for mine, new in zip(average.parameters(), layer.parameters(), strict=True):
                mine.data.lerp_(new, 0.5)
    assert scale(average) == pytest.approx(scale(layer), rel=0.01)
