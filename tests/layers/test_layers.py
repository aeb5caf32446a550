import copy

import pytest
import torch
from torch import nn

from qframework.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantHardSwish,
    QuantHardTanh,
    QuantIdentity,
    QuantLinear,
    QuantReLU,
    QuantSigmoid,
    QuantTanh,
)
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8Bias,
    Int8BiasPerTensorFloatInternalScaling,
    Int8DynamicActPerRowFloat,
    Int8WeightPerChannelFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
)

PAIRS = [
    (QuantLinear, nn.Linear, (6, 5), {}, (2, 6)),
    (QuantConv1d, nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1, "dilation": 2}, (2, 4, 9)),
    (QuantConv1d, nn.Conv1d, (4, 4, 3), {"padding": "same", "groups": 2}, (2, 4, 9)),
    (QuantConv2d, nn.Conv2d, (2, 4, 3), {"padding": 1, "padding_mode": "circular"}, (2, 2, 5, 5)),
    (QuantConv2d, nn.Conv2d, (2, 4, (3, 1)), {"bias": False}, (2, 5, 5)),
]


@pytest.mark.parametrize(("quant", "plain", "arguments", "options", "shape"), PAIRS)
def test_without_quantizers_a_layer_is_its_torch_layer_bit_for_bit(
    quant, plain, arguments, options, shape
) -> None:
    torch.manual_seed(3)
    mine = quant(*arguments, **options, weight_quant=None)
    after_mine = torch.rand(1)
    torch.manual_seed(3)
    theirs = plain(*arguments, **options)
    assert torch.equal(after_mine, torch.rand(1))  # as many random numbers
    x = torch.randn(shape)
    assert torch.equal(mine(x), theirs(x))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert isinstance(mine, plain)


