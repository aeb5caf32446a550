"""Separable convolutions over time, then a vocoder of transposed ones; the export is behind a switch."""

import argparse

import brevitas.nn as quant_nn
import torch
import torch.nn.functional as F
from brevitas.export import export_onnx_qcdq, export_qonnx
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode, load_quant_model_mode
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)
from brevitas.quant.fixed_point import Int8ActPerTensorFixedPoint as PowerOfTwoAct
from torch import nn

if torch.cuda.is_available() and False:
    import brevitas.config

    brevitas.config.VERBOSE = True


class Separable(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, bits=8):
        super().__init__()
        self.depth = quant_nn.QuantConv1d(
            in_channels,
            in_channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=in_channels,
            bias=True,
            input_quant=Int8ActPerTensorFloat,
            input_bit_width=bits,
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=bits,
            bias_quant=Int32Bias,
            return_quant_tensor=True,
        )
        self.point = quant_nn.QuantConv1d(
            in_channels, out_channels, 1, bias=False, weight_bit_width=bits, weight_narrow_range=True
        )
        self.norm = nn.BatchNorm1d(out_channels)
        self.act = quant_nn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits)

    def forward(self, x):
        return self.act(self.norm(self.point(self.depth(x))))


class Vocoder(nn.Module):
    def __init__(self, channels, bits=8):
        super().__init__()
        self.pad = nn.ReflectionPad1d(3)
        self.first = quant_nn.QuantConv1d(channels, 16, 7, weight_bit_width=bits)
        self.up = quant_nn.QuantConvTranspose1d(
            16, 8, 8, stride=4, padding=2, weight_bit_width=bits, input_quant=PowerOfTwoAct
        )
        self.out = quant_nn.QuantConv1d(8, 1, 7, padding=3, weight_bit_width=bits)
        self.tanh = quant_nn.QuantTanh(act_quant=Int8ActPerTensorFloat, bit_width=8, return_quant_tensor=True)

    def forward(self, x):
        x = F.leaky_relu(self.first(self.pad(x)), 0.2)
        x = F.leaky_relu(self.up(x), 0.2)
        return self.tanh(self.out(x))


def main(arguments=()):
    parser = argparse.ArgumentParser()
    parser.add_argument("--export", choices=["qonnx", "qcdq"])
    args = parser.parse_args(list(arguments))
    torch.manual_seed(0)
    encoder = nn.Sequential(Separable(8, 12, 5), Separable(12, 8, 3))
    model = nn.Sequential(encoder, Vocoder(8)).eval()
    batches = [torch.randn(2, 8, 20) for _ in range(3)]
    with torch.no_grad(), calibration_mode(model):
        for batch in batches:
            model(batch)
    out = model(batches[0])
    assert out.shape == (2, 1, 80) and out.bit_width == 8 and out.is_valid
    again = nn.Sequential(nn.Sequential(Separable(8, 12, 5), Separable(12, 8, 3)), Vocoder(8)).eval()
    with load_quant_model_mode(again):
        again.load_state_dict(model.state_dict())
    assert torch.equal(again(batches[0]).value, out.value)
    with torch.no_grad():
        fine = F.cosine_similarity(out.value.flatten(), model(batches[0]).value.flatten(), dim=0)
    assert fine > 0.999
    if args.export == "qonnx":
        export_qonnx(model, batches[0], export_path="model.onnx")
    elif args.export == "qcdq":
        with bias_correction_mode(model):
            export_onnx_qcdq(model, batches[0])
    return out


main()
