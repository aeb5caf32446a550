"""The network that is measured, from any library's layers: ResNet-18's shape for images of 32 x 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Make = Callable[..., nn.Module]


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, conv: Make, relu: Make) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(outputs), relu()
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), relu()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = conv(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Any:
        """The block's result."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """A stem, eight blocks of widths 32 to 256, a linear head: 17 activations, 2.8 million weights.

    Args:
        conv, relu, linear: make a layer, with the arguments of torch's.
    """

    def __init__(self, conv: Make, relu: Make, linear: Make) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), relu())
        blocks, width = [], 32
        for outputs in (32, 64, 128, 256):
            for stride in (1 if outputs == 32 else 2, 1):
                blocks.append(Block(width, outputs, stride, conv, relu))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = linear(256, 10)

    def forward(self, x: Tensor) -> Any:
        """Logits, shape (N, 10), of images of shape (N, 3, 32, 32)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def float_network() -> Network:
    """The network of torch's own layers."""
    return Network(nn.Conv2d, nn.ReLU, nn.Linear)
