"""Inverted residuals around one shared activation quantizer, and a head whose weights are a Hadamard matrix."""

import torch
from brevitas.inject.enum import RestrictValueType, ScalingImplType
from brevitas.nn import *
from brevitas.nn.quant_layer import ActQuantType, WeightQuantType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import nn

SHARED_BITS = 5


class SignedAct(Int8ActPerTensorFloat):
    scaling_min_val = 2e-16
    restrict_scaling_type = RestrictValueType.LOG_FP


class UnsignedAct(Uint8ActPerTensorFloat):
    scaling_impl_type = ScalingImplType.CONST
    max_val = 6.0


class Bottleneck(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shared: QuantIdentity,
        weight_quant: WeightQuantType = Int8WeightPerChannelFloat,
        act_quant: ActQuantType = UnsignedAct,
        bits: int = 4,
    ):
        super().__init__()
        wide = 3 * in_channels
        common = {"bias": False, "weight_quant": weight_quant, "weight_bit_width": bits}
        self.body = nn.Sequential(
            QuantConv2d(in_channels, wide, 1, **common),
            nn.BatchNorm2d(wide),
            QuantReLU(act_quant=act_quant, bit_width=bits, return_quant_tensor=True),
            QuantConv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, **common),
            nn.BatchNorm2d(wide),
            QuantReLU(act_quant=act_quant, bit_width=bits, return_quant_tensor=True),
            QuantConv2d(wide, out_channels, 1, **common),
            nn.BatchNorm2d(out_channels),
        )
        self.shared = shared
        self.identity = stride == 1 and in_channels == out_channels

    def forward(self, x):
        out = self.shared(self.body(x))
        return self.shared(out + x) if self.identity else out


class Network(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = QuantConv2d(3, 8, 3, stride=2, padding=1, weight_bit_width=8, bias=False)
        self.shared = QuantIdentity(act_quant=SignedAct, bit_width=SHARED_BITS, return_quant_tensor=True)
        self.blocks = nn.Sequential(
            Bottleneck(8, 8, 1, self.shared),
            Bottleneck(8, 12, 2, self.shared),
            Bottleneck(12, 12, 1, self.shared),
        )
        self.pool = TruncAvgPool2d(kernel_size=4, bit_width=SHARED_BITS)
        self.head = HadamardClassifier(12, classes)

    def forward(self, x):
        x = self.pool(self.blocks(self.shared(self.stem(x))))
        return self.head(x.flatten(1))


torch.manual_seed(0)
model = Network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
losses = []
for _ in range(15):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(20 * model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]
assert "head.scale" in model.state_dict() and "head.proj" not in model.state_dict()
assert model.blocks[1].body[3].quant_weight().scale.shape == (24, 1, 1, 1)
