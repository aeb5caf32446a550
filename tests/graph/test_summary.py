"""What a model is made of, in numbers that were worked out by hand."""

import json
import warnings

import pytest
import torch
from rich.console import Console
from torch import nn

from qframework.graph import summary
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantLSTM, QuantReLU
from qframework.quantizers import (
    Fp8e4m3OCPWeightPerTensorFloat,
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    MXFloat4e2m1Weight,
    NF4WeightPerGroupFloat,
    ShiftedUint8WeightPerTensorFloat,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(bit_width=6),
        QuantConv2d(2, 4, 3, stride=2, groups=2, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4),
        QuantReLU(bit_width=5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        QuantLinear(16, 3, bias=False),
        nn.Linear(3, 2),
    )  # fmt: skip


def test_sizes_widths_operations_and_totals() -> None:
    model = network()
    x = torch.randn(5, 2, 10, 10)
    model(x)
    found = summary(model, x[:1])
    layers = {x.name: x for x in found.layers}
    conv, linear, last = layers["1"], layers["6"], layers["7"]
    weight = conv.tensors[0]
    assert (weight.name, weight.quantizer) == ("weight", "Int8WeightPerChannelFloat")
    assert (weight.bit_width, weight.granularity, weight.parameters) == (4, "channel", 4 * 1 * 9)
    assert weight.size_in_bits == 36 * 4
    scales = model[1].weight_quant.scale().detach()
    assert weight.scale_min == pytest.approx(float(scales.min()))
    assert weight.scale_max == pytest.approx(float(scales.max()))
    assert conv.tensors[1].name == "bias" and conv.tensors[1].size_in_bits == 4 * 32
    assert conv.macs == 4 * 4 * 4 * 9 and conv.input_bits == 6 and conv.bops == 576 * 4 * 6
    assert linear.macs == 48 and linear.input_bits == 5 and linear.bops == 48 * 8 * 5
    assert last.macs == 6 and last.input_bits == 32 and last.bops == 6 * 32 * 32
    assert found.parameters == 36 + 4 + 48 + 6 + 2
    assert found.size_in_bits == 36 * 4 + 4 * 32 + 48 * 8 + 8 * 32
    assert found.macs == 576 + 48 + 6
    assert found.bops == conv.bops + linear.bops + last.bops


def test_nothing_of_the_model_changes() -> None:
    model = network().train()
    model(torch.randn(5, 2, 10, 10))
    model[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    summary(model, torch.randn(1, 2, 10, 10))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_linear_layers_count_all_leading_axes_and_shared_ones_each_call() -> None:
    shared = QuantLinear(4, 4, input_quant=Int8ActPerTensorFloat, input_bit_width=7)
    model = nn.Sequential(shared, shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (layer,) = summary(model, torch.randn(2, 3, 4)).layers
    assert layer.macs == 2 * (2 * 3 * 4 * 4) and layer.input_bits == 7


def test_recurrent_layers_count_their_products() -> None:
    model = QuantLSTM(4, 3, num_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = summary(model, torch.randn(5, 2, 4))
    assert found.macs == 5 * 2 * (4 * 3 * (4 + 3) + 4 * 3 * (3 + 3))
    assert found.bops == found.macs * 8 * 8


@pytest.mark.parametrize(
    ("quantizer", "bits", "granularity"),
    [(Fp8e4m3OCPWeightPerTensorFloat, 8, "tensor"), (MXFloat4e2m1Weight, 4, "group"), (NF4WeightPerGroupFloat, 4, "group")],
)  # fmt: skip
def test_other_formats_tell_their_bits(quantizer, bits, granularity) -> None:
    (layer,) = summary(QuantLinear(64, 4, bias=False, weight_quant=quantizer)).layers
    assert layer.tensors[0].bit_width == bits and layer.tensors[0].granularity == granularity
    assert layer.macs is None and layer.bops is None


def test_zero_points_are_shown() -> None:
    layer = QuantLinear(4, 4, weight_quant=ShiftedUint8WeightPerTensorFloat)
    (found,) = summary(layer).layers
    zero = float(layer.weight_quant.zero_point().detach())
    assert found.tensors[0].zero_point == (zero, zero)


def test_a_tied_parameter_is_stored_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), QuantLinear(4, 10, bias=False, weight_bit_width=4))
    model[1].weight = model[0].weight
    found = summary(model)
    assert found.parameters == 40 and found.size_in_bits == 40 * 32
    tied = found.layers[1].tensors[0]
    assert (tied.shared_with, tied.parameters, tied.bit_width) == ("0.weight", 0, 4)


def test_what_a_quantizer_is_made_of_is_no_layer() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.gain.mean()

    class Scaled(Int8ActPerTensorFloat):
        input_view_impl = Gain

    model = nn.Sequential(QuantIdentity(act_quant=Scaled))
    (layer,) = summary(model).layers
    assert layer.name == "0" and [t.name for t in layer.tensors] == ["act"]


def test_it_prints_and_dumps() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = summary(model, torch.randn(1, 2, 10, 10))
    console = Console(record=True, width=200)
    console.print(found)
    text = console.export_text()
    assert "QuantConv2d" in text and "BOPs" in text and "total" in text
    data = json.loads(found.model_dump_json())
    assert data["macs"] == 630 and data["layers"][1]["tensors"][0]["size_in_bits"] == 144


def test_print_shows_the_table() -> None:
    model = network()
    model(torch.randn(5, 2, 10, 10))
    text = str(summary(model, torch.randn(1, 2, 10, 10)))
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["layer", "tensor", "quantizer", "per"]
    assert any("1 QuantConv2d" in x and "Int8WeightPerChannelFloat" in x for x in lines)
    assert lines[-1].startswith("total")
