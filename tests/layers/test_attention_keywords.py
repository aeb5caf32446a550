"""Keywords for all operands of attention's products, and what is told to those who don't say which tensor."""

import re
import warnings

import pytest
from torch import nn

from qframework.graph import Rule, quantize_model
from qframework.inject import UnknownNameError
from qframework.layers import (
    QuantMultiheadAttention,
    QuantScaledDotProductAttention,
    QuantTransformerEncoderLayer,
)
from qframework.quantizers import Int8ActPerTensorFloat, Int8DynamicActPerTensorFloat

OPERANDS = ("q_scaled", "k_transposed", "v", "attn_output_weights")


def encoder(**keywords):
    return QuantTransformerEncoderLayer(8, 2, 16, **keywords)


def attention(**keywords):
    return QuantMultiheadAttention(8, 2, **keywords)


def operands(layer):
    """The proxies of the operands by name."""
    within = getattr(layer, "self_attn", layer)
    return {n: getattr(within, f"{n}_quant").act_quant for n in OPERANDS}


def steps(proxy):
    return proxy.tensor_quant.scaling_impl.collect_stats_steps


@pytest.fixture(autouse=True)
def nothing_is_unused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_an_encoder_collects_statistics_for_as_long_everywhere() -> None:
    layer = encoder(input_collect_stats_steps=7, self_attn_v_collect_stats_steps=3)
    inputs = (layer.linear1, layer.linear2, layer.self_attn.in_proj, layer.self_attn.out_proj)
    assert {steps(x.input_quant) for x in inputs} == {7}
    assert {n: steps(p) for n, p in operands(layer).items()} == dict.fromkeys(OPERANDS, 7) | {
        "v": 3
    }


def test_the_operands_of_both_products_have_keywords_in_common() -> None:
    layer = encoder(act_bit_width=4, act_collect_stats_steps=2, input_collect_stats_steps=7)
    assert {float(p.bit_width()) for p in operands(layer).values()} == {4}
    assert {steps(p) for p in operands(layer).values()} == {2}
    assert float(layer.linear1.input_quant.bit_width()) == 8


def test_weights_of_attention_have_no_sign_with_a_quantizer_for_all() -> None:
    signs = {n: p.is_signed for n, p in operands(encoder(act_quant=Int8ActPerTensorFloat)).items()}
    assert signs == dict.fromkeys(OPERANDS, True) | {"attn_output_weights": False}
    assert all(
        p.is_signed
        for p in operands(encoder(act_quant=Int8ActPerTensorFloat, act_signed=True)).values()
    )


def test_keywords_pass_by_what_has_no_use_for_them() -> None:
    assert not any(p.is_quant_enabled for p in operands(encoder(act_quant=None)).values())
    kinds = {"act_quant": Int8DynamicActPerTensorFloat, "input_collect_stats_steps": 7}
    assert all(p.is_quant_enabled for p in operands(encoder(**kinds)).values())
    own = operands(encoder(self_attn_v_quant=None, input_collect_stats_steps=7))
    assert not own["v"].is_quant_enabled and steps(own["q_scaled"]) == 7


@pytest.mark.parametrize(
    ("make", "keyword", "names"),
    [
        (
            attention,
            "input_collect_stats_steps",
            "in_proj_input_{0}, out_proj_input_{0}, q_scaled_{0}",
        ),
        (
            attention,
            "act_bit_width",
            "q_scaled_{0}, k_transposed_{0}, v_{0}, attn_output_weights_{0}",
        ),
        (attention, "weight_bit_width", "in_proj_weight_{0}, out_proj_weight_{0}"),
        (attention, "output_quant", "out_proj_output_{0}"),
        (encoder, "output_bit_width", "self_attn_out_proj_output_{0}, linear1_output_{0}"),
        (encoder, "v_bit_width", "self_attn_v_{0}"),
        (QuantScaledDotProductAttention, "input_bit_width", "q_scaled_{0}, k_transposed_{0}"),
        (QuantScaledDotProductAttention, "output_bit_width", "sdpa_output_{0}"),
    ],
)
def test_who_does_not_say_which_tensor_is_told_the_names(make, keyword, names) -> None:
    rest = keyword.split("_", 1)[1]
    with pytest.raises(
        UnknownNameError, match=re.escape(f"{keyword}=4. Say which tensor: {names.format(rest)}")
    ):
        make(**{keyword: 4})


@pytest.mark.parametrize("net", (nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)))
def test_a_conversion_reaches_operands_by_the_names_for_activations(net) -> None:
    def converted(**keywords):
        return operands(quantize_model(net, **keywords)[0])

    rule = Rule(type(net), act_bit_width=3, input_bit_width=6)
    for found in (converted(act_bit_width=3), converted(rules=[rule])):
        assert {float(p.bit_width()) for p in found.values()} == {3}
    found = converted(input_collect_stats_steps=5, input_bit_width=4)
    assert {(steps(p), float(p.bit_width())) for p in found.values()} == {(5, 8)}
    assert all(p.is_quant_enabled for p in converted(act_quant=None).values())


@pytest.mark.parametrize("net", (nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)))
def test_where_weights_alone_are_quantized_no_operand_is(net) -> None:
    model, _ = quantize_model(net, input_quant=None, act_quant=None)
    assert not any(p.is_quant_enabled for p in operands(model).values())
    proxies = [m for n, m in model.named_modules() if n.endswith("weight_quant")]
    assert sum(p.is_quant_enabled for p in proxies) >= 2


def test_a_rule_s_own_names_are_stronger_than_those_for_all_parts() -> None:
    rules = [
        Rule(nn.MultiheadAttention, weight_bit_width=4, out_proj_weight_bit_width=6, v_bit_width=2)
    ]
    model, _ = quantize_model(nn.MultiheadAttention(8, 2), act_bit_width=5, rules=rules)
    assert float(model.in_proj.weight_quant.bit_width()) == 4
    assert float(model.out_proj.weight_quant.bit_width()) == 6
    bits = {n: float(p.bit_width()) for n, p in operands(model).items()}
    assert bits == dict.fromkeys(OPERANDS, 5.0) | {"v": 2.0}
