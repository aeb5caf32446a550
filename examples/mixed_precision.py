"""Learns how many bits each weight needs, under a budget for the whole model, on handwritten digits.

python examples/mixed_precision.py --bits 3.5
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from qframework.graph.loss import WeightBitWidthWeightedBySize
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import Int8WeightPerChannelLSQ, Uint8ActPerTensorFloat


class LearnedWidth(Int8WeightPerChannelLSQ):
    """Weights whose step and width are learned."""

    bit_width_impl_type = "parameter"
    bit_width = 8
    min_bit_width = 2


def network() -> torch.nn.Sequential:
    activations = {"act_quant": Uint8ActPerTensorFloat, "bit_width": 6, "collect_stats_steps": 30}
    return torch.nn.Sequential(
        QuantIdentity(**activations),
        QuantConv2d(1, 16, 3, padding=1, weight_quant=LearnedWidth),
        QuantReLU(**activations),
        torch.nn.MaxPool2d(2),
        QuantConv2d(16, 32, 3, padding=1, weight_quant=LearnedWidth),
        QuantReLU(**activations),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        QuantLinear(128, 64, weight_quant=LearnedWidth),
        QuantReLU(**activations),
        QuantLinear(64, 10, weight_quant=LearnedWidth),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=3.5, help="mean bits a weight may have")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]

    model = network()
    size = WeightBitWidthWeightedBySize(model)
    widths = [p for n, p in model.named_parameters() if n.endswith("bit_width_offset")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bit_width_offset")]
    optimizer = torch.optim.Adam([{"params": others, "lr": 2e-3}, {"params": widths, "lr": 3e-2}])
    for epoch in range(arguments.epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            size.zero_accumulated_values()
            task = cross_entropy(model(x[batch]), y[batch])
            over = (size.retrieve() - arguments.bits).clamp_min(0)  # no penalty within the budget
            optimizer.zero_grad()
            (task + over).backward()
            optimizer.step()
        size.zero_accumulated_values()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
        model.train()
        mean = float(size.retrieve().detach())
        print(f"epoch {epoch + 1:2}  accuracy {accuracy:.3f}  mean bits {mean:.2f}")
    for name, bits in size.log().items():
        print(f"{name:>16}: {bits:.0f} bits")
    print(f"accuracy {accuracy:.3f} at {mean:.2f} bits a weight; the budget was {arguments.bits}")


if __name__ == "__main__":
    main()
