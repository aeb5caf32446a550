"""Weights in graphs of torch.compile, and what is kept for graphs of evaluation."""

import copy
import gc
from collections import Counter

import pytest
import torch
from torch import nn

import qframework
from qframework.functional import traced_weight
from qframework.layers import (
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose2d,
    QuantIdentity,
    QuantLinear,
    QuantReLU,
)
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
)

OPERATORS = torch.ops.qframework


def how(scale_shape=(), per_channel=False) -> str:
    return str((-127.0, 127.0, "round", "fp", "round", 2.0**-16, scale_shape, None, per_channel))


@pytest.fixture(autouse=True)
def start() -> None:
    traced_weight._kept.clear()
    with qframework.settings.use(kernels="auto"):
        yield


@pytest.mark.parametrize(("shape", "per_channel"), [((), False), ((4, 1, 1, 1), True)])
def test_the_operator_of_a_weight_is_what_it_says(shape, per_channel) -> None:
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 5, 7).to(memory_format=order)
        operands = (x, torch.tensor(127.0), how(shape, per_channel))
        torch.library.opcheck(OPERATORS.kept_largest.default, operands)


def network(weight=Int8WeightPerTensorFloat, act=Uint8ActPerTensorFloat) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(act_quant=Int8ActPerTensorFloat, collect_stats_steps=2),
        QuantConv2d(3, 8, 3, weight_quant=weight, bias=False),
        nn.BatchNorm2d(8),
        QuantReLU(act_quant=act, collect_stats_steps=2),
        QuantConv2d(8, 8, 3, weight_quant=weight),
        nn.Flatten(),
        QuantLinear(8 * 4 * 4, 5, weight_quant=weight),
    )


def gradients(model: nn.Module, out: torch.Tensor) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(out.sin().sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize(
    ("weight", "act"),
    [
        (Int8WeightPerTensorFloat, Uint8ActPerTensorFloat),
        (Int8WeightPerChannelFloat, Uint8ActPerTensorFloat),
        (Int8WeightPerTensorFixedPoint, ShiftedUint8ActPerTensorFloat),
    ],
)
def test_a_graph_with_operators_trains_as_eager_does(weight, act) -> None:
    eager = network(weight, act)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(4, 3, 8, 8)
        out, expected = compiled(x), eager(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(other, out), gradients(eager, expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item()))


def operators_of(model: nn.Module, x: torch.Tensor) -> Counter:
    """How often the traced graph holds each operator of ours."""
    found = Counter()

    def backend(graph, operands):
        for part in graph.modules():
            for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                if "qframework" in str(node.target):
                    found[str(node.target).split(".")[-1]] += 1
        return graph.forward

    torch.compile(model, fullgraph=True, backend=backend)(x)
    return found


def test_graphs_of_evaluation_hold_an_operator_for_each_weight_and_others_none() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    for _ in range(3):
        model(x)
    assert not operators_of(model, x)
    model.eval()
    with torch.no_grad():
        assert operators_of(model, x) == {"kept_largest": 3}
        torch.compiler.reset()
        with qframework.settings.use(kernels="fused"):
            assert not operators_of(model, x)
        exported = torch.export.export(model, (x,))
    assert "qframework" not in str(exported.graph)


@torch.no_grad()
def test_a_graph_of_evaluation_sees_every_change_of_a_weight(monkeypatch) -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    for _ in range(3):
        model(x)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    made, forward = [], traced_weight._LargestScaled.forward
    monkeypatch.setattr(
        traced_weight._LargestScaled, "forward", lambda *a: (made.append(1), forward(*a))[1]
    )
    compiled(x)
    assert not made
    weight = model[1].weight
    other = {
        k: torch.randn_like(v) if k == "1.weight" else v for k, v in model.state_dict().items()
    }
    for change, count in (
        (lambda: weight.mul_(2), 1),
        (lambda: weight[0, 0].fill_(3), 1),
        (lambda: model.load_state_dict(other), 3),
        (lambda: setattr(weight, "data", torch.randn_like(weight)), 1),
        (lambda: setattr(model[1], "weight", nn.Parameter(torch.randn_like(weight))), 1),
    ):
        change()
        made.clear()
        out = compiled(x)
        assert len(made) == count
        torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    made.clear()
    with qframework.settings.use(cache=False):
        compiled(x)
    assert len(made) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantConv2d(4, 6, 3),
        lambda: QuantConv2d(4, 4, 3, groups=4),
        lambda: QuantConv2d(4, 6, 1, weight_quant=Int8WeightPerChannelFloat),
        lambda: QuantConv2d(4, 6, 3).to(memory_format=torch.channels_last),
        lambda: QuantConvTranspose2d(4, 6, 3),
        lambda: QuantConv3d(1, 6, (3, 3, 1)),
    ],
)
def test_weights_are_kept_in_the_layout_of_graphs_and_results_have_that_of_eager_mode(make) -> None:
    layer = make().eval()
    x = torch.randn(2, layer.in_channels, 8, 8, *[8] * (layer.weight.dim() - 4))
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, layer(x), rtol=1e-6, atol=1e-6)
    assert out.stride() == layer(x).stride()
    (kept,) = [known.values for known in traced_weight._kept.values()]
    assert kept.dim() != 4 or kept.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_what_a_graph_writes_into_its_weight_does_not_last() -> None:
    weight, threshold = torch.randn(4, 9), torch.tensor(127.0)
    first = OPERATORS.kept_largest(weight, threshold, how())
    values = first[0].clone()
    first[0].zero_(), first[1].zero_()
    assert torch.equal(OPERATORS.kept_largest(weight, threshold, how())[0], values)


def test_what_is_kept_goes_with_the_weight_and_on_demand() -> None:
    layer, x = QuantLinear(16, 16).eval(), torch.randn(2, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    assert len(traced_weight._kept) == 1
    layer.weight_quant.release()
    assert not traced_weight._kept
    weight, threshold = torch.randn(4, 9), torch.tensor(127.0)
    for _ in range(3):
        OPERATORS.kept_largest(weight, threshold, how())
        weight = torch.randn(4, 9)
        gc.collect()
    assert len(traced_weight._kept) <= 2
