"""Attention and the transformer encoder again in integers."""

from __future__ import annotations

import math

import pytest
import torch
from integer_attention import attend, encoder_layer, multihead
from integer_machine import (
    ARITHMETIC,
    Integers,
    assert_same,
    enlarge,
    grid_of,
    quantize,
    requantize,
    settle,
    varied,
)

from qframework.layers import (
    QuantMultiheadAttention,
    QuantScaledDotProductAttention,
    QuantTransformerEncoderLayer,
)
from qframework.quantizers import ShiftedUint8ActPerTensorFixedPoint, Uint8ActPerTensorFixedPoint

B, HEADS, L, S, E = 2, 2, 5, 7, 8
MASKS = ("none", "bool", "float", "causal", "nothing left")
BITS = (8, 4)


def settled(layer, *args, **kwargs):
    """The result in evaluation after calibration."""
    settle(layer, *args, **kwargs)
    with torch.no_grad():
        return layer(*args, **kwargs)


def mask_of(kind: str, queries: int, keys: int, dtype: torch.dtype):
    """A mask where true is out of bounds, or a float one."""
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(queries, keys, dtype=torch.bool).triu(1)
    blocked = torch.rand(queries, keys) < 0.4
    blocked[:, 0] = False
    if kind == "nothing left":
        blocked[1] = True
    if kind == "float":
        # quarters, which a sum with powers of two doesn't round
        bias = torch.randint(-8, 9, (queries, keys)) / 4
        return bias.masked_fill(blocked, -math.inf).to(dtype)
    return blocked


