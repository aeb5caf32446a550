"""Every layer with every quantizer it takes: trains, evaluates, keeps dtypes, refuses what it must."""

import copy
import inspect
import itertools
import warnings

import pytest
import torch
from torch import nn

import qframework.layers as layers
from qframework.layers.base import QuantLayer
from qframework.quant_tensor import IntQuantTensor, QuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)

ALL = ("weight", "bias", "input", "output")
IMAGE, SEQUENCE = (2, 4, 6, 6), (2, 4, 6)
# layer: arguments, roles, shape of the input
TABLE = {
    "QuantLinear": ({"in_features": 6, "out_features": 4}, ALL, SEQUENCE),
    "QuantTransposedLinear": ({"in_features": 6, "out_features": 4}, ALL, SEQUENCE),
    "QuantConv1d": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3}, ALL, SEQUENCE),
    "QuantConv2d": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": "same", "stride": 2}, ALL, IMAGE),
    "QuantConv3d": ({"in_channels": 2, "out_channels": 3, "kernel_size": 2}, ALL, (2, 2, 4, 4, 4)),
    "QuantConvTranspose1d": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3}, ALL, SEQUENCE),
    "QuantConvTranspose2d": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2}, ALL, IMAGE),
    "QuantConvTranspose3d": ({"in_channels": 2, "out_channels": 3, "kernel_size": 2, "dilation": 2}, ALL, (2, 2, 3, 3, 3)),
    "QuantScaleBias": ({"num_features": 4, "bias": True}, ALL, IMAGE),
    "BatchNorm1dToQuantScaleBias": ({"num_features": 4}, ALL, SEQUENCE),
    "BatchNorm2dToQuantScaleBias": ({"num_features": 4}, ALL, IMAGE),
    "BatchNorm3dToQuantScaleBias": ({"num_features": 2}, ALL, (2, 2, 3, 3, 3)),
    "QuantLayerNorm": ({"normalized_shape": 6}, ALL, SEQUENCE),
    "QuantRMSNorm": ({"normalized_shape": 6}, ("weight", "input", "output"), SEQUENCE),
    "QuantGroupNorm": ({"num_groups": 2, "num_channels": 4}, ALL, IMAGE),
    "QuantEmbedding": ({"num_embeddings": 7, "embedding_dim": 4}, ("weight",), None),
    "QuantEmbeddingBag": ({"num_embeddings": 7, "embedding_dim": 4}, ("weight",), None),
    "QuantIdentity": ({}, ("act",), SEQUENCE),
    **{
        name: ({}, ("act", "input"), SEQUENCE)
        for name in ("QuantReLU", "QuantReLU6", "QuantLeakyReLU", "QuantPReLU", "QuantELU", "QuantGELU", "QuantSiLU",
                     "QuantSigmoid", "QuantTanh", "QuantHardSwish", "QuantHardSigmoid")
    },
    "QuantHardTanh": ({"min_val": -1.0, "max_val": 1.0}, ("input",), SEQUENCE),
    "QuantSoftmax": ({"dim": -1}, ("act", "input"), SEQUENCE),
}  # fmt: skip
QUANTIZERS = {
    "weight": (None, Int8WeightPerTensorFloat, Int8WeightPerChannelFloat, Int8WeightPerChannelFixedPoint, ShiftedUint8WeightPerTensorFloat),
    "bias": (None, Int8BiasPerTensorFloatInternalScaling),
    "input": (None, Int8ActPerTensorFloat, Int8ActPerTensorFixedPoint),
    "output": (None, Int8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat),
    "act": (None, Int8ActPerTensorFloat, Uint8ActPerTensorFloat),
}  # fmt: skip
#: Layers with tests of their own for all of this.
ELSEWHERE = {
    "QuantRNN", "QuantLSTM", "QuantGRU", "QuantCat", "QuantEltwiseAdd", "QuantEltwiseMul", "QuantMatMul",
    "TruncAvgPool2d", "TruncAdaptiveAvgPool2d", "TruncQuantAccumulator", "QuantUpsample", "QuantUpsamplingBilinear2d",
    "QuantUpsamplingNearest2d", "QuantDropout", "QuantMultiheadAttention", "QuantScaledDotProductAttention",
    "QuantTransformerEncoderLayer", "QuantWeightBiasInputOutputLayer", "QuantNonLinearActLayer",
    "HadamardClassifier",
}  # fmt: skip


