"""Scaled dot-product attention against torch's function and integer arithmetic."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.layers import (
    QuantIdentity,
    QuantScaledDotProductAttention,
    ScaledDotProductAttention,
)
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import Int8ActPerTensorFloat, MXInt8OCPAct

OFF = {
    "attn_output_weights_quant": None,
    "q_scaled_quant": None,
    "k_transposed_quant": None,
    "v_quant": None,
}
LAYERS = [ScaledDotProductAttention, lambda: QuantScaledDotProductAttention(**OFF)]


def operands(heads: int = 4, shared: int = 4, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(2, heads, 5, 8, dtype=dtype),
        torch.randn(2, shared, 6, 8, dtype=dtype),
        torch.randn(2, shared, 6, 3, dtype=dtype),
    )


BOOL = torch.ones(5, 6, dtype=torch.bool).tril(1)
OPTIONS = [
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"attn_mask": BOOL},
    {"attn_mask": torch.randn(2, 1, 5, 6)},
    {"attn_mask": torch.randn(5, 6).masked_fill(~BOOL, -math.inf)},
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_without_quantizers_it_is_the_torch_function(layer, options) -> None:
    q, k, v = operands()
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(layer()(q, k, v, **options), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_heads_of_the_query_share_keys_and_values(layer) -> None:
    q, k, v = operands(shared=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(layer()(q, k, v, enable_gqa=True), expected)


@pytest.mark.parametrize("layer", [*LAYERS, QuantScaledDotProductAttention])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_fully_masked_row_gives_0_and_finite_gradients(layer, kind) -> None:
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    if kind == "float":
        mask = torch.zeros(5, 6).masked_fill(~mask, -math.inf)
    inputs = [t.requires_grad_() for t in operands()]
    out = layer()(*inputs, attn_mask=mask)
    assert (out[:, :, 2] == 0).all()
    assert (out[:, :, 1] != 0).any()
    out.pow(2).sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)
    if layer in LAYERS:  # a scale that is being collected depends on the largest element
        assert (inputs[0].grad[:, :, 2] == 0).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_acts_in_training_only(layer) -> None:
    q, k, v = operands()
    module = layer()
    plain = F.scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(module(q, k, v, dropout_p=0.5), plain)
    torch.testing.assert_close(module.eval()(q, k, v, dropout_p=0.5), plain)


def test_dropped_weights_are_0_and_the_others_scaled_up() -> None:
    module = QuantScaledDotProductAttention(**OFF)
    seen = []
    module.attn_output_weights_quant.register_forward_hook(lambda m, i, o: seen.append(o))
    q, k, v = operands()
    out = module(q, k, v, dropout_p=0.25)
    weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
    kept = seen[0] != 0
    assert 0.6 < kept.float().mean() < 0.9
    torch.testing.assert_close(seen[0], kept * weights / 0.75)
    torch.testing.assert_close(out, seen[0] @ v)


def test_every_operand_is_quantized_where_it_is_said() -> None:
    q, k, v = operands()
    module = QuantScaledDotProductAttention(
        softmax_input_quant=Int8ActPerTensorFloat,
        sdpa_output_quant=Int8ActPerTensorFloat,
        return_quant_tensor=True,
        q_scaled_bit_width=4,
        softmax_input_bit_width=6,
        v_bit_width=5,
        sdpa_output_bit_width=7,
    )
    for _ in range(3):
        module(q, k, v, attn_mask=BOOL)
    module.eval()
    out = module(q, k, v, attn_mask=BOOL)

    def quant(name, t, bits, signed=True):
        scale = getattr(module, f"{name}_quant").act_quant.scale()
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return (t / scale).round().clamp(low, high), scale

    qi, qs = quant("q_scaled", q / math.sqrt(8), 4)
    ki, ks = quant("k_transposed", k.mT, 8)
    vi, vs = quant("v", v, 5)
    si, ss = quant("softmax_input", (qi.long() @ ki.long()) * (qs * ks), 6)
    weights = (si * ss).masked_fill(~BOOL, -math.inf).softmax(-1)
    wi, ws = quant("attn_output_weights", weights, 8, signed=False)
    oi, os = quant("sdpa_output", (wi.long() @ vi.long()) * (ws * vs), 7)
    assert isinstance(out, IntQuantTensor)
    assert out.is_valid
    torch.testing.assert_close(out.scale, os)
    assert (out.int() - oi).abs().max() <= 1
    assert (out.int() == oi).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_scale_of_quantized_scores_knows_nothing_of_masked_keys(kind) -> None:
    mask = BOOL if kind == "bool" else torch.zeros(5, 6).masked_fill(~BOOL, -math.inf)
    module = QuantScaledDotProductAttention(**OFF, softmax_input_quant=Int8ActPerTensorFloat)
    q, k, v = operands()
    out = module(q, k, v, attn_mask=mask)
    free = QuantScaledDotProductAttention(**OFF, softmax_input_quant=Int8ActPerTensorFloat)
    free(q, k, v)
    scale = module.softmax_input_quant.act_quant.scale()
    assert scale == free.softmax_input_quant.act_quant.scale()
    scores = (q @ k.mT / math.sqrt(8))[:, :, 0, :2]  # query 0 sees keys 0 and 1
    weights = (scores / scale).round().mul(scale).softmax(-1)
    expected = (weights.unsqueeze(-1) * v[:, :, :2]).sum(-2)
    torch.testing.assert_close(out[:, :, 0], expected, rtol=1e-3, atol=1e-3)


def test_its_state_and_one_of_the_reference_load_into_a_new_module() -> None:
    q, k, v = operands()
    module = QuantScaledDotProductAttention()
    module(q, k, v)
    module.eval()
    tail = "act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    largest = {"attn_output_weights": 255, "q_scaled": 128, "k_transposed": 128, "v": 128}
    theirs = {
        f"{name}_quant.{tail}": getattr(module, f"{name}_quant").act_quant.scale() * integer
        for name, integer in largest.items()
    }
    for state in (module.state_dict(), theirs):
        again = QuantScaledDotProductAttention()
        again.load_state_dict(state, strict=True)
        torch.testing.assert_close(again.eval()(q, k, v), module(q, k, v))


def test_quantized_inputs_are_taken() -> None:
    q, k, v = (QuantIdentity(return_quant_tensor=True)(t) for t in operands())
    module = QuantScaledDotProductAttention(**OFF)
    out = module(q, k, v)
    expected = F.scaled_dot_product_attention(q.value, k.value, v.value)
    torch.testing.assert_close(out, expected)


def test_a_quantizer_is_shared_with_another_layer() -> None:
    first = QuantIdentity()
    module = QuantScaledDotProductAttention(
        q_scaled_quant=first.act_quant, k_transposed_quant=first.act_quant
    )
    assert module.q_scaled_quant.act_quant is module.k_transposed_quant.act_quant is first.act_quant


def test_tensors_go_through_the_functions_given() -> None:
    rotation = nn.Linear(8, 8, bias=False)
    q, k, v = operands()
    for layer in (ScaledDotProductAttention, QuantScaledDotProductAttention):
        options = OFF if layer is QuantScaledDotProductAttention else {}
        module = layer(
            pre_process_q=rotation, pre_process_k=rotation, pre_process_v=torch.neg, **options
        )
        expected = F.scaled_dot_product_attention(rotation(q), rotation(k), -v)
        torch.testing.assert_close(module(q, k, v), expected)
        assert "pre_process_q.weight" in module.state_dict()


def test_groups_of_a_scale_are_along_the_axis_that_is_summed() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 64), torch.randn(2, 40, 64), torch.randn(2, 40, 3))
    names = ("attn_output_weights", "q_scaled", "k_transposed", "v")
    module = QuantScaledDotProductAttention(**{f"{name}_quant": MXInt8OCPAct for name in names})
    seen = {}
    for name in names:
        proxy = getattr(module, f"{name}_quant").act_quant
        proxy.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    out = module(q, k, v)
    axes = {name: q.group_dim for name, q in seen.items()}
    assert axes == {"attn_output_weights": -1, "q_scaled": -1, "k_transposed": -2, "v": -2}
    expected = F.scaled_dot_product_attention(q, k, v)
    assert 0 < (out - expected).abs().max() < 0.02


def test_bfloat16_stays_bfloat16() -> None:
    q, k, v = operands(dtype=torch.bfloat16)
    module = QuantScaledDotProductAttention(dtype=torch.bfloat16)
    mask = torch.zeros(5, 6).masked_fill(~BOOL, -math.inf)
    out = module(q, k, v, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q, k, v, mask.bfloat16())
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)


def test_meta_tensors_pass() -> None:
    module = QuantScaledDotProductAttention(device=torch.device("meta"))
    q, k, v = (t.to("meta") for t in operands())
    assert module(q, k, v, is_causal=True).shape == (2, 4, 5, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({"attn_mask": BOOL, "is_causal": True}, RuntimeError, "got both"),
        ({"attn_mask": BOOL.long()}, TypeError, "torch.int64"),
        ({"enable_gqa": True}, ValueError, "4 in query, 3 in key"),
    ],
)
def test_what_makes_no_sense_is_said(call, error, says) -> None:
    with pytest.raises(error, match=says):
        QuantScaledDotProductAttention()(*operands(shared=3), **call)


def test_a_quantized_result_needs_a_quantizer() -> None:
    with pytest.raises(RuntimeError, match="sdpa_output_quant"):
        QuantScaledDotProductAttention(return_quant_tensor=True)(*operands())


def test_a_misspelt_keyword_is_told_the_right_one() -> None:
    with pytest.raises(TypeError, match="Did you mean 'q_scaled_bit_width'"):
        QuantScaledDotProductAttention(q_scaled_bit_widht=4)
    with pytest.raises(TypeError, match="sdpa_output_bit_width"):
        QuantScaledDotProductAttention(sdpa_outputs_bit_width=4)


@pytest.mark.slow
def test_it_compiles_and_exports_whole() -> None:
    q, k, v = operands()
    module = QuantScaledDotProductAttention(softmax_input_quant=Int8ActPerTensorFloat)
    module(q, k, v, attn_mask=BOOL)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        module.train(mode)
        torch.testing.assert_close(
            compiled(q, k, v, attn_mask=BOOL), module(q, k, v, attn_mask=BOOL)
        )
    program = torch.export.export(module.eval(), (q, k, v), {"is_causal": True})
    expected = module(q, k, v, is_causal=True)
    torch.testing.assert_close(program.module()(q, k, v, is_causal=True), expected)
