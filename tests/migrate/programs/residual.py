"""A residual network with 4-bit weights and activations, whose sums share a scale."""

import brevitas
import brevitas.nn
import brevitas.nn as qnn
import brevitas.quant.scaled_int
import torch
from brevitas import config
from brevitas.core.restrict_val import RestrictValueType
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat, TruncTo8bit
from brevitas.quant_tensor import IntQuantTensor, QuantTensor
from torch import nn

config.IGNORE_MISSING_KEYS = True


def convolution(in_channels, out_channels, stride, weight_quant, bits, kernel_size=3):
    return qnn.QuantConv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
        weight_quant=weight_quant,
        weight_bit_width=bits,
    )


class Block(nn.Module):
    def __init__(self, in_channels, channels, stride, bits, weight_quant, shared_quant=None):
        super().__init__()
        self.conv1 = convolution(in_channels, channels, stride, weight_quant, bits)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = qnn.QuantReLU(bit_width=bits, return_quant_tensor=True)
        self.conv2 = convolution(channels, channels, 1, weight_quant, bits)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                convolution(in_channels, channels, stride, weight_quant, bits, kernel_size=1),
                nn.BatchNorm2d(channels),
                qnn.QuantIdentity(act_quant=shared_quant, bit_width=bits, return_quant_tensor=True)
                if shared_quant is None
                else qnn.QuantIdentity(act_quant=shared_quant, return_quant_tensor=True),
            )
            shared_quant = self.shortcut[-1].act_quant
        self.quant = qnn.QuantIdentity(act_quant=shared_quant, return_quant_tensor=True)
        self.relu2 = qnn.QuantReLU(
            bit_width=bits, restrict_scaling_type=RestrictValueType.LOG_FP, return_quant_tensor=True
        )

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.quant(self.bn2(self.conv2(out)))
        rest = self.shortcut(x)
        assert isinstance(rest, QuantTensor) and isinstance(out, brevitas.quant_tensor.QuantTensor)
        return self.relu2(out + rest)


class Residual(nn.Module):
    def __init__(self, bits=4, weight_quant=Int8WeightPerChannelFloat):
        super().__init__()
        self.quant_in = qnn.QuantIdentity(act_quant=brevitas.quant.scaled_int.Int8ActPerTensorFloat)
        self.conv = convolution(3, 8, 1, brevitas.quant.Int8WeightPerTensorFloat, 8)
        self.bn = nn.BatchNorm2d(8)
        self.relu = brevitas.nn.QuantReLU(bit_width=bits, return_quant_tensor=True)
        act_quant = brevitas.quant.scaled_int.Int8ActPerTensorFloat
        self.block1 = Block(8, 16, 2, bits, weight_quant, act_quant)
        self.block2 = Block(16, 16, 1, bits, weight_quant, self.block1.quant.act_quant)
        self.pool = qnn.TruncAvgPool2d(kernel_size=4, trunc_quant=TruncTo8bit)
        self.linear = qnn.QuantLinear(16, 10, bias=True, weight_quant=Int8WeightPerTensorFloat)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant_in(x))))
        x = self.block1(x)
        self.pooled = self.pool(x)
        return self.linear(self.pooled.flatten(1))


torch.manual_seed(0)
model = Residual()
images = torch.randn(4, 3, 8, 8)
model(images).sum().backward()
model.eval()
out = model(images)
assert out.shape == (4, 10)
assert isinstance(model.pooled, IntQuantTensor)
again = Residual()
again.load_state_dict(model.state_dict())
assert torch.equal(again.eval()(images), out)