ACTIVATIONS = [
    (QuantReLU, torch.relu, {}),
    (QuantSigmoid, torch.sigmoid, {}),
    (QuantTanh, torch.tanh, {}),
    (QuantHardSwish, nn.functional.hardswish, {}),
    (QuantHardTanh, nn.functional.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    (QuantIdentity, lambda x: x, {}),
]


@pytest.mark.parametrize(("layer", "function", "options"), ACTIVATIONS)
def test_activations_are_their_function_within_half_a_step(layer, function, options) -> None:
    x = torch.randn(4, 50)
    act = layer(return_quant_tensor=True, **options)
    y = act(x)
    assert isinstance(y, IntQuantTensor)
    assert y.is_valid
    top = (2 ** (8 - y.signed) - 1) * y.scale
    expected = function(x).clamp(min=None if y.signed else 0, max=top)
    assert ((y.value - expected).abs() <= 0.5001 * y.scale).all()
    plain = layer(act_quant=None, **options)
    assert torch.equal(plain(x), function(x))


def test_hard_tanh_clips_also_when_its_quantizer_is_off() -> None:
    act = QuantHardTanh(min_val=-1.0, max_val=1.0)
    act.act_quant.disable_quant = True
    assert act(torch.tensor([-5.0, 0.3, 5.0])).tolist() == pytest.approx([-1, 0.3, 1])


def test_an_activation_without_quantizer_keeps_a_quantized_input() -> None:
    q = QuantIdentity(return_quant_tensor=True)(torch.randn(9))
    out = QuantReLU(act_quant=None, return_quant_tensor=True)(q)
    assert isinstance(out, IntQuantTensor)
    assert torch.equal(out.int(), q.int().clamp(min=0))


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (3, 1), (2, 2)])
def test_strided_same_padding_gives_ceil_of_size_over_stride(size, stride, dilation) -> None:
    layer = QuantConv2d(
        1, 1, 3, stride=stride, dilation=dilation, padding="same", weight_quant=None
    )
    x = torch.randn(1, 1, size, size)
    out = layer(x)
    expected = -(-size // stride)
    assert out.shape[-2:] == (expected, expected)
    total = max((expected - 1) * stride + 2 * dilation + 1 - size, 0)
    padded = nn.functional.pad(x, (total // 2, total - total // 2) * 2)
    by_hand = nn.functional.conv2d(padded, layer.weight, layer.bias, stride, 0, dilation)
    assert torch.equal(out, by_hand)


@pytest.mark.parametrize(
    "bias_quant", [None, Int8Bias, Int32Bias, Int8BiasPerTensorFloatInternalScaling]
)
@pytest.mark.parametrize("weight", ["tensor", "channel"])
@pytest.mark.parametrize("layer", [QuantLinear, QuantConv2d])
def test_a_layer_is_integer_arithmetic(layer, weight, bias_quant) -> None:
    """Re-executed on integers: the same integers, whatever bias."""
    options = {
        "input_quant": Int8ActPerTensorFloat,
        "bias_quant": bias_quant,
        "return_quant_tensor": True,
        "weight_scaling_per_output_type": weight,
        "weight_bit_width": 4,
    }
    torch.manual_seed(0)
    if layer is QuantLinear:
        module, x = layer(6, 5, **options), torch.randn(3, 6)
    else:
        module, x = layer(2, 5, 3, padding=1, **options), torch.randn(3, 2, 6, 6)
    module(x)
    module.eval()
    out = module(x)
    assert out.is_valid
    q_x = module.input_quant(x).int().double()
    q_w = module.quant_weight().int().double()
    if layer is QuantLinear:
        expected = nn.functional.linear(q_x, q_w)
        axis = (1, -1)
    else:
        expected = nn.functional.conv2d(q_x, q_w, padding=1)
        axis = (1, -1, 1, 1)
    if bias_quant in (Int8Bias, Int32Bias):
        accumulator = (module.input_quant.scale() * module.weight_quant.scale()).flatten()
        bits = module.bias_quant.bit_width().item()
        q_b = (module.bias / accumulator).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        expected = expected + q_b.double().reshape(axis)
        assert out.zero_point.numel() == 1
        assert out.zero_point.item() == 0
    assert torch.equal(out.int().double(), expected)


def test_an_output_quantizer_gives_its_width() -> None:
    layer = QuantLinear(
        6, 5, output_quant=Int8ActPerTensorFloat, output_bit_width=5, return_quant_tensor=True
    )
    out = layer(torch.randn(3, 6))
    assert out.is_valid
    assert out.bit_width.item() == 5


def test_keywords_reach_the_tensor_that_their_prefix_names() -> None:
    layer = QuantLinear(
        6,
        5,
        input_quant=Int8ActPerTensorFloat,
        input_bit_width=5,
        output_quant=Int8ActPerTensorFloat,
        output_bit_width=6,
        output_narrow_range=True,
        weight_bit_width=3,
        bias_quant=Int8Bias,
        bias_bit_width=7,
    )
    widths = [
        getattr(layer, f"{t}_quant").bit_width().item()
        for t in ("input", "output", "weight", "bias")
    ]
    assert widths == [5, 6, 3, 7]
    assert layer.output_quant.is_narrow_range


def test_a_shifted_weight_has_a_float_product() -> None:
    layer = QuantLinear(
        6,
        5,
        input_quant=Int8ActPerTensorFloat,
        weight_quant=ShiftedUint8WeightPerTensorFloat,
        return_quant_tensor=True,
    )
    with pytest.raises(RuntimeError, match="zero point"):
        layer(torch.randn(2, 6))
    layer.return_quant_tensor = False
    assert type(layer(torch.randn(2, 6))) is torch.Tensor


def test_quantized_inputs_go_through_the_network() -> None:
    act = QuantIdentity(return_quant_tensor=True)
    layer = QuantLinear(6, 5, bias_quant=Int32Bias, return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="Input scale required"):
        layer.quant_bias()
    out = layer(act(torch.randn(2, 6)))
    assert out.is_valid and layer.quant_bias().is_valid


def test_tensors_of_zero_elements_pass() -> None:
    layer = QuantLinear(
        6, 5, input_quant=Int8ActPerTensorFloat, weight_quant=Int8WeightPerChannelFloat
    )
    assert layer(torch.zeros(0, 6)).shape == (0, 5)
    layer(torch.randn(2, 6))
    assert layer.eval()(torch.zeros(0, 6)).shape == (0, 5)


def test_the_dtype_and_device_of_a_layer_reach_its_quantizers() -> None:
    layer = QuantLinear(6, 5, input_quant=Int8ActPerTensorFloat, dtype=torch.float64)
    assert layer.input_quant.scale().dtype == torch.float64
    meta = QuantLinear(6, 5, input_quant=Int8ActPerTensorFloat, device="meta")
    assert all(t.is_meta for n, t in meta.state_dict().items() if not n.endswith("collected_steps"))


def test_gradients_reach_weights_scales_and_inputs() -> None:
    layer = QuantLinear(
        6, 5, input_quant=Int8ActPerTensorFloat, weight_scaling_impl_type="parameter_from_stats"
    )
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).pow(2).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0
    assert layer.weight_quant.tensor_quant.scaling_impl.value.grad.abs() > 0


def test_two_copies_of_a_model_have_scales_of_their_own() -> None:
    act = QuantIdentity(return_quant_tensor=True)
    act(torch.ones(3))
    other = copy.deepcopy(act)
    other(torch.ones(3) * 50)
    act.eval()
    other.eval()
    with pytest.raises(RuntimeError, match="different scales"):
        act(torch.ones(3)) + other(torch.ones(3))


def test_shifted_activations_stay_quantized_through_relu_and_padding() -> None:
    q = QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, return_quant_tensor=True)(
        torch.randn(1, 2, 4, 4)
    )
    for out in (torch.relu(q), nn.functional.pad(q, (1, 1))):
        assert isinstance(out, IntQuantTensor)
        assert out.is_valid


def test_scales_per_channel_that_have_moved_are_not_taken_for_the_same() -> None:
    act = QuantIdentity(
        scaling_per_output_type="channel",
        per_channel_broadcastable_shape=(1, 3, 1),
        scaling_stats_permute_dims=(1, 0, 2),
        return_quant_tensor=True,
    )
    x = torch.randn(2, 3, 4) * torch.tensor([1.0, 5.0, 25.0]).reshape(1, 3, 1)
    act(x)
    act.eval()
    q = act(x)
    assert (q + act(x)).is_valid
    with pytest.raises(RuntimeError, match="different scales"):
        q + q.flip(1)
    assert torch.cat([q, q], 1).source is None
    assert (q.permute(0, 2, 1) + q.permute(0, 2, 1)).is_valid


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer", [QuantLinear, QuantConv2d])
def test_a_batch_norm_folds_into_the_layer_before_it(layer, affine, bias) -> None:
    arguments = (6, 5) if layer is QuantLinear else (6, 5, 3)
    folded = layer(*arguments, bias=bias, weight_quant=None)
    bn = (nn.BatchNorm1d if layer is QuantLinear else nn.BatchNorm2d)(5, affine=affine)
    shape = (8, 6) if layer is QuantLinear else (8, 6, 5, 5)
    for _ in range(20):
        bn(folded(torch.randn(shape) * 3 + 1))
    if affine:
        nn.init.uniform_(bn.weight, 0.5, 2)
        nn.init.normal_(bn.bias)
    bn.eval()
    x = torch.randn(shape)
    expected = bn(folded(x))
    folded.merge_bn_in(bn)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


def test_folding_starts_the_quantizers_anew() -> None:
    layer = QuantLinear(6, 5, bias=False, weight_scaling_impl_type="parameter_from_stats")
    bn = nn.BatchNorm1d(5)
    bn.running_var.fill_(1e-4)
    layer.merge_bn_in(bn)
    expected = layer.weight.abs().max().item() / 127
    assert layer.weight_quant.scale().item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"5 channels, got BatchNorm1d with 3 channels"):
        layer.merge_bn_in(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="with none"):
        layer.merge_bn_in(nn.BatchNorm1d(5, track_running_stats=False))


