"""A stack of binary convolutions behind an 8-bit input with a scale that is a power of two."""

import brevitas.nn as qnn
import brevitas.core.restrict_val as restrictions
import torch
import torch.nn as nn
from quantizers_in_common import ActFromBits, WeightFromBits

CHANNELS = [(16, False), (16, True), (32, False)]


class Convolutions(nn.Module):
    def __init__(self, weight_bit_width=1, act_bit_width=1, in_bit_width=8, in_channels=3, classes=10):
        super().__init__()
        self.features = nn.ModuleList()
        self.features.append(
            qnn.QuantIdentity(
                act_quant=ActFromBits,
                bit_width=in_bit_width,
                min_val=-1.0,
                max_val=1.0 - 2.0**-7,
                narrow_range=False,
                restrict_scaling_type=restrictions.RestrictValueType.POWER_OF_TWO,
            )
        )
        for out_channels, pools in CHANNELS:
            self.features.append(
                qnn.QuantConv2d(
                    kernel_size=3,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    bias=False,
                    weight_quant=WeightFromBits,
                    weight_bit_width=weight_bit_width,
                )
            )
            in_channels = out_channels
            self.features.append(nn.BatchNorm2d(in_channels, eps=1e-4))
            self.features.append(qnn.QuantIdentity(act_quant=ActFromBits, bit_width=act_bit_width))
            if pools:
                self.features.append(nn.MaxPool2d(kernel_size=2))
        self.classifier = qnn.QuantLinear(
            32 * 4 * 4, classes, bias=False, weight_quant=WeightFromBits, weight_bit_width=weight_bit_width
        )
        for module in self.modules():
            if isinstance(module, (qnn.QuantConv2d, qnn.QuantLinear)):
                nn.init.uniform_(module.weight.data, -1, 1)

    def forward(self, x):
        x = 2.0 * x - torch.tensor([1.0], device=x.device)
        for module in self.features:
            x = module(x)
        return self.classifier(x.reshape(x.shape[0], -1))


torch.manual_seed(0)
for bits in (1, 2):
    model = Convolutions(bits, bits)
    out = model(torch.rand(4, 3, 16, 16))
    assert out.shape == (4, 10)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
    scale = model.features[0].act_quant.scale()
    assert scale == 2.0**-7
