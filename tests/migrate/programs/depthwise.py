"""Depthwise separable convolutions with a scale for each channel, an integer bias and a truncated mean."""

try:
    import brevitas.nn as qnn
    from brevitas.quant import IntBias
    from brevitas.inject.enum import *
except ImportError:
    qnn = None
from brevitas.quant.scaled_int import *
import torch
from torch import nn


class WeightPerTensor(Int8WeightPerTensorFloat):
    scaling_min_val = 2e-16
    bit_width = 4


class WeightPerChannel(WeightPerTensor):
    scaling_per_output_channel = True


class UnsignedAct(Uint8ActPerTensorFloat):
    scaling_min_val = 2e-16
    restrict_scaling_type = RestrictValueType.LOG_FP


class ConvBlock(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, weight_bit_width, act_bit_width, act_per_channel=False, **how):
        super().__init__()
        self.conv = qnn.QuantConv2d(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            padding=kernel_size // 2,
            bias=False,
            weight_quant=WeightPerChannel,
            weight_bit_width=weight_bit_width,
            **how,
        )
        self.bn = nn.BatchNorm2d(num_features=out_channels, eps=1e-5)
        shape = {}
        if act_per_channel:
            shape = {
                "scaling_per_output_type": ScalingPerOutputType.CHANNEL,
                "per_channel_broadcastable_shape": (1, out_channels, 1, 1),
                "scaling_stats_permute_dims": (1, 0, 2, 3),
            }
        self.activation = qnn.QuantReLU(
            act_quant=UnsignedAct, bit_width=act_bit_width, return_quant_tensor=True, **shape
        )

    def forward(self, x):
        return self.activation(self.bn(self.conv(x)))


class Depthwise(nn.Module):
    def __init__(self, bits=4, classes=10):
        super().__init__()
        stages, channels = [ConvBlock(3, 8, 3, 8, bits, stride=2)], 8
        for out_channels, stride in ((16, 1), (32, 2)):
            stages.append(ConvBlock(channels, channels, 3, bits, bits, True, groups=channels, stride=stride))
            stages.append(ConvBlock(channels, out_channels, 1, bits, bits))
            channels = out_channels
        self.features = nn.Sequential(*stages)
        self.final_pool = qnn.TruncAvgPool2d(
            kernel_size=4, stride=1, bit_width=bits, float_to_int_impl_type=FloatToIntImplType.FLOOR
        )
        self.output = qnn.QuantLinear(
            channels,
            classes,
            bias=True,
            bias_quant=IntBias,
            bias_bit_width=16,
            weight_quant=WeightPerTensor,
            weight_bit_width=bits,
        )

    def forward(self, x):
        x = self.final_pool(self.features(x))
        return self.output(x.view(x.shape[0], -1))


torch.manual_seed(0)
model = Depthwise()
images = torch.rand(2, 3, 16, 16)
model(images).square().sum().backward()
out = model.eval()(images)
assert out.shape == (2, 10)
assert model.features[1].conv.weight_quant.scale().shape == (8, 1, 1, 1)
assert model.features[1].activation.act_quant.scale().shape == (1, 8, 1, 1)
assert model.features[2].conv.quant_weight().bit_width == 4