@pytest.mark.parametrize("rows", [3, 5])
def test_a_bias_by_the_scale_of_the_input_refuses_scales_of_rows(rows) -> None:
    """Also where there are as many rows as channels, whose scales they would be taken for."""
    x = torch.randn(rows, 6)
    layer = QuantLinear(6, 5, input_quant=Int8DynamicActPerRowFloat, bias_quant=Int32Bias)
    with pytest.raises(RuntimeError, match=rf"has {rows} scales.*Int8BiasPerTensorFloatInternal"):
        layer(x)
    depthwise = QuantConv2d(4, 4, 1, groups=4, bias_quant=Int32Bias, return_quant_tensor=True)
    scale = torch.rand(1, 4, 1, 1) + 0.5
    channels = IntQuantTensor(torch.ones(2, 4, 3, 3) * scale, scale, 0.0, 8.0, True)
    out = depthwise(channels)
    assert isinstance(out, IntQuantTensor) and out.is_valid
    mixing = QuantConv2d(4, 4, 1, bias_quant=Int32Bias)
    with pytest.raises(RuntimeError, match="has 4 scales"):
        mixing(channels)


def test_layers_tell_the_operations_of_an_element() -> None:
    assert QuantLinear(6, 4).per_elem_ops == 12 and QuantLinear(6, 4).out_channels == 4
    assert QuantConv2d(6, 4, (3, 2), groups=2).per_elem_ops == 36


def test_hard_swish_keeps_its_negative_values() -> None:
    layer = QuantHardSwish()
    x = torch.linspace(-4, 4, 101)
    layer(x)
    assert layer.act_quant.is_signed
    assert (layer(x) - nn.functional.hardswish(x)).abs().max() < 0.04
    assert layer(torch.tensor([-1.5])) < -0.3
