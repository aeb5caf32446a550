"""A trained network through several recipes of post-training quantization, and which quantizer hurts.

python examples/ptq.py [plot.png]
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from qframework.graph import ptq, sensitivity


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
    batches = list(x[train[:512]].split(64))
    for bits in (4, 3):
        for kind in ("", "-gptq", "-gpfq", "-qronos", "-adaround"):
            quantized, report = ptq(model, batches, f"w{bits}a8{kind}")
            with torch.no_grad():
                right = float((quantized(x[test]).argmax(1) == y[test]).float().mean())
            print(
                f"w{bits}a8{kind:10} {report.sqnr:5.1f} dB {report.seconds:5.2f} s, {right:.1%} right"
            )
    print(report)
    found = sensitivity(quantized, batches)
    print(found)
    if len(sys.argv) > 1:
        found.plot().figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
