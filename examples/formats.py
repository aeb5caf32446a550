"""One trained weight matrix in every number format: bits against signal-to-noise ratio.

python examples/formats.py --output demo_output
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from qframework import quantizers as q
from qframework.layers import QuantIdentity, QuantLinear

#: Family, label, quantizer, keywords, bits of a weight with its share of a group's scale and zero point.
CHOICES = [
    *(("integer, per tensor", f"int{b}", q.Int8WeightPerTensorFloat, {"bit_width": b}, b) for b in (2, 3, 4, 6, 8)),
    *(("integer, per channel", f"int{b}", q.Int8WeightPerChannelFloat, {"bit_width": b}, b) for b in (2, 3, 4, 6, 8)),
    *(("integer, least squares", f"int{b} MSE", q.Int8WeightPerChannelFloatMSE, {"bit_width": b}, b) for b in (2, 3, 4)),
    *(("integer, zero point", f"uint{b}", q.ShiftedUint8WeightPerChannelFloat, {"bit_width": b}, b) for b in (2, 4, 8)),
    *(("integer, power of two", f"int{b}", q.Int8WeightPerChannelFixedPoint, {"bit_width": b}, b) for b in (3, 4, 8)),
    *(("integer, groups of 32", f"int{b}", q.Int8WeightPerGroupFloat, {"bit_width": b}, b + 16 / 32) for b in (2, 4, 8)),
    ("binary and ternary", "binary", q.SignedBinaryWeightPerTensorConst, {}, 1),
    ("binary and ternary", "ternary", q.SignedTernaryWeightPerTensorConst, {}, 2),
    ("minifloat, per channel", "e4m3", q.Fp8e4m3OCPWeightPerChannelFloat, {}, 8),
    ("minifloat, per channel", "e5m2", q.Fp8e5m2OCPWeightPerChannelFloat, {}, 8),
    ("minifloat, per channel", "e3m2", q.Fp6e3m2OCPWeightPerChannelFloat, {}, 6),
    ("minifloat, per channel", "e2m3", q.Fp6e2m3OCPWeightPerChannelFloat, {}, 6),
    ("minifloat, per channel", "e2m1", q.Fp4e2m1OCPWeightPerChannelFloat, {}, 4),
    ("microscaling", "MXFP8 e4m3", q.MXFloat8e4m3Weight, {}, 8 + 8 / 32),
    ("microscaling", "MXFP6 e2m3", q.MXFloat6e2m3Weight, {}, 6 + 8 / 32),
    ("microscaling", "MXFP4", q.MXFloat4e2m1Weight, {}, 4 + 8 / 32),
    ("microscaling", "MXINT8", q.MXInt8OCPWeight, {}, 8 + 8 / 32),
    ("microscaling", "NVFP4", q.NVFloat4Weight, {}, 4 + 8 / 16),
    ("codebook", "NF4, groups of 64", q.NF4WeightPerGroupFloat, {}, 4 + 16 / 64),
    ("codebook", "APoT 4", q.APoT4WeightPerChannelFloat, {}, 4),
    ("accumulator-aware", "A2Q int8, 16 bits", q.Int8AccumulatorAwareWeightQuant, {"accumulator_bit_width": 16}, 8),
]  # fmt: skip


def trained_weight() -> torch.Tensor:
    """The first weight matrix of a float network, trained on handwritten digits."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model[0].weight.detach()


def quantized(weight: torch.Tensor, quantizer, keywords) -> torch.Tensor:
    """The weight by a quantizer, in a layer."""
    keywords = {f"weight_{k}": v for k, v in keywords.items()}
    layer = QuantLinear(*reversed(weight.shape), bias=False, weight_quant=quantizer, **keywords)
    layer.load_state_dict({"weight": weight})
    layer.eval()
    x = QuantIdentity(q.Uint8ActPerTensorFloatMaxInit, max_val=1.0, return_quant_tensor=True)
    return layer.quant_weight(x(torch.rand(1, weight.shape[1]))).value.detach()


def noise_ratio(weight: torch.Tensor, other: torch.Tensor) -> float:
    """``10 log10(sum w^2 / sum (w - q)^2)``, dB."""
    return float(10 * torch.log10(weight.square().sum() / (weight - other).square().sum()))


def plot(rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for family in dict.fromkeys(r[0] for r in rows):
        points = sorted((bits, ratio) for f, _, bits, ratio in rows if f == family)
        axes.plot(*zip(*points, strict=True), marker="o", label=family, linewidth=1)
    axes.set(xlabel="bits a weight", ylabel="signal-to-noise ratio, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    output = parser.parse_args().output
    weight = trained_weight()
    rows = []
    for family, label, quantizer, keywords, bits in CHOICES:
        ratio = noise_ratio(weight, quantized(weight, quantizer, keywords))
        rows.append((family, label, bits, ratio))
    shape = "x".join(map(str, weight.shape))
    table = Table(title=f"A {shape} weight matrix of a digits network in every family")
    for heading, justify in (
        ("family", "left"),
        ("format", "left"),
        ("bits", "right"),
        ("SNR, dB", "right"),
    ):
        table.add_column(heading, justify=justify)
    for family, label, bits, ratio in sorted(rows, key=lambda r: (r[2], -r[3])):
        table.add_row(family, label, f"{bits:.2f}", f"{ratio:.1f}")
    Console().print(table)
    output.mkdir(parents=True, exist_ok=True)
    plot(rows, output / "formats.png")
    print(f"Plotted in {output / 'formats.png'}")


if __name__ == "__main__":
    main()
