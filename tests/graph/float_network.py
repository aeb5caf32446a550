"""A small float network with norms, a shortcut and a pool, for tests of whole models."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return net.eval()


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
