"""Small cases whose results other implementations of the same papers gave: tests/data/post_training.npz."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qframework.graph import bias_correction_mode
from qframework.graph.equalize import EqualizeGraph
from qframework.graph.gpfq import gpfq
from qframework.graph.gptq import gptq
from qframework.graph.magr import magr
from qframework.graph.qronos import qronos
from qframework.layers import QuantConv2d, QuantLinear
from qframework.quant_tensor import dequantize
from qframework.quantizers import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat

FILE = Path(__file__).parents[1] / "data" / "post_training.npz"


def recorded(case: str) -> dict[str, torch.Tensor]:
    with np.load(FILE) as arrays:
        start = f"{case}|"
        return {
            k.removeprefix(start): torch.tensor(arrays[k])
            for k in arrays.files
            if k.startswith(start)
        }


def load(layer: nn.Module, node: str, found: dict[str, torch.Tensor]) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(found[f"init/{node}.weight"])
        layer.bias.copy_(found[f"init/{node}.bias"])
    return layer.eval()


def linear(quantizer=Int8WeightPerChannelFloat, width: int = 24, out: int = 10, bits: int = 3):
    return QuantLinear(width, out, bias=True, weight_quant=quantizer, weight_bit_width=bits)


@pytest.mark.parametrize(
    ("case", "make", "algorithm"),
    [
        ("gptq_act_order", linear, lambda m, b: gptq(m, b, act_order=True)),
        (
            "gptq_groups",
            lambda: QuantConv2d(
                4, 6, 3, groups=2, weight_bit_width=3, weight_quant=Int8WeightPerChannelFloat
            ),  # fmt: skip
            gptq,
        ),
        ("gpfq", lambda: linear(Int8WeightPerTensorFloat), gpfq),
        ("qronos_dead_inputs", linear, qronos),
    ],
)
def test_quantized_weights_are_those_of_the_paper(case, make, algorithm) -> None:
    found = recorded(case)
    layer = load(make(), "a", found)
    algorithm(layer, list(found["x"]))
    torch.testing.assert_close(dequantize(layer.quant_weight()).detach(), found["out/q/a"])


def test_magr_gives_the_weights_of_the_paper() -> None:
    found = recorded("magr")
    layer = load(nn.Linear(16, 8), "a", found)
    magr(layer, list(found["x"]), alpha=0.1, num_steps=10)
    torch.testing.assert_close(layer.weight.detach(), found["out/w/a"], rtol=1e-4, atol=1e-5)


def test_equalization_gives_the_weights_of_the_paper() -> None:
    found = recorded("equalize")
    a, b = load(nn.Linear(10, 12), "a", found), load(nn.Linear(12, 6), "b", found)
    EqualizeGraph(merge_bias=True).apply(nn.Sequential(a, nn.ReLU(), b).eval())
    for layer, node in ((a, "a"), (b, "b")):
        torch.testing.assert_close(
            layer.weight.detach(), found[f"out/w/{node}"], rtol=1e-4, atol=1e-5
        )


def test_a_corrected_bias_is_that_of_the_paper() -> None:
    found = recorded("bias_correction")
    layer = load(linear(Int8WeightPerTensorFloat, 12, 7, 4), "a", found)
    with torch.no_grad(), bias_correction_mode(layer):
        for x in found["x"]:
            layer(x)
    torch.testing.assert_close(layer.bias.detach(), found["out/w/a.bias"], rtol=1e-4, atol=1e-5)
