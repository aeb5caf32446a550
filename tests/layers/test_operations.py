"""Layers without parameters: element-wise operations, pooling, upsampling, dropout."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.layers import (
    QuantCat,
    QuantDropout,
    QuantEltwiseAdd,
    QuantEltwiseMul,
    QuantGELU,
    QuantIdentity,
    QuantMatMul,
    QuantPReLU,
    QuantReLU,
    QuantUpsample,
    QuantUpsamplingBilinear2d,
    QuantUpsamplingNearest2d,
    TruncAdaptiveAvgPool2d,
    TruncAvgPool2d,
)
from qframework.quant_tensor import IntQuantTensor


def quantized(
    *shape: int, signed: bool = False, bits: int = 8, zero_point: float = 0.0
) -> IntQuantTensor:
    generator = torch.Generator().manual_seed(0)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    q = torch.randint(low, high, shape, generator=generator).float()
    return IntQuantTensor((q - zero_point) * 0.125, 0.125, zero_point, float(bits), signed=signed)


@pytest.mark.parametrize("layer", [QuantEltwiseAdd, QuantEltwiseMul, QuantCat, QuantMatMul])
def test_operations_on_one_grid_are_integer_arithmetic(layer) -> None:
    torch.manual_seed(0)
    operation = layer(output_quant=None, return_quant_tensor=True)
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    given = ([a, b],) if layer is QuantCat else (a, b)
    operation(*given), operation.eval()
    out = operation(*given)
    assert isinstance(out, IntQuantTensor) and out.is_valid
    i = operation.input_quant(a).int().long()
    j = getattr(operation, "other_quant", operation.input_quant)(b).int().long()
    expected = {
        QuantEltwiseAdd: lambda: i + j,
        QuantEltwiseMul: lambda: i * j,
        QuantCat: lambda: torch.cat([i, j], 1),
        QuantMatMul: lambda: i @ j,
    }[layer]()
    assert torch.equal(out.int().long(), expected)


def test_operands_may_take_the_quantizer_of_the_result() -> None:
    tied = QuantEltwiseAdd(tie_input_output_quant=True, output_bit_width=5)
    assert tied.input_quant is tied.output_quant
    assert tied(torch.randn(3), torch.randn(3)).shape == (3,)
    with pytest.raises(TypeError, match="output_bit_width"):
        QuantEltwiseAdd(tie_input_output_quant=True, input_bit_width=4)
    plain = QuantCat(input_quant=None, output_quant=None)
    assert torch.equal(plain([torch.ones(1, 2), torch.zeros(1, 2)]), torch.tensor([[1.0, 1, 0, 0]]))
    with pytest.raises(RuntimeError, match="input_quant and output_quant"):
        QuantEltwiseAdd(None, None, return_quant_tensor=True)(torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero_point", [0.0, 8.0])
def test_average_pooling_truncates_the_sum_of_integers(bits, zero_point) -> None:
    x = quantized(1, 2, 4, 4, zero_point=zero_point)
    out = TruncAvgPool2d(2, bit_width=bits)(x)
    sums = F.avg_pool2d(x.int().double(), 2) * 4
    shift = 2.0 ** (10 - bits)
    assert isinstance(out, IntQuantTensor) and out.is_valid and out.bit_width == bits
    assert torch.equal(out.int().double(), (sums / shift).round().clamp(0, 2**bits - 1))
    assert float(out.scale) == pytest.approx(0.125 / 4 * shift)


def test_adaptive_pooling_truncates_too() -> None:
    x = quantized(1, 2, 6, 4)
    out = TruncAdaptiveAvgPool2d((3, 1), bit_width=6)(x)
    sums = F.adaptive_avg_pool2d(x.int().double(), (3, 1)) * 8
    assert torch.equal(out.int().double(), (sums / 2.0 ** (11 - 6)).round().clamp(0, 63))
    assert TruncAdaptiveAvgPool2d.compute_kernel_size_stride((6, 4), (3, 1)) == ([2, 4], [2, 4])


def test_floats_are_pooled_as_floats() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(TruncAvgPool2d(2, return_quant_tensor=False)(x), F.avg_pool2d(x, 2))
    with pytest.raises(RuntimeError, match="Feed the layer a quantized tensor"):
        TruncAvgPool2d(2)(x)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_upsampling_stays_on_the_grid(mode) -> None:
    x = quantized(1, 2, 3, 3, signed=True)
    out = QuantUpsample(scale_factor=2, mode=mode)(x)
    assert isinstance(out, IntQuantTensor) and out.scale == x.scale
    exact = F.interpolate(x.value.double(), scale_factor=2, mode=mode) / 0.125
    steps = out.value.double() / 0.125
    assert float((steps - exact.clamp(-128, 127)).abs().max()) <= 0.5001  # bicubic overshoots
    assert QuantUpsamplingNearest2d((5, 6))(x).shape == (1, 2, 5, 6)
    assert QuantUpsamplingBilinear2d(scale_factor=2)(x).is_valid
    with pytest.raises(RuntimeError, match="quantized by one scale"):
        QuantUpsample(scale_factor=2)(torch.randn(1, 1, 2, 2))


def test_dropout_moves_its_factor_to_the_scale() -> None:
    x = quantized(100, signed=True)
    layer = QuantDropout(0.25)
    torch.manual_seed(0)
    out = layer(x)
    assert out.is_valid and float(out.scale) == pytest.approx(0.125 / 0.75)
    dropped = out.value == 0
    assert torch.equal(out.int()[~dropped], x.int()[~dropped]) and 5 < int(dropped.sum()) < 50
    assert layer.eval()(x) is x
    assert QuantDropout(0.5, return_quant_tensor=False)(torch.ones(4)).shape == (4,)


def test_activations_are_torch_layers_too() -> None:
    layer = QuantPReLU(3, 0.1)
    assert isinstance(layer, nn.PReLU) and "weight" in layer.state_dict()
    layer.load_state_dict(nn.PReLU(3).state_dict(), strict=False)
    with pytest.raises(TypeError, match="applies ReLU first"):
        QuantGELU(act_quant=QuantReLU().act_quant)
    shared = QuantIdentity()
    assert QuantGELU(act_quant=shared.act_quant).act_quant is shared.act_quant


def per_channel(*shape: int, signed: bool = True) -> IntQuantTensor:
    scale = torch.tensor([0.5, 0.125]).reshape(-1, 1, 1)
    q = quantized(*shape, signed=signed).int().float()
    return IntQuantTensor(q * scale, scale, 0, 8, signed=signed)


@pytest.mark.parametrize("options", [{}, {"padding": 1, "count_include_pad": False}])
def test_pooling_keeps_a_scale_for_each_channel(options) -> None:
    x = per_channel(1, 2, 4, 4)
    out = TruncAvgPool2d((2,), bit_width=10, **options)(x)
    means = F.avg_pool2d(x.int().double(), 2, **options)
    assert isinstance(out, IntQuantTensor) and out.is_valid
    assert torch.equal(out.int().double(), (means * 4).round())
    assert torch.equal(out.scale.flatten(), x.scale.flatten() / 4)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_upsampling_keeps_a_scale_for_each_channel_and_saturates(mode) -> None:
    x = per_channel(1, 2, 4, 4)
    edges = x.replace(value=torch.where(x.value > 0, 127 * x.scale, -128 * x.scale))
    for given in (x, edges):
        out = QuantUpsample(scale_factor=2, mode=mode)(given)
        assert isinstance(out, IntQuantTensor) and out.is_valid and out.scale is x.scale
        exact = F.interpolate(given.int().double(), scale_factor=2, mode=mode)
        assert float((out.int() - exact.clamp(-128, 127)).abs().max()) <= 0.5001


def test_a_list_is_joined_and_one_tensor_refused() -> None:
    with pytest.raises(TypeError, match=r"list of tensors.*one Tensor of shape \(2, 3\)"):
        QuantCat()(torch.ones(2, 3))


def test_interpolated_values_stay_within_the_range_in_short_dtypes() -> None:
    scale = torch.tensor(0.0218505859375)
    codes = torch.tensor([[127.0, 126.0, 127.0], [127.0, 127.0, 125.0], [126.0, 127.0, 127.0]])
    value = (codes * scale).to(torch.bfloat16).reshape(1, 1, 3, 3).requires_grad_()
    x = IntQuantTensor(value, scale, torch.tensor(0.0), torch.tensor(8.0), signed=True)
    y = QuantUpsamplingBilinear2d(scale_factor=2)(x)
    assert y.is_valid and int(y.int().max()) == 127
    y.value.sum().backward()
    assert bool((value.grad > 0).all())
