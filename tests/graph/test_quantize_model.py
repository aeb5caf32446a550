"""From a float model to a quantized one."""

import warnings

import pytest
import torch
from float_network import X, network
from torch import nn

from qframework.graph import Rule, calibration_mode, quantize_model
from qframework.graph.conversion import CONVERSIONS
from qframework.graph.quantizers_off import quantizers_off
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
)


def test_layers_are_replaced_and_share_their_parameters() -> None:
    net = network()
    model, report = quantize_model(net, weight_bit_width=4, input_quant=Int8ActPerTensorFloat)
    assert isinstance(model[0], QuantConv2d) and isinstance(model[3].conv, QuantConv2d)
    assert isinstance(model[2], QuantReLU) and isinstance(model[6], QuantLinear)
    assert model[0].weight is net[0].weight and model[3].conv.weight is net[3].conv.weight
    assert model[0].weight_quant.bit_width() == 4 and model[0].input_quant.is_quant_enabled
    assert type(net[0]) is nn.Conv2d and type(net[3].conv) is nn.Conv2d
    assert {e.name for e in report.replaced} == {"0", "2", "3.conv", "3.act", "6"}
    assert not report.unsupported and not model.training
    assert "Conv2d -> QuantConv2d" in str(report)


def test_with_quantizers_off_nothing_changes() -> None:
    net = network()
    model, _ = quantize_model(net, weight_quant=None, act_quant=None)
    assert torch.equal(model(X), net(X))


def test_a_module_at_several_places_stays_one_module() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    model, _ = quantize_model(net)
    assert model[0] is model[2] and model[0].weight is shared.weight


def test_the_root_may_be_a_layer() -> None:
    layer = nn.Linear(4, 3)
    model, _ = quantize_model(layer, weight_quant=Int8WeightPerTensorFloat)
    assert isinstance(model, QuantLinear) and model.weight is layer.weight


def test_in_place_the_model_itself_changes() -> None:
    net = network()
    model, _ = quantize_model(net, inplace=True)
    assert model is net and isinstance(net[0], QuantConv2d)


def test_hooks_modes_and_dtypes_come_along() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).bfloat16().eval()
    seen = []
    net[0].register_forward_hook(lambda *a: seen.append(1))
    model, _ = quantize_model(net)
    assert model[0].weight.dtype == torch.bfloat16 and not model[0].training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.randn(2, 4).bfloat16())
    assert seen == [1]


def test_what_has_no_quantized_form_is_told() -> None:
    class MyLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.std()

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

    net = nn.Sequential(nn.Linear(4, 4), nn.Mish(), MyLinear(4, 4), Gain())
    with pytest.warns(UserWarning, match="left layers in floats"):
        _, report = quantize_model(net)
    assert [e.name for e in report.unsupported] == ["1", "2", "3"]
    assert "gain" in report.unsupported[2].reason
    with pytest.raises(ValueError, match="no quantized form"):
        quantize_model(net, strict=True)
    model, _ = quantize_model(
        net, rules=[Rule(MyLinear, to=QuantLinear), Rule(("1", "3"), keep_float=True)], strict=True
    )
    assert isinstance(model[2], QuantLinear)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"rules": [Rule("lyer*")]}, ValueError, "no module's name fits"),
        ({"rules": [Rule(nn.GELU)]}, ValueError, "no module is a GELU"),
        ({"weigth_bit_width": 4}, TypeError, "weight_bit_width"),
        ({"weight_bit_width": 0}, ValueError, "0: "),
        ({"rules": [Rule("0", nonsense=1)]}, TypeError, "nonsense"),
    ],
)
def test_mistakes_are_named(options, error, says) -> None:
    with pytest.raises(error, match=says):
        quantize_model(network(), **options)
    with pytest.raises(TypeError, match="match must be"):
        Rule(3)


