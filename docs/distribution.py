"""Draws docs/_static/distribution.svg, the picture of the README: python docs/distribution.py."""

from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import torch

from qframework.layers import QuantLinear
from qframework.quantizers import Int8WeightPerTensorFloat, NF4WeightPerTensorFloat

PICTURE = Path(__file__).parent / "_static" / "distribution.svg"
BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#8a8f98"


def draw() -> str:
    """The picture as text: weights before quantization, and the levels that they fall on."""
    matplotlib.rcParams |= {"svg.hashsalt": "qframework", "font.size": 10, "svg.fonttype": "path"}
    figure = matplotlib.figure.Figure(figsize=(9, 3.1), layout="constrained")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 64, generator=generator)
    kinds = (
        ("integers of 4 bits", Int8WeightPerTensorFloat, {"weight_bit_width": 4}),
        ("a codebook, 4-bit NormalFloat", NF4WeightPerTensorFloat, {}),
    )
    for axes, (title, quantizer, keywords) in zip(figure.subplots(1, 2), kinds, strict=True):
        layer = QuantLinear(64, 128, bias=False, weight_quant=quantizer, **keywords)
        layer.weight.data = weight.clone()
        levels, counts = layer.quant_weight().value.detach().unique(return_counts=True)
        axes.hist(weight.flatten().numpy(), np.linspace(-4, 4, 81), color=BLUE, alpha=0.55)
        second = axes.twinx()
        second.vlines(levels, 0, counts, color=ORANGE, linewidth=2)
        second.plot(levels, counts, "o", color=ORANGE, markersize=4)
        for a in (axes, second):
            a.set_ylim(0)
            a.set_yticks([])
            a.spines[["top", "right", "left"]].set_visible(False)
            a.tick_params(colors=GREY)
            a.patch.set_alpha(0)
        axes.set_title(title, color=GREY)
        axes.set_xlabel("weights, and the values that they become", color=GREY)
        axes.set_xlim(-4, 4)
    figure.patch.set_alpha(0)
    figure.savefig(PICTURE, metadata={"Date": None})
    return PICTURE.read_text()


if __name__ == "__main__":
    draw()
