"""Decoupled, weight-normalized and accumulator-aware weights."""

import copy

import pytest
import torch

from qframework import quantizers as q
from qframework.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from qframework.quant_tensor import IntQuantTensor

A2Q = ["Int8AccumulatorAwareWeightQuant", "Int8AccumulatorAwareZeroCenterWeightQuant"]
NORMS = {"L2": 2.0, "L1": 1.0, "Linf": float("inf")}


def extreme_sums(integers: torch.Tensor, bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and largest dot product of integer rows with any input of that type, in exact arithmetic."""
    rows = integers.reshape(integers.shape[0], -1).to(torch.int64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    up, down = rows.clamp_min(0).sum(1), rows.clamp_max(0).sum(1)
    return int((up * low + down * high).min()), int((up * high + down * low).max())


def quantized(bits: int, signed: bool, shape: tuple[int, ...]) -> IntQuantTensor:
    one = torch.tensor(1.0)
    return IntQuantTensor(torch.zeros(shape), one, one * 0, one * bits, signed, False)


@pytest.mark.parametrize("name", A2Q)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("input_bits", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulator", [8, 10, 12, 16, 20])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_no_input_overflows_the_accumulator(
    name, signed, input_bits, accumulator, granularity
) -> None:
    if signed and input_bits == 1:
        pytest.skip("one bit with a sign holds 0 and -1 alone")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        layer = QuantConv2d(
            16,
            6,
            3,
            bias=False,
            weight_quant=getattr(q, name),
            weight_accumulator_bit_width=accumulator,
            weight_scaling_per_output_type=granularity,
        )
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator).pow(3))
            layer.weight[0] = 1.0  # equal elements sit on the bound together
            layer.weight[1] = -0.5
            layer.weight[2, 1:] = 0
            for (
                parameter
            ) in layer.weight_quant.parameters():  # trained somewhere, g far above the bound
                parameter.add_(3 * torch.randn(parameter.shape, generator=generator) + 2 * seed)
        weight = layer.quant_weight(quantized(input_bits, signed, (1, 16, 3, 3)))
        integers = (weight.value.double() / weight.scale.double()).round()
        low, high = extreme_sums(integers, input_bits, signed)
        assert -(2 ** (accumulator - 1)) <= low and high <= 2 ** (accumulator - 1) - 1


def test_the_bound_is_used_and_not_only_kept() -> None:
    layer = QuantLinear(
        512,
        4,
        bias=False,
        weight_quant=q.Int8AccumulatorAwareWeightQuant,
        weight_accumulator_bit_width=14,
    )
    weight = layer.quant_weight(quantized(4, False, (1, 512)))
    _, high = extreme_sums((weight.value / weight.scale).round().abs(), 4, False)
    assert high > 0.3 * 2**13
    plain = QuantLinear(512, 4, bias=False, weight_quant=q.Int8WeightPerChannelFloat).quant_weight()
    assert extreme_sums(plain.int().abs(), 4, False)[1] > 2**13


@pytest.mark.parametrize("name", A2Q)
def test_accumulator_aware_weights_need_the_width_of_the_input(name) -> None:
    layer = QuantLinear(4, 2, weight_quant=getattr(q, name))
    with pytest.raises(RuntimeError, match="input is not quantized"):
        layer(torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="input is not quantized"):
        layer.quant_weight()
    assert layer.weight_quant.scale().shape == (2, 1)
    assert layer.weight_quant.pre_scale(quantized(8, False, (1, 4))).shape == (2, 1)


def test_rounding_that_lengthens_is_refused() -> None:
    with pytest.raises(ValueError, match="round_to_zero"):
        QuantLinear(
            4,
            2,
            weight_quant=q.Int8AccumulatorAwareWeightQuant,
            weight_float_to_int_impl_type="round",
        )


@pytest.mark.parametrize("name", NORMS)
def test_weight_normalization_makes_the_weight_what_its_norm_says(name) -> None:
    quantizer = getattr(q, f"Int8WeightNorm{name}PerChannelFixedPoint")
    layer = QuantLinear(32, 4, bias=False, weight_quant=quantizer, weight_bit_width=16)
    g = layer.weight_quant.tensor_quant.pre_scaling_impl.value
    norm = torch.linalg.vector_norm(layer.weight, ord=NORMS[name], dim=1, keepdim=True)
    torch.testing.assert_close(g.detach(), norm.detach())
    with torch.no_grad():
        g.mul_(0.5)
    got = torch.linalg.vector_norm(layer.quant_weight().value, ord=NORMS[name], dim=1, keepdim=True)
    torch.testing.assert_close(got, norm / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "Int4WeightPerTensorFloatDecoupled",
        "Int8WeightPerChannelFloatDecoupled",
        "Int4WeightPerTensorFixedPointDecoupled",
        "Int8WeightNormL2PerChannelFixedPoint",
    ],
)
def test_decoupled_values_are_integers_of_one_scale_times_another(name) -> None:
    layer = QuantLinear(16, 4, bias=False, weight_quant=getattr(q, name), dtype=torch.float32)
    with torch.no_grad():
        layer.weight_quant.tensor_quant.scaling_impl.value.add_(0.7)
    weight, proxy = layer.quant_weight(), layer.weight_quant
    top = 2 ** (int(weight.bit_width) - 1) - 1
    integers = (layer.weight / proxy.pre_scale()).round().clamp(-top, top)
    torch.testing.assert_close(weight.value, integers * weight.scale)
    assert torch.equal(proxy.pre_zero_point(), torch.zeros(()))
    assert weight.is_valid
    weight.value.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["Int8WeightNormL2PerChannelFixedPoint", *A2Q])
def test_state_pickles_copies_and_float_checkpoints(name) -> None:
    def make() -> QuantLinear:
        return QuantLinear(
            8, 4, weight_quant=getattr(q, name), input_quant=q.Uint8ActPerTensorFloat
        ).eval()

    x = torch.rand(2, 8)
    one, other = make(), make()
    other.load_state_dict(
        torch.nn.Linear(8, 4).state_dict()
    )  # norms and scales start from its weights
    with torch.no_grad():
        one.weight_quant.tensor_quant.scaling_impl.value.add_(0.1)
    one.train()(x), one.eval()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))
    assert "weight_quant.tensor_quant.pre_scaling_impl.scaling_impl.value" in one.state_dict()


def test_brain_floats_come_back_as_they_came() -> None:
    layer = QuantLinear(8, 4, weight_quant=q.Int8WeightNormL2PerChannelFixedPoint).bfloat16()
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight_quant.scale().dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", A2Q)
def test_accumulator_aware_layers_compile_and_export(name) -> None:
    layer = QuantLinear(8, 4, weight_quant=getattr(q, name), input_quant=q.Uint8ActPerTensorFloat)
    x = torch.rand(2, 8)
    layer(x), layer.eval()
    # The largest weight of a channel lies on an integer, where the order in which a norm is summed up decides
    # between it and the next one towards zero.
    room = 2 * layer.weight_quant.scale().max().item()
    for other in (torch.compile(layer, fullgraph=True), torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=room)


@pytest.mark.parametrize("name", [*A2Q, *(f"Int8WeightNorm{n}PerChannelFixedPoint" for n in NORMS)])
@pytest.mark.parametrize("transposed", [False, True])
def test_with_one_scale_the_norms_stay_those_of_channels(name, transposed) -> None:
    torch.manual_seed(0)
    cls = QuantConvTranspose2d if transposed else QuantConv2d
    layer = cls(4, 6, 3, weight_quant=getattr(q, name), weight_scaling_per_output_type="tensor")
    one = layer.quant_weight(quantized(8, False, (1, 4, 3, 3)))
    assert one.scale.shape == ()
    norm = layer.weight_quant.tensor_quant.pre_scaling_impl.value
    assert norm.shape == ((1, 6, 1, 1) if transposed else (6, 1, 1, 1))
    assert torch.allclose(one.scale, layer.weight.abs().max() / 127)
    if name != A2Q[1]:  # which takes the means of channels away
        error = (one.value - layer.weight).abs().max()
        assert error <= one.scale * (1 if name in A2Q else 0.5) * 1.001
    one.value.sum().backward()
    assert norm.grad is not None and layer.weight.grad is not None
    again = cls(4, 6, 3, weight_quant=getattr(q, name), weight_scaling_per_output_type="tensor")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.quant_weight(quantized(8, False, (1, 4, 3, 3))).value, one.value)


def test_with_one_scale_a_channel_is_bounded_by_itself() -> None:
    """A bound on the whole weight would leave six channels a sixth of the integers each."""
    sums = {}
    for granularity in ("channel", "tensor"):
        layer = QuantLinear(
            64,
            6,
            weight_quant=q.Int8AccumulatorAwareWeightQuant,
            weight_accumulator_bit_width=12,
            weight_scaling_per_output_type=granularity,
        )
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 384).reshape(6, 64))
        integers = layer.quant_weight(quantized(4, False, (1, 64))).int()
        sums[granularity] = integers.abs().sum(1)
    assert torch.equal(sums["tensor"], sums["channel"])
    assert sums["tensor"].max() > 64
