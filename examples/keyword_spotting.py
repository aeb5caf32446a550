"""Recurrent networks of the size that spots keywords read handwritten digits row by row, at 8 and 4 bits.

Each image of 8 x 8 pixels is a sequence of 8 rows. The float network is trained; the quantized ones take its weights,
are calibrated, and trained on.

    python examples/keyword_spotting.py [--epochs 12]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantGRU, QuantLinear, QuantLSTM
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

HIDDEN = 32


class Reader(nn.Module):
    """A recurrent layer reads the rows; its last output is classified."""

    def __init__(self, recurrent: nn.Module, classify: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.classify = recurrent, classify

    def forward(self, rows: Tensor) -> Tensor:
        """Scores of the ten digits for images of shape (N, 8, 8)."""
        return self.classify(self.recurrent(rows)[0][:, -1])


def quantized(kind: type[nn.Module], bits: int) -> Reader:
    """Weights, states and gates in `bits` bits, accumulators in 8 more."""
    widths = {f"{n}_bit_width": bits for n in ("weight", "io", "sigmoid", "tanh")}
    state = {"cell_state_bit_width": bits + 4} if kind is QuantLSTM else {}
    recurrent = kind(
        8,
        HIDDEN,
        batch_first=True,
        weight_quant=Int8WeightPerChannelFloat,
        gate_acc_bit_width=bits + 8,
        **widths,
        **state,
    )
    classify = QuantLinear(
        HIDDEN,
        10,
        weight_bit_width=bits,
        input_quant=Int8ActPerTensorFloat,
        input_bit_width=bits,
    )
    return Reader(recurrent, classify)


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> nn.Module:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = 0
    with qframework.frozen(model), torch.no_grad():  # weights are quantized once
        for sounds, words in zip(x.split(64), y.split(64), strict=True):
            right += int((model(sounds).argmax(1) == words).sum())
    return right / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of the float network")
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    table = Table(title="Digits read row by row")
    for heading in ("network", "bits", "calibrated", "trained on"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, kind, float_kind in (("LSTM", QuantLSTM, nn.LSTM), ("GRU", QuantGRU, nn.GRU)):
        floats = Reader(float_kind(8, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 10))
        trained(floats, x[train], y[train], epochs, 5e-3)
        table.add_row(name, "float", "", f"{accuracy(floats, x[test], y[test]):.1%}")
        for bits in (8, 4):
            model = quantized(kind, bits)
            model.load_state_dict(floats.state_dict(), strict=False)
            with torch.no_grad(), calibration_mode(model):
                model(x[train[:256]])
            before = accuracy(model.eval(), x[test], y[test])
            trained(model, x[train], y[train], max(epochs // 4, 1), 2e-3)
            after = accuracy(model, x[test], y[test])
            table.add_row(name, str(bits), f"{before:.1%}", f"{after:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
