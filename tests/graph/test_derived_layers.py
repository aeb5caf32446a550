"""Classes that are derived from torch's layers, and others that compute what a torch layer does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.graph import Rule, calibration_mode, quantize_model
from qframework.layers import QuantConv3d, QuantLinear, QuantRMSNorm, QuantTransposedLinear
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat


class OtherArguments(nn.Conv3d):
    """Only its constructor differs."""

    def __init__(self, planes):
        super().__init__(planes, planes, 3, padding=1, bias=False)
        self.note = "kept"

    @staticmethod
    def stride_of(stride):
        return stride


class Rewritten(nn.Linear):
    """The base's forward in other words."""

    def forward(self, input):
        if torch.jit.is_scripting():
            return F.linear(input, self.weight.to(input.dtype))
        return F.linear(input, self.weight, bias=self.bias)


class Standardized(nn.Conv2d):
    """A weight computed from parameters."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1) * 0.3, training=True)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(nn.Conv2d):
    """Looks at sizes, so that it can't be traced."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x)


class Scaled(nn.Embedding):
    def forward(self, index):
        return super().forward(index) * 4.0


class Doubled(nn.Conv2d):
    """A helper of the base that computes otherwise, with the weight itself."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * 2


class Centred(nn.Linear):
    """Computes with something made of its weight, behind control flow."""

    def forward(self, x):
        return F.linear(x if x.sum() > 0 else -x, self.weight - self.weight.mean())


class WithAdapter(nn.Linear):
    """The base's forward, and a parameter that others use."""

    def __init__(self, *args):
        super().__init__(*args)
        self.adapter = nn.Parameter(torch.ones(4))


class Conv1D(nn.Module):
    """A linear layer, stored the other way round."""

    def __init__(self, nf, nx, factor=1.0):
        super().__init__()
        self.nf, self.factor = nf, factor
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight) * self.factor
        return rows.view((*x.size()[:-1], self.nf))


class MyRMSNorm(nn.Module):
    def __init__(self, shift=0.0):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(6)), 1e-5
        self.shift = shift

    def forward(self, x):
        mean = x.float().pow(2).mean(-1, keepdim=True)
        return (self.shift + self.weight) * (x * torch.rsqrt(mean + self.variance_epsilon))


OFF = {"weight_quant": None}
LAYERS = {
    "other arguments": (lambda: OtherArguments(2), (1, 2, 4, 4, 4), "QuantConv3d"),
    "rewritten": (lambda: Rewritten(4, 3), (2, 4), "QuantLinear"),
    "rewritten without bias": (lambda: Rewritten(4, 3, bias=False), (2, 4), "QuantLinear"),
    "computed weight": (lambda: Standardized(3, 4, 3, stride=2), (1, 3, 7, 7), "QuantConv2d"),
    "own forward": (lambda: Padded(3, 4, 2), (1, 3, 7, 7), "QuantPadded"),
    "another helper": (lambda: Doubled(3, 4, 1), (1, 3, 2, 2), "QuantDoubled"),
    "one more parameter": (lambda: WithAdapter(4, 4), (2, 4), "QuantWithAdapter"),
    "other way round": (lambda: Conv1D(5, 4), (2, 3, 4), "QuantTransposedLinear"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_computes_the_same_is_converted_exactly(name) -> None:
    torch.manual_seed(0)
    make, shape, kind = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    model, report = quantize_model(nn.Sequential(layer), strict=True, **OFF)
    assert report.entries[0].quantized_type == kind
    assert torch.allclose(model(x), layer(x), atol=1e-6)
    assert set(nn.Sequential(layer).state_dict()) <= set(model.state_dict())
    assert model[0]._parameters["weight"] is layer.weight


def rounded(weight, axis):
    scale = weight.abs().amax([i for i in range(weight.dim()) if i != axis], keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_that_is_multiplied_with_is_quantized(name) -> None:
    torch.manual_seed(0)
    make, shape, _ = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    model, _ = quantize_model(
        nn.Sequential(layer),
        weight_quant=Int8WeightPerChannelFloat,
        input_quant=Int8ActPerTensorFloat,
    )
    with torch.no_grad(), calibration_mode(model):
        model(x)
    got = model(x)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(x), got)
    model[0].input_quant.disable_quant = True
    expected = copy.deepcopy(layer)
    if isinstance(layer, Standardized):
        flat = layer.weight.reshape(1, 4, -1)
        made = F.batch_norm(flat, None, None, weight=layer.gain.view(-1) * 0.3, training=True)
        wanted = F.conv2d(x, rounded(made.reshape_as(layer.weight), 0), layer.bias, layer.stride)
    else:
        axis = 1 if isinstance(layer, Conv1D) else 0
        expected.weight.data = rounded(layer.weight.data, axis)
        wanted = expected(x)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert not torch.allclose(model(x), layer(x), atol=1e-6)
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if n != "adapter")


def test_an_embedding_with_a_forward_of_its_own_reads_quantized_rows() -> None:
    table = Scaled(7, 4)
    model, _ = quantize_model(table, weight_quant=Int8WeightPerChannelFloat)
    assert isinstance(model, Scaled)
    index = torch.tensor([1, 3])
    assert torch.allclose(model(index), rounded(table.weight, 0)[index] * 4)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Centred(4, 4), "can't be traced"),
        (lambda: Conv1D(4, 4, factor=2.0), "has parameters of its own"),
    ],
)
def test_what_computes_otherwise_stays_float_with_a_reason(make, reason) -> None:
    with pytest.warns(UserWarning, match=reason):
        _, report = quantize_model(nn.Sequential(make()))
    assert [reason in e.reason for e in report.unsupported] == [True]


def test_attributes_that_were_noted_on_a_layer_stay() -> None:
    model, _ = quantize_model(nn.Sequential(OtherArguments(2)))
    assert isinstance(model[0], QuantConv3d) and model[0].note == "kept"
    assert not hasattr(quantize_model(nn.Linear(2, 2))[0], "note")


def test_norms_of_other_classes_are_converted_where_a_rule_names_them_and_they_agree() -> None:
    net = nn.Sequential(MyRMSNorm(), MyRMSNorm(1.0))
    _, report = quantize_model(net)
    assert [e.kept for e in report.entries] == [True, True]
    model, report = quantize_model(net, rules=[Rule(MyRMSNorm, weight_quant=None)])
    assert isinstance(model[0], QuantRMSNorm) and type(model[1]) is MyRMSNorm
    assert "no quantized form of a MyRMSNorm is known" in report.kept[0].reason
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), net(x))


def test_channels_of_a_transposed_weight_are_along_its_second_axis() -> None:
    layer = QuantTransposedLinear(4, 6, weight_quant=Int8WeightPerChannelFloat)
    assert layer.weight_quant.scale().shape == (1, 6)
    linear = QuantLinear(4, 6, weight_quant=Int8WeightPerChannelFloat)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().t()), layer.bias
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), linear(x))
