"""The overview of quantized convolutions, from one seed on: every number to the digits that it is printed with.

One continuous session, because each step draws from the random numbers that the ones before it left.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qframework.layers import QuantConv2d, QuantIdentity
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8Bias,
    Int8BiasPerTensorFloatInternalScaling,
)

PRINTED = json.loads((Path(__file__).parents[1] / "data" / "overview_outputs.json").read_text())


def half_unit(text: str) -> float:
    mantissa, _, exponent = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 0.5000001 * 10.0 ** (int(exponent or 0) - decimals)


def agrees(printed: list[str], numbers: Tensor) -> None:
    flat = numbers.detach().double().flatten()
    assert len(printed) == len(flat)
    # One rounding of float32: torch's random weights and sums of products differ by it between versions.
    rounding = 2.0**-24 * flat.abs().max().item()
    for text, number in zip(printed, flat.tolist(), strict=True):
        assert abs(float(text) - number) <= half_unit(text) + rounding


def matches(step: int, result: Tensor | IntQuantTensor) -> None:
    printed = PRINTED[str(step)]
    if isinstance(result, IntQuantTensor):
        for field in ("value", "scale", "zero_point", "bit_width"):
            agrees(printed[field], getattr(result, field))
    else:
        assert isinstance(result, Tensor)
        agrees(printed["value"], result)


def conv(bias: bool = False, **options: object) -> QuantConv2d:
    return QuantConv2d(in_channels=2, out_channels=3, kernel_size=(3, 3), bias=bias, **options)


def test_the_whole_overview_gives_the_printed_numbers() -> None:
    torch.manual_seed(0)
    default = conv()
    enabled = [
        getattr(default, f"{t}_quant").is_quant_enabled
        for t in ("weight", "bias", "input", "output")
    ]
    assert enabled == [True, False, False, False]
    matches(4, default(torch.randn(1, 2, 5, 5)))

    torch.manual_seed(0)
    disabled = conv(weight_quant=None)
    torch.manual_seed(0)
    plain = nn.Conv2d(2, 3, (3, 3), bias=False)
    image = torch.randn(1, 2, 5, 5)
    assert torch.equal(disabled(image), plain(image))

    weight = default.quant_weight()
    matches(6, weight)
    by_hand = (weight.int() - default.weight_quant.zero_point()) * default.weight_quant.scale()
    assert torch.isclose(weight.value, by_hand).all()
    assert weight.is_valid

    act = QuantIdentity(return_quant_tensor=True)
    first, second = act(torch.randn(1, 2, 5, 5)), act(torch.randn(1, 2, 5, 5))
    assert first.is_valid
    assert second.is_valid
    agrees(PRINTED["9"]["value"], torch.stack([first.scale, second.scale]))
    total = first + second
    matches(10, total)
    assert not total.is_valid

    quantized = QuantIdentity(return_quant_tensor=True)(torch.randn(1, 3, 4, 4))
    matches(12, torch.nn.functional.max_pool2d(quantized, kernel_size=2, stride=2))
    matches(13, torch.tanh(quantized))

    with_input = conv(input_quant=Int8ActPerTensorFloat, return_quant_tensor=True)
    out = with_input(torch.randn(1, 2, 5, 5))
    matches(14, out)
    assert out.is_valid

    integers = torch.randint(low=-(2**7), high=2**7 - 1, size=(1, 2, 5, 5))
    own = IntQuantTensor(
        (integers - 0.0) * 0.0001,
        scale=torch.tensor(0.0001),
        zero_point=torch.tensor(0.0),
        bit_width=torch.tensor(8.0),
        signed=True,
        training=True,
    )
    matches(16, own)
    assert own.is_valid

    out = conv(return_quant_tensor=True)(own)
    matches(18, out)
    assert out.is_valid
    matches(20, with_input(own))

    out = conv(output_quant=Int8ActPerTensorFloat, return_quant_tensor=True)(
        torch.randn(1, 2, 5, 5)
    )
    matches(21, out)
    assert out.is_valid

    with_bias = conv(bias=True, bias_quant=Int8Bias, return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="QuantLayer is not correctly configured"):
        with_bias(torch.randn(1, 2, 5, 5))
    matches(24, with_bias(own))

    both = conv(
        bias=True, input_quant=Int8ActPerTensorFloat, bias_quant=Int8Bias, return_quant_tensor=True
    )
    matches(25, both(torch.randn(1, 2, 5, 5)))
    matches(26, both(own))

    late = conv(
        bias=True, output_quant=Int8ActPerTensorFloat, bias_quant=Int8Bias, return_quant_tensor=True
    )
    with pytest.raises(RuntimeError, match="Input scale required"):
        late(torch.randn(1, 2, 5, 5))

    internal = conv(bias=True, bias_quant=Int8BiasPerTensorFloatInternalScaling)
    matches(28, internal(torch.randn(1, 2, 5, 5)))

    out = conv(bias=True, input_quant=Int8ActPerTensorFloat, return_quant_tensor=True)(
        torch.randn(1, 2, 5, 5)
    )
    matches(29, out)
    assert out.is_valid

    implicit = conv(bias=True, input_quant=Int8ActPerTensorFloat, bias_quant=Int8Bias)
    matches(31, implicit(torch.randn(1, 2, 5, 5)))
