"""A small float network with a shortcut, a concatenation, grouped and transposed convolutions, for post-training quantization."""

import torch
from torch import nn

import qframework.quantizers as quantizers
from qframework.graph import calibration_mode, quantize_model


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.r = nn.ReLU()
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.t = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.d = nn.Conv2d(12, 4, 3, groups=2)
        self.f = nn.Linear(4, 5)

    def forward(self, x):
        r = self.r(self.a(x))
        y = self.r(self.t(r + self.b(r)))
        return self.f(self.d(torch.cat([y, -y], 1)).mean((2, 3)))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def quantized(net: nn.Module, weight: str = "Int8WeightPerChannelFloat", **keywords):
    bits = {"weight_bit_width": 4} if "Int8" in weight or "Uint8" in weight else {}
    model, _ = quantize_model(
        net,
        weight_quant=getattr(quantizers, weight),
        input_quant=quantizers.Int8ActPerTensorFloat,
        act_quant=None,
        **{**bits, **keywords},
    )
    model.eval()
    with torch.no_grad(), calibration_mode(model):
        for x in batches():
            model(x)
    return model


def sqnr(net: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        a = torch.cat([net(x) for x in batches()])
        b = torch.cat([model(x) for x in batches()])
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))
