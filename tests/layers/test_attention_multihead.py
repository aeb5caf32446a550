"""Multi-head attention against torch's layer."""

import copy
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qframework.graph import calibration_mode
from qframework.layers import QuantIdentity, QuantLinear, QuantMultiheadAttention
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias

OFF = {
    "in_proj_input_quant": None,
    "in_proj_weight_quant": None,
    "in_proj_bias_quant": None,
    "attn_output_weights_quant": None,
    "q_scaled_quant": None,
    "k_transposed_quant": None,
    "v_quant": None,
    "out_proj_input_quant": None,
    "out_proj_weight_quant": None,
    "out_proj_bias_quant": None,
}
QUERIES, KEYS, BATCH, SIZE, HEADS = 5, 6, 3, 8, 2
X = torch.randn(QUERIES, BATCH, SIZE)
GOLDEN = Path(__file__).parents[1] / "golden" / "golden_dev.npz"

LAYERS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 4, "vdim": 6},
    {"kdim": 4, "vdim": 6, "batch_first": True, "bias": False},
]


def pair(options, packed: bool):
    """The torch layer and ours without quantizers, with the same weights, none of them 0."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(SIZE, HEADS, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = QuantMultiheadAttention(SIZE, HEADS, packed_in_proj=packed, **options, **OFF)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def operands(options, batched: bool = True):
    shapes = [
        (QUERIES, BATCH, SIZE),
        (KEYS, BATCH, options.get("kdim", SIZE)),
        (KEYS, BATCH, options.get("vdim", SIZE)),
    ]
    tensors = [torch.randn(*shape) for shape in shapes]
    if not batched:
        return [t[:, 0] for t in tensors]
    return [t.transpose(0, 1) for t in tensors] if options.get("batch_first") else tensors


def masks(kind: str, heads: int, batched: bool):
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 4:] = padding[2, 5:] = True
    attn = torch.rand(QUERIES, KEYS) > 0.6
    attn[:, 0] = False
    if kind == "by head":
        attn = torch.rand((BATCH if batched else 1) * heads, QUERIES, KEYS) > 0.6
        attn[..., 0] = False
    if kind in ("float", "finite"):
        low = -math.inf if kind == "float" else -1.5
        padding, attn = (torch.zeros(m.shape).masked_fill(m, low) for m in (padding, attn))
    return {"key_padding_mask": padding if batched else padding[0], "attn_mask": attn}


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert (ours[1] is None) == (theirs[1] is None)
    if theirs[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("options", "packed"),
    [(o, packed) for o in LAYERS for packed in (True, False) if not packed or "kdim" not in o],
)
def test_without_quantizers_it_is_the_torch_layer(options, packed, batched) -> None:
    theirs, ours = pair(options, packed)
    q, k, v = operands(options, batched)
    assert_same(ours(q, k, v), theirs(q, k, v))
    assert_same(ours(q, k, v, need_weights=False), theirs(q, k, v, need_weights=False))
    by_head = {"average_attn_weights": False}
    assert_same(ours(q, k, v, **by_head), theirs(q, k, v, **by_head))
    if "kdim" not in options:
        assert_same(ours(q, k, k), theirs(q, k, k))
        assert_same(ours(q, q, q), theirs(q, q, q))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["bool", "by head", "float", "finite"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_masks_are_those_of_the_torch_layer(options, kind, batched) -> None:
    theirs, ours = pair(options, True)
    q, k, v = operands(options, batched)
    both = masks(kind, HEADS, batched)
    for which in (both, *({name: mask} for name, mask in both.items())):
        for need in (True, False):
            call = {**which, "need_weights": need}
            assert_same(ours(q, k, v, **call), theirs(q, k, v, **call))


def test_a_bool_and_a_float_mask_go_together() -> None:
    _, ours = pair({}, True)
    q, k, v = operands({})
    boolean, floating = masks("bool", HEADS, True), masks("float", HEADS, True)
    floating["key_padding_mask"] = floating["key_padding_mask"].masked_fill(
        ~boolean["key_padding_mask"], 0.0
    )
    floating["attn_mask"] = torch.zeros(QUERIES, KEYS).masked_fill(boolean["attn_mask"], -math.inf)
    mixed = {**boolean, "attn_mask": floating["attn_mask"]}
    assert_same(ours(q, k, v, **mixed), ours(q, k, v, **floating))


def test_a_causal_mask_is_taken_or_made() -> None:
    theirs, ours = pair({}, True)
    x = torch.randn(QUERIES, BATCH, SIZE)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    expected = theirs(x, x, x, attn_mask=mask)
    assert_same(ours(x, x, x, attn_mask=mask, is_causal=True), expected)
    assert_same(ours(x, x, x, is_causal=True), expected)


def test_gradients_are_those_of_the_torch_layer() -> None:
    theirs, ours = pair({"add_bias_kv": True}, True)
    x = torch.randn(QUERIES, BATCH, SIZE)
    found = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        layer(leaf, leaf, leaf, **{"attn_mask": torch.ones(5, 5).triu(1).bool()})[0].pow(
            2
        ).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.in_proj.weight.grad, theirs.in_proj_weight.grad, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.bias_k.grad, theirs.bias_k.grad, rtol=1e-4, atol=1e-4)


def test_a_query_that_may_look_at_nothing_gives_the_bias_and_finite_gradients() -> None:
    _, ours = pair({}, True)
    x = torch.randn(QUERIES, BATCH, SIZE, requires_grad=True)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(QUERIES, -1))
    assert (weights[1] == 0).all()
    out.pow(2).sum().backward()
    assert x.grad.isfinite().all()
    quantized = QuantMultiheadAttention(SIZE, HEADS, softmax_input_quant=Int8ActPerTensorFloat)
    assert quantized(x, x, x, key_padding_mask=padding)[0].isfinite().all()


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_acts_in_training_only(packed) -> None:
    theirs, ours = pair({"dropout": 0.5}, packed)
    x = torch.randn(QUERIES, BATCH, SIZE)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).float().mean() < 0.8
    assert_same(ours.eval()(x, x, x), theirs.eval()(x, x, x))


@pytest.mark.parametrize("packed", [True, False])
def test_eight_bits_are_close_to_float(packed) -> None:
    theirs, _ = pair({}, packed)
    ours = QuantMultiheadAttention(SIZE, HEADS, packed_in_proj=packed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(QUERIES, BATCH, SIZE)
    ours(x, x, x)
    (out, weights), (expected, expected_weights) = ours.eval()(x, x, x), theirs.eval()(x, x, x)
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert not torch.equal(out, expected)
    assert (weights - expected_weights).abs().max() < 0.05


def test_different_tensors_through_packed_projections_count_as_one_batch() -> None:
    torch.manual_seed(0)
    ours = QuantMultiheadAttention(SIZE, HEADS)
    q, k, v = operands({})
    ours(q, k, 3 * v)
    alone = QuantIdentity()
    alone(torch.cat([q, k, 3 * v]))
    assert ours.in_proj.input_quant.scale() == alone.act_quant.scale()
    steps = [s for n, s in ours.in_proj.state_dict().items() if n.endswith("collected_steps")]
    assert [int(s) for s in steps] == [1]


def test_packed_projections_of_different_tensors_are_the_slices_of_one_layer() -> None:
    torch.manual_seed(0)
    ours = QuantMultiheadAttention(SIZE, HEADS, batch_first=True)
    q, k, v = operands({"batch_first": True})
    ours(q, k, v)
    ours.eval()
    separate = copy.deepcopy(ours)
    layer, size = separate.in_proj, SIZE
    slices = [layer(t)[..., i * size : (i + 1) * size] for i, t in enumerate((q, k, v))]
    for got, expected in zip(ours._project(q, k, v, True), slices, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_same_tensor_and_copies_of_it_give_the_same() -> None:
    torch.manual_seed(0)
    ours = QuantMultiheadAttention(SIZE, HEADS)
    x = torch.randn(QUERIES, BATCH, SIZE)
    ours(x, x, x)
    ours.eval()
    assert_same(ours(x, x.clone(), x.clone()), ours(x, x, x))


def test_the_result_is_quantized_where_asked_for() -> None:
    x = torch.randn(QUERIES, BATCH, SIZE)
    options = {"return_quant_tensor": True, "out_proj_weight_quant": Int8WeightPerChannelFloat}
    out, weights = QuantMultiheadAttention(SIZE, HEADS, **options)(x, x, x)
    assert isinstance(out, IntQuantTensor)
    assert out.is_valid
    assert out.scale.shape == (1, 1, SIZE)
    assert type(weights) is torch.Tensor
    ours = QuantMultiheadAttention(
        SIZE, HEADS, out_proj_output_quant=Int8ActPerTensorFloat, **options
    )
    out, _ = ours(x, x, x)
    assert float(out.bit_width) == 8
    following = QuantLinear(SIZE, 2, bias_quant=Int32Bias, return_quant_tensor=True)
    assert following(out).is_valid


def test_a_quantized_input_brings_its_scale() -> None:
    q = QuantIdentity(return_quant_tensor=True)(torch.randn(QUERIES, BATCH, SIZE))
    ours = QuantMultiheadAttention(SIZE, HEADS, in_proj_input_quant=None)
    out, _ = ours(q, q, q)
    ours.eval()
    assert torch.isfinite(out).all()
    torch.testing.assert_close(ours(q, q, q)[0], ours(q, q.clone(), q.clone())[0])
    with pytest.raises(RuntimeError, match="in_proj"):
        ours(q.value, q.value, q.value)


def test_keywords_reach_their_quantizer() -> None:
    ours = QuantMultiheadAttention(
        SIZE,
        HEADS,
        packed_in_proj=False,
        softmax_input_quant=Int8ActPerTensorFloat,
        in_proj_input_bit_width=3,
        in_proj_weight_bit_width=4,
        in_proj_bias_bit_width=16,
        out_proj_input_bit_width=5,
        out_proj_weight_bit_width=6,
        softmax_input_bit_width=7,
        attn_output_weights_bit_width=2,
        q_scaled_bit_width=9,
        k_transposed_bit_width=10,
        v_bit_width=11,
    )
    explained = ours.explain()
    expected = {"softmax_input_quant": 7, "attn_output_weights_quant": 2, "q_scaled_quant": 9}
    expected |= {"k_transposed_quant": 10, "v_quant": 11}
    expected |= {"out_proj.input_quant": 5, "out_proj.weight_quant": 6}
    for name in "qkv":
        expected |= {f"{name}_proj.input_quant": 3, f"{name}_proj.weight_quant": 4}
    assert {n: int(explained[n]["bit_width"].value) for n in expected} == expected
    assert "in_proj.weight: int4" in repr(
        QuantMultiheadAttention(SIZE, HEADS, in_proj_weight_bit_width=4)
    )


def test_weights_start_as_in_torch() -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(SIZE, HEADS, add_bias_kv=True)
    torch.manual_seed(3)
    ours = QuantMultiheadAttention(
        SIZE, HEADS, add_bias_kv=True, in_proj_weight_scaling_impl_type="parameter_from_stats"
    )
    assert torch.equal(ours.in_proj.weight, theirs.in_proj_weight)
    assert torch.equal(ours.out_proj.weight, theirs.out_proj.weight)
    assert torch.equal(ours.bias_v, theirs.bias_v)
    scale = ours.in_proj.weight_quant.scale()
    torch.testing.assert_close(scale, theirs.in_proj_weight.abs().max() / 127)


@pytest.mark.parametrize("packed", [True, False])
def test_its_state_loads_after_training_and_as_a_part_of_a_model(packed) -> None:
    model = nn.ModuleDict(
        {"attention": QuantMultiheadAttention(SIZE, HEADS, packed_in_proj=packed)}
    )
    x = torch.randn(QUERIES, BATCH, SIZE)
    model["attention"](x, x, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = nn.ModuleDict(
        {"attention": QuantMultiheadAttention(SIZE, HEADS, packed_in_proj=packed)}
    )
    again.load_state_dict(torch.load(file), strict=True)
    assert_same(again.eval()["attention"](x, x, x), model.eval()["attention"](x, x, x))
    state = nn.ModuleDict({"attention": nn.MultiheadAttention(SIZE, HEADS)}).state_dict()
    before = dict(state)
    again.load_state_dict(state, strict=True)
    assert state.keys() == before.keys()


def test_a_state_of_the_reference_gives_its_numbers() -> None:
    with np.load(GOLDEN) as arrays:
        case = {
            key.removeprefix("mha/roundtrip|"): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith("mha/roundtrip|") and not key.endswith("meta")
        }
    ours = QuantMultiheadAttention(SIZE, HEADS)
    state = {k.removeprefix("out/sd/m."): t for k, t in case.items() if "/sd/" in k}
    ours.load_state_dict(state, strict=True)
    x = case["in/x"][-1]
    assert_same(ours.eval()(x, x, x), (case["out/after.0"], case["out/after.1"]))


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_decoders_hold_it(batch_first) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(SIZE, HEADS, 16, batch_first=batch_first).eval()
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        attention = QuantMultiheadAttention(SIZE, HEADS, batch_first=batch_first, **OFF).eval()
        attention.load_state_dict(getattr(theirs, name).state_dict(), strict=True)
        setattr(ours, name, attention)
    options = {"batch_first": batch_first}
    target, memory, _ = operands(options)
    call = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(QUERIES)}
    for causal in (False, True):
        expected = theirs(target, memory, tgt_is_causal=causal, **call)
        torch.testing.assert_close(ours(target, memory, tgt_is_causal=causal, **call), expected)


def test_it_runs_under_autocast() -> None:
    ours = QuantMultiheadAttention(SIZE, HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ours(X, X, X, attn_mask=torch.zeros(QUERIES, QUERIES))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert ours.in_proj.weight.grad is not None


def test_a_state_of_another_size_is_refused() -> None:
    ours = QuantMultiheadAttention(SIZE, HEADS, packed_in_proj=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for q_proj\.weight"):
        ours.load_state_dict(nn.MultiheadAttention(2 * SIZE, HEADS).state_dict())
    state = nn.MultiheadAttention(SIZE, HEADS).state_dict()
    state["in_proj_weight"] = torch.zeros(4, SIZE)
    with pytest.raises(RuntimeError, match=r"size mismatch for q_proj\.weight"):
        ours.load_state_dict(state)


def test_calibration_runs_it_in_float() -> None:
    theirs, _ = pair({}, True)
    ours = QuantMultiheadAttention(SIZE, HEADS)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(QUERIES, BATCH, SIZE)
    with torch.no_grad(), calibration_mode(ours):
        assert_same(ours(x, x, x), theirs(x, x, x))
    assert ours.v_quant.act_quant.scale() != 1


def test_bfloat16_and_meta() -> None:
    ours = QuantMultiheadAttention(SIZE, HEADS, dtype=torch.bfloat16)
    x = torch.randn(QUERIES, BATCH, SIZE, dtype=torch.bfloat16)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    out, weights = ours(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == torch.bfloat16
    out.sum().backward()
    assert QuantMultiheadAttention(SIZE, HEADS).bfloat16()(x, x, x)[0].dtype == torch.bfloat16
    meta = QuantMultiheadAttention(SIZE, HEADS, device="meta")
    assert meta(*[x.float().to("meta")] * 3)[0].shape == x.shape
