"""A super-resolution network whose accumulators can't overflow, with one scale and with one for each channel."""

import torch
from brevitas.core.scaling.pre_scaling import AccumulatorAwareParameterPreScaling
from brevitas.function.ops import get_upper_bound_on_l1_norm
from brevitas.inject.enum import ScalingPerOutputType
from brevitas.nn import QuantConv2d as Conv, QuantIdentity, QuantReLU
from brevitas.quant import (
    Int8AccumulatorAwareWeightQuant,
    Int8AccumulatorAwareZeroCenterWeightQuant,
    Int8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
)
from torch import nn

ACCUMULATOR = 16


class A2Q(Int8AccumulatorAwareWeightQuant):
    pre_scaling_min_val = 1e-8
    scaling_min_val = 1e-8
    bit_width = 8


class A2QPerTensor(A2Q):
    scaling_per_output_type = ScalingPerOutputType.TENSOR


class A2QPlus(Int8AccumulatorAwareZeroCenterWeightQuant):
    pre_scaling_min_val = 1e-8


class A2QPlusPerTensor(A2QPlus):
    scaling_per_output_type = ScalingPerOutputType.TENSOR


class SuperResolution(nn.Module):
    def __init__(self, weight_quant, upscale=2, bits=4):
        super().__init__()
        common = {"padding": 1, "weight_quant": weight_quant, "weight_bit_width": bits, "weight_accumulator_bit_width": ACCUMULATOR}
        self.conv1 = Conv(1, 8, 3, bias=False, input_quant=Int8ActPerTensorFloat, **common)
        self.relu1 = QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits, return_quant_tensor=True)
        self.conv2 = Conv(8, 8, 3, bias=False, **common)
        self.relu2 = QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits, return_quant_tensor=True)
        self.conv3 = Conv(8, upscale**2, 3, bias=True, **common)
        self.shuffle = nn.PixelShuffle(upscale)
        self.out = QuantIdentity(bit_width=8)

    def forward(self, x):
        x = self.relu1(self.conv1(x))
        self.inner = self.relu2(self.conv2(x))
        return self.out(self.shuffle(self.conv3(self.inner)))


for quantizer in (A2Q, A2QPerTensor, A2QPlus, A2QPlusPerTensor):
    torch.manual_seed(0)
    model = SuperResolution(quantizer)
    images = torch.randn(2, 1, 8, 8)
    model(images).square().mean().backward()
    assert model.eval()(images).shape == (2, 1, 16, 16)
    weight = model.conv3.quant_weight(model.inner)
    norms = weight.int(float_datatype=True).abs().flatten(1).sum(1)
    if issubclass(quantizer, Int8AccumulatorAwareWeightQuant):
        bound = get_upper_bound_on_l1_norm(torch.tensor(float(ACCUMULATOR)), model.inner.bit_width, model.inner.signed)
    else:
        bound = (2.0**ACCUMULATOR - 2) / (2.0**model.inner.bit_width - 1)
    assert (norms <= bound).all() and (norms > 0).any(), (quantizer, norms, bound)
    assert weight.scale.numel() == (1 if "PerTensor" in quantizer.__name__ else 4)
    parts = [type(m).__mro__ for m in model.modules()]
    assert any(AccumulatorAwareParameterPreScaling in mro for mro in parts)
