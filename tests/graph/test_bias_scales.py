"""Bias quantizers that take input scale times weight scale, in layers where there is no such scale."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from qframework.graph import Recipe, Rule, ptq, quantize_model
from qframework.graph.bias_scales import biases_without_scale
from qframework.graph.calibrate import calibration_mode
from qframework.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
from qframework.graph.quantizers_off import quantizers_off
from qframework.layers import QuantGRU, QuantLinear, QuantMultiheadAttention
from qframework.quantizers import (
    Fp8e4m3OCPWeightPerTensorFloat,
    Int8ActPerTensorFloat,
    Int8DynamicActPerRowFloat,
    Int8WeightPerChannelFloat,
    Int32Bias,
    MXFloat8e4m3Weight,
    MXInt8Weight,
    NF4WeightPerChannelFloat,
    NF4WeightPerGroupFloat,
)

SIZE = 32
WITHOUT_SCALE = (
    Fp8e4m3OCPWeightPerTensorFloat, MXFloat8e4m3Weight, MXInt8Weight, NF4WeightPerChannelFloat, NF4WeightPerGroupFloat,
)  # fmt: skip


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(SIZE, 4, batch_first=True, **options)

    def forward(self, x):
        return self.m(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.m = kind(SIZE, SIZE, batch_first=True)

    def forward(self, x):
        return self.m(x)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.TransformerEncoderLayer(SIZE, 4, 2 * SIZE, 0.0, batch_first=True)

    def forward(self, x):
        return self.m(x)


MODELS = {
    "attention": Attention,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "encoder": Encoder,
}


def calibrated(quantized: nn.Module) -> torch.Tensor:
    """The output for some batch, whose statistics the quantizers have seen."""
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x)
    return quantized(x)


def bias_quantizers(model: nn.Module) -> set[str]:
    """Names of the quantizers of biases that work."""
    proxies = (m._modules.get("bias_quant") for m in model.modules())
    return {p.quantizer.__name__ for p in proxies if p is not None and p.is_quant_enabled}


@pytest.mark.parametrize("weight_quant", WITHOUT_SCALE)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_layer_leaves_its_bias_in_floats_and_says_so(name, weight_quant) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    quantized, report = quantize_model(model, weight_quant=weight_quant)
    out = calibrated(quantized)
    assert bias_quantizers(quantized) == set()
    (entry,) = [e for e in report.replaced if e.name == "m"]
    assert "bias_quant=None" in entry.reason and weight_quant.__name__ in entry.reason
    with quantizers_off(quantized):
        float_out = calibrated(quantized)
    assert (out - float_out).norm() < 0.6 * float_out.norm()


@pytest.mark.parametrize("name", MODELS)
def test_with_integers_of_one_scale_biases_are_quantized_as_ever(name) -> None:
    quantized, report = quantize_model(
        MODELS[name]().eval(), weight_quant=Int8WeightPerChannelFloat
    )
    calibrated(quantized)
    assert bias_quantizers(quantized) == {"Int32Bias"}
    assert "bias_quant" not in str(report)


@pytest.mark.parametrize("name", ("attention", "encoder"))
@pytest.mark.parametrize("input_quant", (None, Int8DynamicActPerRowFloat))
def test_an_input_without_one_scale_counts_too(name, input_quant) -> None:
    quantized, report = quantize_model(MODELS[name]().eval(), input_quant=input_quant)
    assert torch.isfinite(calibrated(quantized)).all()
    assert bias_quantizers(quantized) == set()
    assert "its input" in str(report)


def test_only_the_part_without_a_scale_is_left() -> None:
    rule = Rule("m", linear1_weight_quant=MXFloat8e4m3Weight)
    quantized, report = quantize_model(Encoder().eval(), rules=[rule])
    calibrated(quantized)
    layer = quantized.m
    assert not layer.linear1.bias_quant.is_quant_enabled
    assert layer.linear2.bias_quant.is_quant_enabled
    assert layer.self_attn.in_proj.bias_quant.is_quant_enabled
    assert "linear1_bias_quant=None" in str(report)


def test_a_bias_that_is_made_later_stays_float_as_well() -> None:
    quantized, _ = quantize_model(Attention(bias=False).eval(), weight_quant=MXFloat8e4m3Weight)
    quantized.m.out_proj.bias = nn.Parameter(torch.ones(SIZE))
    calibrated(quantized)
    assert bias_quantizers(quantized) == set()


@pytest.mark.parametrize(
    "model", (Attention(), nn.Sequential(nn.Linear(SIZE, SIZE)), Recurrent(nn.GRU))
)
def test_a_bias_quantizer_that_was_asked_for_is_refused(model) -> None:
    options = {"bias_quant": Int32Bias, "input_quant": Int8ActPerTensorFloat}
    with pytest.raises(
        ValueError,
        match=r"bias_quant=Int32Bias: its weight is quantized by MXInt8Weight.*bias_quant=None",
    ):
        quantize_model(model, weight_quant=MXInt8Weight, **options)


def test_by_a_layer_map_with_a_warning() -> None:
    table = {
        **LAYERWISE_COMPUTE_LAYER_MAP,
        nn.MultiheadAttention: (
            QuantMultiheadAttention,
            {"in_proj_weight_quant": MXFloat8e4m3Weight, "out_proj_weight_quant": NF4WeightPerChannelFloat},
        ),
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"left biases in floats: m .*in_proj_bias_quant=None"):
        quantized = layerwise_quantize(Attention().eval(), table)
    calibrated(quantized)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layerwise_quantize(Attention().eval())


@pytest.mark.parametrize("part", ("m", "m.out_proj"))
def test_a_layer_map_leaves_computed_weights_alone(part) -> None:
    model, x = Attention().eval(), torch.randn(2, 5, SIZE)
    name = "in_proj_weight" if part == "m" else "weight"
    nn.utils.parametrizations.weight_norm(model.get_submodule(part), name)
    with pytest.warns(UserWarning, match=r"left layers in floats.*: m "):
        made = layerwise_quantize(model)
    assert torch.equal(made(x), model(x))


def test_ptq_runs_with_minifloats() -> None:
    recipe = Recipe.model_validate(
        {
            "layers": {"keywords": {"weight_quant": "MXFloat8e4m3Weight"}},
            "steps": [{"step": "quantize"}, {"step": "calibrate"}],
        }
    )
    quantized, _ = ptq(Encoder().eval(), [torch.randn(2, 5, SIZE)], recipe)
    assert torch.isfinite(quantized(torch.randn(2, 5, SIZE))).all()


def test_a_layer_made_by_hand_names_the_remedy() -> None:
    layer = QuantMultiheadAttention(SIZE, 4, in_proj_weight_quant=MXFloat8e4m3Weight)
    x = torch.randn(5, 2, SIZE)
    with pytest.raises(
        RuntimeError, match=r"quantized by MXFloat8e4m3Weight.*in_proj_bias_quant=None"
    ):
        layer(x, x, x)
    with pytest.raises(RuntimeError, match=r"quantized by MXFloat8e4m3Weight.*bias_quant=None"):
        QuantGRU(SIZE, SIZE, weight_quant=MXFloat8e4m3Weight)(x)
    assert set(biases_without_scale(layer)) == {"in_proj_bias_quant"}
    plain = QuantLinear(SIZE, SIZE, bias_quant=Int32Bias)
    assert biases_without_scale(plain, fed=True) == {}
