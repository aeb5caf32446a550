"""Encoder layers against torch's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.graph import calibration_mode
from qframework.layers import QuantTransformerEncoderLayer
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
)

OFF = {
    "weight_quant": None,
    "bias_quant": None,
    "input_quant": None,
    "self_attn_attn_output_weights_quant": None,
    "self_attn_q_scaled_quant": None,
    "self_attn_k_transposed_quant": None,
    "self_attn_v_quant": None,
}
LENGTH, BATCH, SIZE = 5, 3, 8
MASK = nn.Transformer.generate_square_subsequent_mask(LENGTH)
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()


def pair(quantizers, **options):
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(SIZE, 2, 16, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = QuantTransformerEncoderLayer(SIZE, 2, 16, **options, **quantizers)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def sequence(options) -> torch.Tensor:
    x = torch.randn(LENGTH, BATCH, SIZE)
    return x.transpose(0, 1) if options.get("batch_first") else x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"norm_first": True},
        {"bias": False},
        {"activation": "gelu", "batch_first": True},
        {"activation": F.silu, "layer_norm_eps": 1e-2},
        {"activation": nn.ReLU(), "norm_first": True, "batch_first": True},
    ],
)
def test_without_quantizers_it_is_the_torch_layer(options) -> None:
    theirs, ours = pair(OFF, **options)
    x = sequence(options)
    calls = [{}, {"src_mask": MASK, "is_causal": True}, {"src_key_padding_mask": PADDING}]
    theirs.eval(), ours.eval()
    for call in calls:
        torch.testing.assert_close(ours(x, **call), theirs(x, **call), rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    _, ours = pair(OFF, dropout=0.3)
    x = sequence({})
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_unbatched_sequences_pass() -> None:
    theirs, ours = pair(OFF)
    x = torch.randn(LENGTH, SIZE)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_eight_bits_are_close_to_float(norm_first) -> None:
    theirs, ours = pair({}, norm_first=norm_first, dropout=0.0)
    x = sequence({})
    ours(x)
    out, expected = ours.eval()(x), theirs.eval()(x)
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "call", [{}, {"mask": MASK, "is_causal": True}, {"src_key_padding_mask": PADDING}]
)
def test_torch_encoders_hold_it(call) -> None:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0}
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, 2, 16, **options), 3)
    layer = QuantTransformerEncoderLayer(SIZE, 2, 16, **options)
    ours = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert len({id(m.self_attn.v_quant.act_quant) for m in ours.layers}) == 3
    x = sequence(options)
    with torch.no_grad():
        expected = theirs(x, **call)
        with calibration_mode(ours):
            torch.testing.assert_close(ours(x, **call), expected, rtol=1e-4, atol=1e-5)
        out = ours.eval()(x, **call)
    keep = ~call.get("src_key_padding_mask", torch.zeros(BATCH, LENGTH).bool())
    assert 0 < (out - expected)[keep].abs().max() < 0.1


def test_residual_sums_are_exact_where_quantized() -> None:
    _, ours = pair(
        {
            "residual1_input_quant": Int8ActPerTensorFloat,
            "residual1_return_quant_tensor": True,
            "residual2_input_quant": Int8ActPerTensorFloat,
        },
        norm_first=True,
    )
    ours.return_quant_tensor = True
    ours(sequence({}))
    ours.eval()
    seen = []
    ours.norm2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out = ours(sequence({}))
    for q in (seen[0], out):
        assert isinstance(q, IntQuantTensor)
        assert q.is_valid
        assert float(q.bit_width) == 9
    torch.testing.assert_close(out.scale, ours.residual2.input_quant.scale())


def test_the_result_is_quantized_where_asked_for() -> None:
    _, ours = pair(
        {
            "norm2_output_quant": Int8ActPerTensorFloat,
            "norm2_output_bit_width": 6,
            "return_quant_tensor": True,
        }
    )
    out = ours(sequence({}))
    assert isinstance(out, IntQuantTensor)
    assert out.is_valid
    assert float(out.bit_width) == 6
    assert ours(out).is_valid
    ours = QuantTransformerEncoderLayer(SIZE, 2, 16, return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="output_quant"):
        ours(sequence({}))


def test_quantized_results_go_from_layer_to_layer() -> None:
    layer = QuantTransformerEncoderLayer(
        SIZE, 2, 16, norm2_output_quant=Int8ActPerTensorFloat, return_quant_tensor=True
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    out = encoder(sequence({}), mask=MASK)
    assert isinstance(out, IntQuantTensor)
    assert out.is_valid


def test_norms_are_quantized_where_asked_for() -> None:
    _, ours = pair(
        {
            "norm1_weight_quant": Int8WeightPerTensorFloat,
            "norm1_weight_bit_width": 6,
            "norm1_output_quant": Int8ActPerTensorFloat,
            "norm1_return_quant_tensor": True,
        }
    )
    seen = []
    ours.linear1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    assert torch.isfinite(ours(sequence({}))).all()
    assert isinstance(seen[0], IntQuantTensor)
    assert seen[0].is_valid
    assert widths(ours)["norm1.weight"] == 6


def widths(layer) -> dict[str, str]:
    found = {}
    for name, explanation in layer.explain().items():
        rows = {row.name: row.value for row in explanation.rows}
        if "bit_width" in rows:
            found[name.removesuffix("_quant")] = int(rows["bit_width"])
    return found


def test_keywords_go_from_the_whole_to_the_part() -> None:
    layer = QuantTransformerEncoderLayer(
        SIZE,
        2,
        weight_bit_width=4,
        input_bit_width=6,
        linear1_weight_bit_width=3,
        self_attn_out_proj_weight_bit_width=2,
        self_attn_v_bit_width=5,
        linear2_weight_quant=Int8WeightPerChannelFloat,
        residual1_input_quant=Int8ActPerTensorFloat,
        residual1_input_bit_width=7,
    )
    found = widths(layer)
    expected = {"self_attn.in_proj.weight": 4, "self_attn.out_proj.weight": 2, "linear1.weight": 3}
    expected |= {
        "linear2.weight": 8,
        "self_attn.v": 5,
        "self_attn.q_scaled": 8,
        "residual1.input": 7,
    }
    inputs = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    expected |= {f"{name}.input": 6 for name in inputs}
    assert {name: found[name] for name in expected} == expected
    assert not any(name.startswith(("norm", "residual2")) for name in found)
    assert "linear1.weight: int3" in repr(layer)


@pytest.mark.parametrize(
    ("options", "signed"),
    [
        ({}, False),
        ({"activation": nn.ReLU()}, False),
        ({"activation": "gelu"}, True),
        ({"linear2_input_quant": Int8ActPerTensorFloat}, True),
    ],
)
def test_the_hidden_layer_is_unsigned_after_a_relu(options, signed) -> None:
    layer = QuantTransformerEncoderLayer(SIZE, 2, **options)
    assert layer.linear2.input_quant.is_signed == signed


def test_weights_start_as_in_torch() -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(SIZE, 2, 16)
    torch.manual_seed(0)
    ours = QuantTransformerEncoderLayer(SIZE, 2, 16)
    assert torch.equal(ours.self_attn.in_proj.weight, theirs.self_attn.in_proj_weight)
    assert torch.equal(ours.linear2.weight, theirs.linear2.weight)
    random = torch.rand(1)
    torch.manual_seed(0)
    nn.TransformerEncoderLayer(SIZE, 2, 16)
    assert torch.equal(torch.rand(1), random)


def test_its_state_loads_after_training() -> None:
    options = {
        "residual1_input_quant": Int8ActPerTensorFloat,
        "norm2_output_quant": Int8ActPerTensorFloat,
    }
    first, second = (QuantTransformerEncoderLayer(SIZE, 2, 16, **options) for _ in range(2))
    x = sequence({})
    first(x).sum().backward()
    assert all(p.grad is not None for n, p in first.named_parameters() if "quant" not in n)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(second.eval()(x), first.eval()(x))


def test_bfloat16_and_meta() -> None:
    layer = QuantTransformerEncoderLayer(
        SIZE, 2, 16, dtype=torch.bfloat16, residual1_input_quant=Int8ActPerTensorFloat
    )
    out = layer(sequence({}).bfloat16(), src_mask=MASK)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    meta = QuantTransformerEncoderLayer(SIZE, 2, 16, device="meta")
    assert meta(sequence({}).to("meta")).shape == (LENGTH, BATCH, SIZE)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"weigth_bit_width": 4}, TypeError, "Did you mean 'weight_bit_width'"),
        ({"self_attn_v_bit_widht": 4}, TypeError, "v_bit_width"),
        (
            {"self_attn_in_proj_weight_bit_widht": 4},
            TypeError,
            r"EncoderLayer\.self_attn: QuantMultiheadAttention\.in_proj: .*'weight_bit_width'",
        ),
        (
            {"linear1_bit_width": 4},
            TypeError,
            r"EncoderLayer\.linear1: .*unknown keyword bit_width",
        ),
        ({"linear3_weight_bit_width": 4}, TypeError, "linear1_"),
        ({"activation": "swish"}, ValueError, "'relu', 'gelu' or a function"),
    ],
)
def test_what_cannot_be_built_is_said(options, error, says) -> None:
    with pytest.raises(error, match=says):
        QuantTransformerEncoderLayer(SIZE, 2, **options)


@pytest.mark.slow
def test_it_compiles_and_exports_whole() -> None:
    torch.manual_seed(0)
    layer = QuantTransformerEncoderLayer(
        SIZE, 2, 16, dropout=0.0, batch_first=True, residual1_input_quant=Int8ActPerTensorFloat
    )
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x = sequence({"batch_first": True})
    model(x)
    close = {"rtol": 1e-3, "atol": 1e-3}
    other = copy.deepcopy(model)
    found = torch.compile(other, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, model(x), **close)
    found.sum().backward()
    assert other.layers[0].linear1.weight.grad is not None
    model.eval()
    program = torch.export.export(model, (x,), {"src_key_padding_mask": PADDING})
    expected = model(x, src_key_padding_mask=PADDING)
    got = program.module()(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(got, expected, **close)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_compiles_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = QuantTransformerEncoderLayer(SIZE, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x = sequence({"batch_first": True})
    model(x), model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