def sample(shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if shape is None:
        return torch.randint(0, 7, (3, 2), generator=generator)
    return torch.randn(shape, generator=generator)


def cases():
    for name, (_, roles, _) in TABLE.items():
        for role in roles:
            for quantizer in QUANTIZERS[role]:
                yield pytest.param(
                    name,
                    role,
                    quantizer,
                    id=f"{name}-{role}-{getattr(quantizer, '__name__', None)}",
                )


def test_the_table_holds_every_layer() -> None:
    public = {
        n for n in layers.__all__
        if isinstance(getattr(layers, n), type) and issubclass(getattr(layers, n), QuantLayer)
    }  # fmt: skip
    assert public - {"QuantWBIOL"} == TABLE.keys() | ELSEWHERE


@pytest.mark.parametrize(("name", "role", "quantizer"), list(cases()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_and_evaluates(name, role, quantizer, dtype) -> None:
    torch.manual_seed(0)
    arguments, _, shape = TABLE[name]
    layer = getattr(layers, name)(**arguments, **{f"{role}_quant": quantizer})
    layer.to(dtype)
    x = sample(shape)
    x = x.to(dtype) if x.is_floating_point() else x
    out = layer(x)
    value = out.value if isinstance(out, QuantTensor) else out
    if value.requires_grad:
        value.float().square().sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all())
    layer.eval()
    first, again = layer(x), copy.deepcopy(layer)(x)
    assert first.shape == value.shape
    assert first.dtype == value.dtype == (dtype if shape else layer.weight.dtype)
    assert torch.equal(first, again) and bool(first.isfinite().all())
    other = getattr(layers, name)(**arguments, **{f"{role}_quant": quantizer}).to(dtype).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), first)


@pytest.mark.parametrize(
    "name", [n for n, (_, roles, _) in TABLE.items() if "output" in roles or "act" in roles]
)
def test_it_returns_a_valid_quantized_tensor_when_asked(name) -> None:
    arguments, roles, shape = TABLE[name]
    if "output" in roles:
        arguments = {**arguments, "output_quant": Int8ActPerTensorFloat}
    layer = getattr(layers, name)(**arguments, return_quant_tensor=True)
    layer(sample(shape))
    out = layer.eval()(sample(shape))
    assert isinstance(out, IntQuantTensor) and out.is_valid
    with pytest.raises(RuntimeError, match="return_quant_tensor"):
        quantizers = {f"{r}_quant": None for r in roles}
        getattr(layers, name)(**TABLE[name][0], **quantizers, return_quant_tensor=True)(
            sample(shape)
        )


@pytest.mark.parametrize("name", TABLE)
def test_it_shares_a_quantizer_and_refuses_unknown_keywords(name) -> None:
    arguments, roles, shape = TABLE[name]
    make = getattr(layers, name)
    role = roles[0]
    first = make(**arguments)
    second = (
        make(**arguments, **{f"{role}_quant": getattr(first, f"{role}_quant")})
        if role != "input"
        else None
    )
    if second is not None:
        assert getattr(second, f"{role}_quant") is getattr(first, f"{role}_quant")
        second(sample(shape))
    with pytest.raises(TypeError, match="bit_widht"):
        make(**arguments, **{f"{role}_bit_widht": 4})
    assert len(repr(first).splitlines()) <= 4


LINEAR = [
    n
    for n, (_, roles, _) in TABLE.items()
    if roles == ALL and "Norm" not in n and n != "QuantScaleBias"
]


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("weight_quant", [Int8WeightPerTensorFloat, Int8WeightPerChannelFloat])
@pytest.mark.parametrize("bias_quant", [None, Int32Bias])
def test_integers_give_the_accumulator(name, weight_quant, bias_quant) -> None:
    """The layer again in integer arithmetic: codes in, codes out, all in int64, within the declared width."""
    torch.manual_seed(0)
    arguments, _, shape = TABLE[name]
    arguments = {**arguments, "bias": bias_quant is not None}
    layer = getattr(layers, name)(
        **arguments,
        weight_quant=weight_quant,
        weight_bit_width=5,
        bias_quant=bias_quant,
        input_quant=Int8ActPerTensorFloat,
        input_bit_width=6,
        return_quant_tensor=True,
    )
    x = sample(shape)
    layer(x), layer.eval()
    with torch.no_grad():
        out = layer(x)
    assert isinstance(out, IntQuantTensor) and out.is_valid and out.symmetric
    quant_x = layer.input_quant(x)
    quant_w = layer.quant_weight(quant_x)
    integer = copy.deepcopy(layer)
    floats = integer._compute(
        quant_x.int().double(),
        quant_w.int().double(),
        None
        if bias_quant is None
        else layer.bias_quant(layer.bias, quant_x, quant_w).int().double(),
    )
    assert torch.equal(out.int().double(), floats)
    bits = float(out.bit_width)
    assert float(floats.abs().max()) < 2 ** (bits - 1)


