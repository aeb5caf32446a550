"""What chooses weights and biases after conversion finds the projections of attention, and improves them."""

from __future__ import annotations

import pytest
import torch
from attention_networks import BATCH, LENGTH, NETWORKS, WORDS, network

from qframework.graph import quantize_model
from qframework.graph.calibrate import bias_correction_mode, calibration_mode
from qframework.graph.gpfq import gpfq
from qframework.graph.gptq import gptq
from qframework.graph.learned_round import learned_round
from qframework.graph.qronos import qronos
from qframework.quantizers import Int8WeightPerChannelFloat, MXInt8Weight

every_network = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[pytest.mark.exhaustive] if k in ("cross", "by hand") else [])
        for k in NETWORKS
    ],
)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, WORDS, (BATCH, LENGTH), generator=generator) for _ in range(4)]


def quantized(net, weight_quant=Int8WeightPerChannelFloat, **options):
    made, _ = quantize_model(net, weight_quant=weight_quant, **options)
    with torch.no_grad(), calibration_mode(made):
        for x in batches():
            made(x)
    return made


def error(model, net) -> float:
    """The squared error of a model's outputs."""
    with torch.no_grad():
        return sum(float((model(x) - net(x)).square().sum()) for x in batches())


def projections(model) -> set[str]:
    return {
        n for n, m in model.named_modules() if n.endswith("proj") and hasattr(m, "weight_quant")
    }


@every_network
@pytest.mark.parametrize("solve", (gptq, pytest.param(gpfq, marks=pytest.mark.exhaustive), qronos))
def test_solvers_choose_the_weights_of_projections(kind, solve) -> None:
    net = network(kind, True, batch_first=True)
    model = quantized(net, weight_bit_width=3)
    found = solve(model, batches(), measure=True)
    names = projections(model)
    assert len(names) in (2, 4) and names <= set(found.updated)
    assert sum(found.errors[n][1] for n in names) < sum(found.errors[n][0] for n in names)


@pytest.mark.parametrize("kind", ("by hand", "of torch"))
def test_learned_rounding_reaches_projections(kind) -> None:
    net = network(kind, True, batch_first=True)
    model = quantized(net, weight_bit_width=3)
    before = error(model, net)
    found = learned_round(model, batches(), steps=40)
    assert projections(model) <= set(found.errors)
    assert error(model, net) < before


@every_network
def test_bias_correction_reaches_projections(kind) -> None:
    net = network(kind, True, batch_first=True)
    model = quantized(net, weight_bit_width=3)
    old = {n: model.get_submodule(n).bias.detach().clone() for n in projections(model)}
    with torch.no_grad(), bias_correction_mode(model):
        for x in batches():
            model(x)
    assert not any(torch.equal(model.get_submodule(n).bias, b) for n, b in old.items())


def test_minifloats_and_groups_too() -> None:
    net = network("of torch", True, batch_first=True)
    model = quantized(net, MXInt8Weight, weight_bit_width=3)
    found = gptq(model, batches(), measure=True)
    names = projections(model)
    assert names and names <= set(found.updated)
    assert sum(found.errors[n][1] for n in names) < sum(found.errors[n][0] for n in names)