def weights_as_codes(layer, weights: torch.Tensor) -> torch.Tensor:
    grid = grid_of(layer.attn_output_weights_quant.act_quant)
    return torch.round(weights.double() / grid.scale).long()


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantized_scores", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_its_integer_machine(mask, quantized_scores, bits, arithmetic) -> None:
    torch.manual_seed(10 + bits)
    (_, signed, unsigned), dtype = ARITHMETIC[arithmetic]
    layer = QuantScaledDotProductAttention(
        softmax_input_quant=signed if quantized_scores else None,
        attn_output_weights_quant=unsigned,
        q_scaled_quant=signed,
        k_transposed_quant=signed,
        v_quant=signed,
        sdpa_output_quant=signed,
        return_quant_tensor=True,
        q_scaled_bit_width=bits,
        k_transposed_bit_width=bits,
        v_bit_width=bits,
        attn_output_weights_bit_width=bits,
        **({"softmax_input_bit_width": bits} if quantized_scores else {}),
    ).to(dtype)
    q, k, v = (torch.randn(B, HEADS, n, E, dtype=dtype) for n in (L, S, S))
    given = mask_of(mask, L, S, dtype)
    if mask == "causal":
        out = settled(layer, q, k, v, is_causal=True)
    else:
        bool_mask = given is not None and given.dtype == torch.bool
        out = settled(layer, q, k, v, attn_mask=~given if bool_mask else given)
    holders = layer.q_scaled_quant, layer.k_transposed_quant, layer.v_quant
    scaled = q * (1 / math.sqrt(E))  # in the dtype of the layer: what enters is given
    operands = (quantize(h.act_quant, t) for h, t in zip(holders, (scaled, k, v), strict=True))
    expected = requantize(layer.sdpa_output_quant.act_quant, attend(layer, *operands, given)[0])
    assert_same(out, expected)
    assert varied(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_so_it_is_with_zero_points_and_heads_that_share_keys(dtype) -> None:
    torch.manual_seed(0)
    shifted = ShiftedUint8ActPerTensorFixedPoint
    layer = QuantScaledDotProductAttention(
        attn_output_weights_quant=Uint8ActPerTensorFixedPoint,
        q_scaled_quant=shifted,
        k_transposed_quant=shifted,
        v_quant=shifted,
        sdpa_output_quant=shifted,
        return_quant_tensor=True,
    ).to(dtype)
    q = torch.randn(B, 2 * HEADS, L, 4, dtype=dtype) + 0.5
    k, v = (torch.randn(B, HEADS, S, 4, dtype=dtype) - 0.3 for _ in range(2))
    out = settled(layer, q, k, v, enable_gqa=True)
    holders = layer.q_scaled_quant, layer.k_transposed_quant, layer.v_quant
    q, k, v = (quantize(h.act_quant, t) for h, t in zip(holders, (q / 2, k, v), strict=True))
    assert all(int(t.zero) != 0 for t in (q, k, v))
    k, v = (t.view(lambda codes: codes.repeat_interleave(2, 1)) for t in (k, v))
    expected = requantize(layer.sdpa_output_quant.act_quant, attend(layer, q, k, v, None)[0])
    assert_same(out, expected)
    assert varied(expected)


PROJECTIONS = {
    "packed": {},
    "apart": {"packed_in_proj": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("projections", PROJECTIONS)
def test_multihead_attention_is_its_integer_machine(projections, mask, arithmetic) -> None:
    seed = MASKS.index(mask)
    torch.manual_seed(seed)
    quantizers, dtype = ARITHMETIC[arithmetic]
    layer = QuantMultiheadAttention(
        E,
        HEADS,
        batch_first=True,
        return_quant_tensor=True,
        **PROJECTIONS[projections],
        **attention_quantizers(quantizers, BITS[seed % 2]),
    ).to(dtype)
    enlarge(layer)
    query, key = torch.randn(B, L, E, dtype=dtype), torch.randn(B, S, E, dtype=dtype)
    given = mask_of(mask, L, S, dtype)
    out, weights = settled(layer, query, key, key, attn_mask=given, average_attn_weights=False)
    more = 2 * (projections == "more keys")
    whole = None if given is None else torch.nn.functional.pad(given, (0, more))
    expected, shares = multihead(layer, query, key, key, whole)
    assert_same(out, expected)
    assert torch.equal(weights_as_codes(layer, weights), shares.codes)
    assert varied(expected) and varied(shares)


def attention_quantizers(quantizers, bits: int):
    weight, signed, unsigned = quantizers
    names = {
        "in_proj_weight": weight,
        "out_proj_weight": weight,
        "in_proj_input": signed,
        "out_proj_input": signed,
        "q_scaled": signed,
        "k_transposed": signed,
        "v": signed,
        "attn_output_weights": unsigned,
    }
    given = {f"{name}_quant": quantizer for name, quantizer in names.items()}
    return given | {f"{name}_bit_width": bits for name in names}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_layer_is_its_integer_machine(norm_first, padding, bits, arithmetic) -> None:
    torch.manual_seed(bits + padding)
    quantizers, dtype = ARITHMETIC[arithmetic]
    layer = build_encoder_layer(quantizers, bits, norm_first).to(dtype)
    enlarge(layer)
    x = torch.randn(B, L, E, dtype=dtype)
    causal = mask_of("causal", L, L, dtype)
    absent = None
    mask = causal
    if padding:
        absent = torch.arange(L) >= torch.tensor([[L], [3]])
        mask = causal | absent[:, None, None, :]
    out = settled(layer, x, src_mask=causal, src_key_padding_mask=absent)
    expected = encoder_layer(layer, x, mask)
    assert isinstance(expected, Integers)
    assert_same(out, expected)
    assert varied(expected)


def build_encoder_layer(quantizers, bits: int, norm_first: bool) -> QuantTransformerEncoderLayer:
    weight, signed, unsigned = quantizers
    own = attention_quantizers(quantizers, bits)
    sums = ("residual1_input", "residual1_output", "residual2_input", "norm1_output", "norm2_output")  # fmt: skip
    return QuantTransformerEncoderLayer(
        E,
        HEADS,
        12,
        batch_first=True,
        norm_first=norm_first,
        weight_quant=weight,
        weight_bit_width=bits,
        input_quant=signed,
        input_bit_width=bits,
        linear2_input_quant=unsigned,
        return_quant_tensor=True,
        **{f"{name}_quant": signed for name in sums},
        # Of as many bits as the projections: 8 bits to 4 bits of the same range would be a shift, full of ties.
        **{f"{name}_bit_width": bits for name in sums},
        **{f"self_attn_{name}": value for name, value in own.items()},
    )
