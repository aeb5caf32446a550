"""Layers as integers: what they compute is what the layer gives."""

import numpy as np
import pytest
import torch
from digits import batches, networks
from torch import nn

from qframework.graph import summary
from qframework.inspect import integers
from qframework.layers import QuantIdentity, QuantLinear
from qframework.quantizers import Int8ActPerTensorFloat, Int32Bias, MXFloat4e2m1Weight


def test_integers_give_the_result_of_the_layer() -> None:
    _, model = networks()
    layer, x = model[5], torch.rand(6, 128)
    found = integers(layer)
    codes = np.clip(np.rint(x.numpy() / found.input.scale), 0 - 128 * found.input.signed, 255)
    sums = codes @ found.weight.integers.astype(np.int64).T + found.bias.integers
    scale = found.input.scale * found.weight.scale.reshape(-1)
    assert np.allclose(sums * scale, layer(x).detach().numpy(), atol=1e-4)
    assert found.weight.integers.dtype == np.int8 and found.weight.bit_width == 4
    assert found.output is None and found.multiplier is None


def test_the_accumulator_is_as_wide_as_that_of_the_quantized_tensor() -> None:
    for bias in (None, Int32Bias):
        model = nn.Sequential(
            QuantIdentity(bit_width=5, return_quant_tensor=True),
            QuantLinear(20, 3, weight_bit_width=3, bias_quant=bias, return_quant_tensor=True),
        )
        x = torch.randn(4, 20)
        model(x)
        model.eval()
        width = int(model(x).bit_width)
        assert integers(model[1], model[0](x)).accumulator_bits == width
        layer = summary(model, x).layers[1]
        assert layer.accumulator_bits == width
        if bias is not None:
            found = [t.integers for t in layer.tensors if t.name == "bias"]
            assert found == [model[1].quant_bias().int().tolist()]
    assert summary(model).layers[1].accumulator_bits is None


def test_shifts_of_powers_of_two_and_the_multiplier() -> None:
    layer = QuantLinear(
        4, 3, bias=False, input_quant=Int8ActPerTensorFloat, output_quant=Int8ActPerTensorFloat,
        weight_restrict_scaling_type="power_of_two",
    )  # fmt: skip
    layer(torch.randn(8, 4))
    found = integers(layer.eval())
    assert float(found.weight.scale) == 2.0 ** -int(found.weight.shift)
    factor = float(found.input.scale) * float(found.weight.scale) / float(found.output.scale)
    assert found.multiplier * 2.0 ** -float(found.multiplier_shift) == pytest.approx(
        factor, rel=1e-8
    )
    assert 2**30 <= found.multiplier <= 2**31


def test_a_bias_without_an_input_says_what_to_do() -> None:
    layer = QuantLinear(4, 3, bias_quant=Int32Bias)
    with pytest.raises(RuntimeError, match="run the layer once"):
        integers(layer)
    layer(QuantIdentity(return_quant_tensor=True)(torch.randn(2, 4)))
    assert integers(layer).bias.integers.shape == (3,)


def test_what_has_no_integers_is_refused() -> None:
    with pytest.raises(ValueError, match="quantizes nothing"):
        integers(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="isn't made of integers"):
        integers(QuantLinear(32, 2, bias=False, weight_quant=MXFloat4e2m1Weight))


def test_the_summary_is_a_table_and_exports() -> None:
    _, model = networks()
    found = summary(model, batches()[0][:1])
    heading = str(found).splitlines()[0]
    assert "acc. bits" in heading and "integers" in heading
    lines = found.to_csv().splitlines()
    assert len(lines) == 1 + sum(max(1, len(x.tensors)) for x in found.layers)
    assert found.to_dict()["layers"][0]["accumulator_bits"] == found.layers[0].accumulator_bits