def test_worst_case_inputs_fill_the_declared_accumulator_and_no_more() -> None:
    for groups, stride in itertools.product((1, 2), (1, 2)):
        layer = layers.QuantConvTranspose2d(
            4, 4, 3, stride=stride, groups=groups, bias=False, input_quant=Int8ActPerTensorFloat, return_quant_tensor=True
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.fill_(1.0)
        x = torch.ones(1, 4, 5, 5)
        layer(x), layer.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = layer(x)
        top = float(out.int().abs().max())
        assert 2 ** (float(out.bit_width) - 3) < top < 2 ** (float(out.bit_width) - 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_folds_into_a_transposed_convolution_exactly(groups) -> None:
    torch.manual_seed(0)
    layer = layers.QuantConvTranspose2d(4, 6, 3, groups=groups, weight_quant=None)
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 5, 5)
    expected = norm(layer(x))
    layer.merge_bn_in(norm)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="6 channels"):
        layer.merge_bn_in(nn.BatchNorm2d(3))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_norm_loads_strictly_into_its_scale_and_bias(dims) -> None:
    norm = getattr(nn, f"BatchNorm{dims}d")(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.eval()
    layer = getattr(layers, f"BatchNorm{dims}dToQuantScaleBias")(4, weight_quant=None)
    layer.load_state_dict(norm.state_dict(), strict=True)
    x = torch.randn(3, 4, *[5] * dims)
    torch.testing.assert_close(layer(x), norm(x), rtol=1e-5, atol=1e-6)
    again = getattr(layers, f"BatchNorm{dims}dToQuantScaleBias")(4, weight_quant=None)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_a_bias_by_the_scale_of_the_input_is_refused_by_norms() -> None:
    with pytest.raises(ValueError, match="normalized input"):
        layers.QuantLayerNorm(4, bias_quant=Int32Bias)
    plain = layers.QuantLayerNorm(4, elementwise_affine=False)
    torch.testing.assert_close(plain(torch.ones(2, 4)), torch.zeros(2, 4))


def test_embeddings_give_rows_of_the_quantized_table() -> None:
    layer = layers.QuantEmbedding(7, 4, padding_idx=0, weight_bit_width=4, return_quant_tensor=True)
    index = sample(None)
    out = layer(index)
    assert isinstance(out, IntQuantTensor) and out.is_valid
    assert torch.equal(out.int(), layer.quant_weight().int()[index])
    out.value.sum().backward()
    assert not bool(layer.weight.grad[0].any())
    rows = layers.QuantEmbedding(7, 4, weight_quant=Int8WeightPerChannelFloat)
    assert torch.equal(rows(index), rows.quant_weight().value[index])
    bounded = layers.QuantEmbedding(7, 4, max_norm=0.5)
    before = bounded.weight.detach().clone()
    assert bool((bounded(index).norm(dim=-1) <= 0.5001).all()) and torch.equal(
        before, bounded.weight
    )


@pytest.mark.parametrize("kind", [layers.QuantEmbedding, layers.QuantEmbeddingBag])
def test_tables_train_with_sparse_gradients_asked_for_and_come_from_pretrained_ones(
    kind: type[nn.Embedding],
) -> None:
    index = torch.tensor([[1, 3, 3]])
    for quantizer, layout in ((Int8WeightPerChannelFloat, torch.strided), (None, torch.sparse_coo)):
        layer = kind(7, 4, sparse=True, weight_quant=quantizer)
        layer(index).sum().backward()
        assert layer.weight.grad.layout == layout
        assert bool(layer.weight.grad.to_dense()[3].any())
    weight = torch.randn(5, 4)
    for freeze in (True, False):
        made = kind.from_pretrained(weight, freeze=freeze, weight_bit_width=4)
        assert type(made) is kind and made.weight.requires_grad is not freeze
        assert torch.equal(made.weight, weight) and made.weight_quant.bit_width() == 4


def test_inputs_have_the_names_that_torch_gives_them() -> None:
    """A call by keyword stays right where a float layer is replaced."""
    for name in layers.__all__:
        layer = getattr(layers, name)
        of_torch = getattr(nn, name.removeprefix("Quant"), None)
        if of_torch is None or name == "QuantRMSNorm":
            continue
        theirs = next(iter(list(inspect.signature(of_torch.forward).parameters)[1:]))
        assert theirs in inspect.signature(layer.forward).parameters, name
