"""Networks of fully connected layers with 1 to 4 bits, trained for a step."""

import torch
from brevitas.nn import QuantIdentity, QuantLinear
from quantizers_in_common import ActFromBits, WeightFromBits
from torch import nn


class FullyConnected(nn.Module):
    def __init__(self, weight_bits, act_bits, first_bits=8, widths=(64, 64)):
        super().__init__()
        self.layers = nn.ModuleList([QuantIdentity(act_quant=ActFromBits, bit_width=first_bits)])
        features = 36
        for width in widths:
            self.layers.append(
                QuantLinear(
                    in_features=features,
                    out_features=width,
                    bias=False,
                    weight_quant=WeightFromBits,
                    weight_bit_width=weight_bits,
                )
            )
            self.layers.append(nn.BatchNorm1d(width))
            self.layers.append(QuantIdentity(act_quant=ActFromBits, bit_width=act_bits))
            features = width
        self.layers.append(
            QuantLinear(features, 10, bias=False, weight_quant=WeightFromBits, weight_bit_width=weight_bits)
        )
        for module in self.modules():
            if isinstance(module, QuantLinear):
                nn.init.uniform_(module.weight.data, -1, 1)

    def clip(self):
        for module in self.modules():
            if isinstance(module, QuantLinear):
                module.weight.data.clamp_(-1, 1)

    def forward(self, images):
        x = 2.0 * images.flatten(1) - 1.0
        for layer in self.layers:
            x = layer(x)
        return x


RESULTS = {}
for weight_bits, act_bits in ((1, 1), (1, 2), (2, 2), (4, 4)):
    torch.manual_seed(0)
    model = FullyConnected(weight_bits, act_bits)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images, labels = torch.rand(16, 1, 6, 6), torch.randint(0, 10, (16,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        model.clip()
        losses.append(loss.item())
    weight = model.layers[1].quant_weight()
    assert len(weight.value.unique()) <= 2**weight_bits
    RESULTS[f"{weight_bits}w{act_bits}a"] = losses[-1] / losses[0]

assert all(ratio < 1 for ratio in RESULTS.values()), RESULTS
