"""Layers without parameters under compilers, on the meta device, in other precisions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qframework.layers as layers
from qframework.layers import (
    QuantCat,
    QuantDropout,
    QuantEltwiseAdd,
    QuantEltwiseMul,
    QuantIdentity,
    QuantMatMul,
    QuantUpsample,
    QuantUpsamplingBilinear2d,
    TruncAdaptiveAvgPool2d,
    TruncAvgPool2d,
    TruncQuantAccumulator,
)
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import ShiftRoundSaturateTo8bit


class Network(nn.Module):
    def __init__(self, layer: nn.Module, operands: str) -> None:
        super().__init__()
        self.quantize = QuantIdentity(return_quant_tensor=True)
        self.layer, self.operands = layer, operands

    def forward(self, x: Any) -> Any:
        x = self.quantize(x)
        if self.operands == "list":
            return self.layer([x, x])
        if self.operands == "two":
            return self.layer(x, x.flip(0))
        return self.layer(x.transpose(2, 3), x) if self.operands == "matrices" else self.layer(x)


QUANTIZED = {"output_quant": None, "return_quant_tensor": True}
MAKE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "average": (lambda: TruncAvgPool2d(2), "one"),
    "average with borders": (lambda: TruncAvgPool2d(3, 2, 1, True, False), "one"),
    "average, learned shift": (
        lambda: TruncAvgPool2d(2, trunc_quant=ShiftRoundSaturateTo8bit),
        "one",
    ),
    "adaptive": (lambda: TruncAdaptiveAvgPool2d((2, 1)), "one"),
    "adaptive, uneven": (lambda: TruncAdaptiveAvgPool2d(4), "one"),
    "accumulator": (lambda: TruncQuantAccumulator(bit_width=4), "one"),
    "nearest": (lambda: QuantUpsample(scale_factor=2), "one"),
    "bilinear": (lambda: QuantUpsamplingBilinear2d(scale_factor=2), "one"),
    "bicubic": (lambda: QuantUpsample(scale_factor=2, mode="bicubic"), "one"),
    "dropout": (lambda: QuantDropout(0.3), "one"),
    "add": (lambda: QuantEltwiseAdd(return_quant_tensor=True), "two"),
    "tied": (lambda: QuantEltwiseAdd(tie_input_output_quant=True), "two"),
    "multiply": (lambda: QuantEltwiseMul(**QUANTIZED), "two"),
    "cat": (lambda: QuantCat(**QUANTIZED), "list"),
    "matmul": (lambda: QuantMatMul(return_quant_tensor=True), "matrices"),
    **{
        name: (lambda name=name: getattr(layers, name)(return_quant_tensor=True), "one")
        for name in (
            "QuantReLU6",
            "QuantLeakyReLU",
            "QuantPReLU",
            "QuantELU",
            "QuantGELU",
            "QuantSiLU",
            "QuantHardSigmoid",
        )
    },
    "QuantSoftmax": (lambda: layers.QuantSoftmax(1, return_quant_tensor=True), "one"),
}


def trained(name: str, x: torch.Tensor) -> Network:
    torch.manual_seed(0)
    make, operands = MAKE[name]
    network = Network(make(), operands).to(x.dtype)
    network(x)
    return network


def plain(y: Any) -> torch.Tensor:
    return y.value if isinstance(y, IntQuantTensor) else y


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precisions_keep_their_type_and_stay_valid(name, dtype) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    network = trained(name, x)
    for mode in (True, False):
        y = network.train(mode)(x)
        assert plain(y).dtype == dtype
        assert not isinstance(y, IntQuantTensor) or y.is_valid


@pytest.mark.parametrize("name", MAKE)
def test_the_meta_device_gives_shapes(name) -> None:
    x = torch.randn(2, 3, 6, 6)
    network = trained(name, x)
    for mode in (True, False):
        network.train(mode)
        on_meta = copy.deepcopy(network).to("meta")(x.to("meta"))
        assert type(on_meta) is type(network(x))
        assert plain(on_meta).shape == plain(network(x)).shape


@pytest.mark.slow
@pytest.mark.table(3)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MAKE)
def test_compiled_in_one_graph_and_exported_they_are_the_same(name, mode) -> None:
    x = torch.randn(2, 3, 6, 6)
    network = trained(name, x).train(mode)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, network):
        torch.manual_seed(1)
        results.append(function(x))
    got, expected = results
    assert type(got) is type(expected)
    torch.testing.assert_close(plain(got), plain(expected))
    if isinstance(expected, IntQuantTensor):
        torch.testing.assert_close(got.scale, expected.scale)
        assert torch.equal(got.bit_width, expected.bit_width) and got.signed == expected.signed
    if not mode:
        exported = torch.export.export(network, (x,)).module()
        torch.testing.assert_close(plain(exported(x)), plain(expected))
