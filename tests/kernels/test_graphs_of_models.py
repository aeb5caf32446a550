"""Models in graphs of torch.compile: they train as in eager mode, see every change of a weight, and hold torch's operators."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import qframework
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
    ShiftedUint8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def auto() -> None:
    torch.compiler.reset()
    with qframework.settings.use(kernels="auto"):
        yield


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


def settled() -> tuple[nn.Module, torch.Tensor]:
    """A network that has collected, and a batch."""
    model, x = network(), torch.randn(4, 3, 8, 8)
    for _ in range(3):
        model(x)
    return model, x


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
        (ShiftedUint8WeightPerTensorFloat, Uint8ActPerTensorFloat),
    ],
)
def test_a_graph_trains_as_eager_mode_does(weight, act) -> None:
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

    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend=backend)(x)
    return found


def test_graphs_hold_operators_of_ours_for_what_collects_and_no_others() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    assert operators_of(model, x) == {"percentile_if": 2}
    model, x = settled()
    assert not operators_of(model, x)
    model.eval()
    with torch.no_grad():
        assert not operators_of(model, x)
        exported = torch.export.export(model, (x,))
    assert "qframework" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_graphs_with_and_without_fused_forms_compute_the_same() -> None:
    model, x = settled()
    found = []
    for kernels in ("fused", "reference"):
        torch.compiler.reset()
        one = copy.deepcopy(model)
        with qframework.settings.use(kernels=kernels):
            out = torch.compile(one, fullgraph=True, backend="aot_eager")(x)
            found.append([out, *gradients(one, out)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_graph_of_evaluation_sees_every_change_of_a_weight() -> None:
    model, x = settled()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    weight = model[1].weight
    other = {
        k: torch.randn_like(v) if k == "1.weight" else v for k, v in model.state_dict().items()
    }
    for change in (
        lambda: weight.mul_(2),
        lambda: weight[0, 0].fill_(3),
        lambda: model.load_state_dict(other),
        lambda: setattr(weight, "data", torch.randn_like(weight)),
        lambda: weight.data.copy_(torch.randn_like(weight)),
        lambda: setattr(model[1], "weight", nn.Parameter(torch.randn_like(weight))),
    ):
        change()
        out = compiled(x)
        torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
        assert not torch.equal(out, before)
        before = out


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
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
def test_results_have_the_values_and_the_layout_of_eager_mode(make, backend) -> None:
    layer = make().eval()
    x = torch.randn(2, layer.in_channels, 8, 8, *[8] * (layer.weight.dim() - 4))
    out = torch.compile(layer, fullgraph=True, backend=backend)(x)
    expected = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if backend == "aot_eager":
        assert out.stride() == expected.stride()
