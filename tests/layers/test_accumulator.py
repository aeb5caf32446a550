"""Fewer bits for an accumulator, against integer arithmetic."""

import copy

import numpy as np
import pytest
import torch

from qframework.layers import TruncQuantAccumulator
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import RoundTo8bit, ShiftRoundSaturateTo8bit, TruncTo8bit


def accumulator(seed: int, bits: int, signed: bool, zero_point: int = 0) -> IntQuantTensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    q = torch.randint(low, high, (2, 500), generator=generator).float()
    scale = torch.tensor(0.0625)
    return IntQuantTensor((q - zero_point) * scale, scale, zero_point, bits, signed, training=False)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("out_bits", [4, 8])
@pytest.mark.parametrize("quantizer", [TruncTo8bit, RoundTo8bit])
def test_the_integers_are_those_of_a_shift(quantizer, out_bits, bits, signed) -> None:
    x = accumulator(bits, bits, signed)
    out = TruncQuantAccumulator(quantizer, bit_width=out_bits)(x)
    q, shift = x.int().numpy().astype(np.int64), bits - out_bits
    if quantizer is TruncTo8bit:
        expected = q >> shift
    else:
        expected = np.rint(q / 2**shift).astype(np.int64)
        low, high = (
            (-(2 ** (out_bits - 1)), 2 ** (out_bits - 1) - 1) if signed else (0, 2**out_bits - 1)
        )
        expected = expected.clip(low, high)
    assert np.array_equal(out.int().numpy(), expected)
    assert float(out.bit_width) == out_bits and out.signed == signed and out.is_valid
    assert float(out.scale) == 0.0625 * 2**shift


def test_a_zero_point_is_shifted_with_the_integers() -> None:
    x = accumulator(0, 10, False, zero_point=128)
    out = TruncQuantAccumulator(RoundTo8bit)(x)
    assert float(out.zero_point) == 32
    assert (out.value - x.value).abs().max() <= out.scale  # saturation costs up to one step


def test_gradients_pass_and_stop_where_it_saturates() -> None:
    x = accumulator(0, 12, True)
    value = x.value.clone().requires_grad_()
    out = TruncQuantAccumulator(RoundTo8bit)(x.set(value=value))
    out.value.sum().backward()
    kept = torch.round(x.value / out.scale) <= 127
    assert torch.equal(value.grad, kept.float()) and not kept.all()


def test_a_shift_is_learned_from_what_the_integers_reach() -> None:
    layer = TruncQuantAccumulator(ShiftRoundSaturateTo8bit, collect_stats_steps=2)
    x = accumulator(0, 12, True)
    small = x.set(bit_width=16.0)  # declared wider than it is: the plain shift would waste 4 bits
    for _ in range(3):
        layer(small)
    layer.eval()
    out = layer(small)
    assert float(out.scale.detach()) == 0.0625 * 2**4
    assert torch.equal(out.int(), TruncQuantAccumulator(RoundTo8bit)(x).int())
    other = TruncQuantAccumulator(ShiftRoundSaturateTo8bit).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(small).value, out.value)
    assert torch.equal(copy.deepcopy(layer)(small).value, out.value)


def test_few_bits_are_not_shifted_by_less_than_none() -> None:
    layer = TruncQuantAccumulator(ShiftRoundSaturateTo8bit)
    x = accumulator(0, 4, True)
    assert torch.equal(layer(x).value, x.value)


def test_floats_off_and_mistakes() -> None:
    with pytest.raises(RuntimeError, match="reduces the bits of a quantized tensor"):
        TruncQuantAccumulator()(torch.randn(3))
    x = accumulator(0, 12, True)
    assert TruncQuantAccumulator(None)(x) is x
    with pytest.raises(TypeError, match="bit_width"):
        TruncQuantAccumulator(bit_widht=4)
    with pytest.raises(ValueError, match="wrapper"):
        TruncQuantAccumulator(trunc_scaling_impl_type="wraper")
    assert float(TruncQuantAccumulator(trunc_bit_width=5).trunc_quant.bit_width()) == 5


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [TruncTo8bit, ShiftRoundSaturateTo8bit])
def test_truncation_compiles_and_exports(quantizer) -> None:
    layer = TruncQuantAccumulator(quantizer, return_quant_tensor=False).eval()
    x = accumulator(0, 12, True)
    layer.train()(x), layer.eval()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