FLOAT = {
    nn.Linear: lambda: (nn.Linear(4, 3), (2, 4)),
    nn.Conv1d: lambda: (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 9)),
    nn.Conv2d: lambda: (nn.Conv2d(2, 4, 3, dilation=2, padding_mode="reflect", padding=1), (2, 2, 9, 9)),
    nn.Conv3d: lambda: (nn.Conv3d(1, 2, 2, bias=False), (2, 1, 3, 3, 3)),
    nn.ConvTranspose1d: lambda: (nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), (2, 2, 5)),
    nn.ConvTranspose2d: lambda: (nn.ConvTranspose2d(4, 4, 3, groups=2, dilation=2), (2, 4, 5, 5)),
    nn.ConvTranspose3d: lambda: (nn.ConvTranspose3d(1, 2, 2), (2, 1, 3, 3, 3)),
    nn.LayerNorm: lambda: (nn.LayerNorm((3, 4), eps=1e-3), (2, 3, 4)),
    nn.RMSNorm: lambda: (nn.RMSNorm(4), (2, 4)),
    nn.GroupNorm: lambda: (nn.GroupNorm(2, 4), (2, 4, 3)),
    nn.RNN: lambda: (nn.RNN(4, 3, 2, nonlinearity="relu", bidirectional=True), (5, 2, 4)),
    nn.LSTM: lambda: (nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), (2, 5, 4)),
    nn.GRU: lambda: (nn.GRU(4, 3, bias=False), (5, 2, 4)),
    nn.TransformerEncoderLayer: lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), (2, 5, 8)
    ),
    nn.ReLU6: lambda: (nn.ReLU6(), (2, 4)),
    nn.LeakyReLU: lambda: (nn.LeakyReLU(0.3), (2, 4)),
    nn.PReLU: lambda: (nn.PReLU(4, 0.1), (2, 4)),
    nn.ELU: lambda: (nn.ELU(0.7), (2, 4)),
    nn.GELU: lambda: (nn.GELU("tanh"), (2, 4)),
    nn.SiLU: lambda: (nn.SiLU(), (2, 4)),
    nn.Sigmoid: lambda: (nn.Sigmoid(), (2, 4)),
    nn.Tanh: lambda: (nn.Tanh(), (2, 4)),
    nn.Hardswish: lambda: (nn.Hardswish(), (2, 4)),
    nn.Hardsigmoid: lambda: (nn.Hardsigmoid(), (2, 4)),
    nn.Softmax: lambda: (nn.Softmax(-1), (2, 4)),
    nn.ReLU: lambda: (nn.ReLU(), (2, 4)),
    nn.Hardtanh: lambda: (nn.Hardtanh(-2, 2), (2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOAT, ids=lambda k: k.__name__)
def test_each_layer_with_its_quantizers_off_computes_what_torch_does(kind) -> None:
    torch.manual_seed(0)
    layer, shape = FLOAT[kind]()
    layer.eval()
    roles = CONVERSIONS[kind].roles
    off = {f"{r}_quant": None for r in roles}
    if kind is nn.TransformerEncoderLayer:
        off = {}
    model, report = quantize_model(layer, rules=[Rule(kind, **off)], strict=True)
    assert report.replaced[0].quantized_type == CONVERSIONS[kind].target
    x = torch.randn(shape)
    if kind is nn.TransformerEncoderLayer:
        with calibration_mode(model):
            model(x)
    got, expected = model(x), layer(x)
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    room = 0.1 if kind is nn.TransformerEncoderLayer else 1e-5
    torch.testing.assert_close(first(got), first(expected), rtol=0, atol=room)


def test_embeddings_and_attention_are_replaced() -> None:
    net = nn.ModuleDict({"e": nn.Embedding(7, 8, padding_idx=2), "b": nn.EmbeddingBag(7, 8, mode="sum"), "a": nn.MultiheadAttention(8, 2, batch_first=True)})  # fmt: skip
    model, _ = quantize_model(net, weight_bit_width=4)
    index = torch.tensor([[1, 2, 6]])
    e = model["e"](index)
    assert e.shape == (1, 3, 8) and model["e"].padding_idx == 2
    assert model["b"](index).shape == (1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model["a"](e, e, e)[0].shape == (1, 3, 8)
    assert model["a"].in_proj.weight_quant.bit_width() == 4


def test_layers_that_are_quantized_already_are_left_alone() -> None:
    done = QuantIdentity()
    model, report = quantize_model(nn.Sequential(done, nn.Linear(2, 2)))
    assert type(model[0]) is QuantIdentity and report.kept[0].reason == "quantized already"


@pytest.mark.parametrize("part", ("self_attn.out_proj", "linear1", "linear2"))
def test_a_computed_weight_within_a_layer_of_several_parts_is_heeded(part) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    nn.utils.parametrizations.weight_norm(net.get_submodule(part))
    x = torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match="left layers in floats"):
        quantized, report = quantize_model(nn.Sequential(net))
    assert "one by one" in str(report)
    with torch.no_grad(), quantizers_off(quantized):
        torch.testing.assert_close(quantized(x), net(x))
    assert (
        type(quantized[0].get_submodule("linear2" if part != "linear2" else "linear1"))
        is QuantLinear
    )


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ((nn.Linear(2, 2), None), {}, "got a tuple, which is what quantize_model returns"),
        (nn.Linear, {}, "must be a torch.nn.Module; got a type"),
        (nn.Sequential(torch.jit.script(nn.Linear(2, 2))), {}, "0 is TorchScript"),
        (nn.Linear(2, 2), {"rules": {"": {"weight_bit_width": 8}}}, "list of Rule.* of type str"),
    ],
)
def test_what_is_no_model_or_no_rule_is_refused(model, options, says) -> None:
    with pytest.raises(TypeError, match=says):
        quantize_model(model, **options)


class Residual(nn.Module):
    """A layer, and two functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Around the layer."""
        return x + torch.relu(self.layer(x))


@pytest.mark.parametrize("functions", [True, False])
def test_a_graph_of_torch_fx_is_quantized_and_its_functions_reported(functions) -> None:
    graph = torch.fx.symbolic_trace(Residual())
    x = torch.randn(3, 4)
    model, report = quantize_model(graph, functions=functions)
    assert isinstance(model.layer, QuantLinear) and isinstance(graph.layer, nn.Linear)
    torch.testing.assert_close(model(x), graph(x), atol=0.05, rtol=0)
    assert [f.function for f in report.functions if f.quantized_type is None] == ["relu", "add"]
    assert all("made of a graph" in f.reason for f in report.functions)
