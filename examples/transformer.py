"""A small transformer encoder reads handwritten digits row by row: float against 8 and 4 bits.

Each image of 8 x 8 pixels is a sequence of 8 rows. The float model is trained; its weights are carried over into
models whose matrix products are quantized, which are calibrated and trained on.

    python examples/transformer.py [--epochs 12]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantTransformerEncoderLayer
from qframework.quantizers import Int8WeightPerChannelFloat

WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 64, 2


class RowReader(nn.Module):
    """Rows become vectors with their place added; the encoder mixes them; their mean is classified."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(8, WIDTH))
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.classify = nn.Linear(WIDTH, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Scores of the ten digits for images of shape (N, 8, 8)."""
        return self.classify(self.encoder(self.embed(rows) + self.place).mean(1))


def quantized(bits: int) -> RowReader:
    """Every operand of every matrix product of the encoder in `bits` bits; attention weights keep 8."""
    layer = QuantTransformerEncoderLayer(
        WIDTH,
        HEADS,
        HIDDEN,
        dropout=0.0,
        batch_first=True,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=bits,
        input_bit_width=bits,
        self_attn_q_scaled_bit_width=bits,
        self_attn_k_transposed_bit_width=bits,
        self_attn_v_bit_width=bits,
    )
    return RowReader(layer)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """AdamW with a cosine schedule, batches of 64."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images that are recognized."""
    right = 0
    with qframework.frozen(model.eval()), torch.no_grad():  # weights are quantized once
        for images, labels in zip(x.split(128), y.split(128), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return 100.0 * right / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of each training (default 12)")
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.tensor(a) for a in split)
    x, x_test = x.float().view(-1, 8, 8), x_test.float().view(-1, 8, 8)

    table = Table(title="Handwritten digits, row by row, 450 unseen images")
    for heading in ("encoder", "calibrated", "trained"):
        table.add_column(heading, justify="right")
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    reader = RowReader(layer)
    train(reader, x, y, epochs, 4e-3)
    table.add_row("float32", "", f"{accuracy(reader, x_test, y_test):.1f} %")
    for bits in (8, 4):
        model = quantized(bits)
        model.load_state_dict(reader.state_dict())
        with torch.no_grad(), calibration_mode(model):
            for batch in x[:512].split(64):
                model(batch)
        calibrated = accuracy(model, x_test, y_test)
        train(model, x, y, epochs // 2, 1e-3)
        trained = accuracy(model, x_test, y_test)
        table.add_row(f"{bits} bits", f"{calibrated:.1f} %", f"{trained:.1f} %")
    Console().print(table)
    Console().print(model.encoder.layers[0])


if __name__ == "__main__":
    main()
