"""Weights that code reads past their layer: quantized where the source says so, found at the first forward where not."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.graph import calibration_mode, quantize_model
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat


class Attention(nn.Module):
    """Hands the weight of a layer to a function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        assert self.proj.weight.dtype == x.dtype
        return self.proj(self.project(x))

    def project(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Hidden(nn.Module):
    """Reads a weight where the source doesn't tell which."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return sum(F.linear(x, layer.weight) for layer in self.inner)


def rounded(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def test_a_weight_that_a_method_reads_is_quantized_and_told() -> None:
    torch.manual_seed(0)
    net = Attention().eval()
    model, report = quantize_model(
        net, weight_quant=Int8WeightPerChannelFloat, input_quant=Int8ActPerTensorFloat
    )
    entry = next(e for e in report.entries if e.name == "qkv")
    assert "read, quantized, by Attention, test_weights_read_elsewhere.py:" in entry.reason
    assert "stays float" in entry.reason
    assert "read" not in next(e for e in report.entries if e.name == "proj").reason
    x = torch.randn(3, 4)
    assert torch.allclose(model.project(x), F.linear(x, rounded(net.qkv.weight), net.qkv.bias))
    assert model.qkv._parameters["weight"] is net.qkv.weight
    with warnings.catch_warnings(), torch.no_grad(), calibration_mode(model):
        warnings.simplefilter("error")  # no quantizer is left without data
        assert torch.allclose(model(x), net(x))
    got = model(x)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(x), got)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), got)
    got.sum().backward()
    assert net.qkv.weight.grad is not None
    assert model.state_dict().keys() >= net.state_dict().keys()


def test_the_first_forward_finds_what_the_source_does_not_tell() -> None:
    model, report = quantize_model(Hidden())
    with pytest.warns(UserWarning, match=r"inner\.0 by Hidden, test_weights_read_elsewhere.py:\d+"):
        model(torch.randn(2, 4))
    assert "stays float in Hidden" in report.entries[0].reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_layers_that_are_called_are_not_taken_for_such() -> None:
    model, report = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval())
    with warnings.catch_warnings(), calibration_mode(model):
        warnings.simplefilter("error")
        model(torch.randn(2, 4))
    assert all(e.reason == "" for e in report.replaced)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, _ = quantize_model(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert model(torch.randn(2, 4)).shape == (2, 4)


class ReadsAttention(nn.Module):
    """Reads a parameter that quantized attention has under another name."""

    def __init__(self):
        super().__init__()
        self.attention, self.after = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        return self.after(self.attention(x, x, x)[0]) * self.attention.in_proj_weight.std()


def test_attention_whose_parameters_code_reads_stays_float() -> None:
    with pytest.warns(UserWarning, match="attention: its parts in_proj .* read by code"):
        model, _ = quantize_model(ReadsAttention().eval())
    assert type(model.attention) is nn.MultiheadAttention
    assert type(model.after).__name__ == "QuantLinear"
    with torch.no_grad():
        model(torch.randn(3, 2, 4))
