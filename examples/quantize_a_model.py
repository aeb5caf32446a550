"""A trained float network becomes a quantized one: folded, converted, calibrated, summed up.

python examples/quantize_a_model.py
"""

from __future__ import annotations

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qframework
from qframework.graph import Rule, calibration_mode, quantize_model, summary
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = 0
    with qframework.frozen(model), torch.no_grad():  # weights are quantized once
        for images, labels in zip(x.split(128), y.split(128), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(y)


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(6):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    console = Console()
    console.print(f"float: {accuracy(model, x[test], y[test]):.1%}\n")
    for bits in (8, 4):
        quantized, report = quantize_model(
            model,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=bits,
            input_quant=Int8ActPerTensorFloat,
            input_bit_width=bits,
            act_bit_width=bits,
            fold_batch_norm=True,
            rules=[Rule("0", weight_bit_width=8, input_bit_width=8)],
        )
        with torch.no_grad(), calibration_mode(quantized):
            for batch in train[:512].split(64):
                quantized(x[batch])
        quantized.eval()
        if bits == 8:
            console.print(report)
        found = summary(quantized, x[:1])
        if bits == 4:
            console.print(found)
        console.print(
            f"{bits} bits: {found.size_in_bits / 8:,.0f} bytes, {found.bops:,.0f} bit operations"
        )
        console.print(f"{bits} bits, calibrated: {accuracy(quantized, x[test], y[test]):.1%}\n")


if __name__ == "__main__":
    main()
