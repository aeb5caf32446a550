"""Minifloats, microscaling, groups and codebooks, against their standards written out in plain numbers."""

import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.stats import norm

import qframework
import qframework.quantizers as q
from qframework.core.codebook import NORMAL_FLOAT_4, additive_powers_of_two
from qframework.inject import PolicyValueError
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear
from qframework.quant_tensor import (
    CodebookQuantTensor,
    FloatQuantTensor,
    GroupwiseFloatQuantTensor,
    GroupwiseIntQuantTensor,
)

sys.path.insert(0, str(Path(__file__).parent))

ELEMENTS = {
    "8e4m3": ("float8_e4m3fn", 448.0, 8),
    "8e5m2": ("float8_e5m2", 57344.0, 15),
    "6e3m2": ("float6_e3m2fn", 28.0, 4),
    "6e2m3": ("float6_e2m3fn", 7.5, 2),
    "4e2m1": ("float4_e2m1fn", 6.0, 2),
}


def cast(x: torch.Tensor, dtype: str, largest: float) -> torch.Tensor:
    """To a format of ml_dtypes and back, saturating."""
    clipped = x.clamp(-largest, largest).numpy()
    return torch.from_numpy(clipped.astype(getattr(ml_dtypes, dtype)).astype(np.float32))


def spread(*shape: int) -> torch.Tensor:
    """Numbers whose magnitudes differ by group."""
    generator = torch.Generator().manual_seed(1)
    magnitude = torch.exp(4 * torch.randn(*shape[:-1], shape[-1] // 8, 1, generator=generator))
    return (torch.randn(*shape[:-1], shape[-1] // 8, 8, generator=generator) * magnitude).flatten(
        -2
    )


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("role", ["Weight", "Act"])
def test_microscaling_minifloats_follow_the_standard(name, role) -> None:
    dtype, largest, emax = ELEMENTS[name]
    x = spread(6, 64)
    if role == "Weight":
        layer = QuantLinear(64, 6, weight_quant=getattr(q, f"MXFloat{name}Weight"))
        with torch.no_grad():
            layer.weight.copy_(x)
        got = layer.quant_weight()
    else:
        got = QuantIdentity(
            getattr(q, f"MXFloat{name}Act"), return_quant_tensor=True, group_dim=-1
        )(x)
    blocks = x.reshape(6, 2, 32)
    shared = 2.0 ** (torch.floor(torch.log2(blocks.abs().amax(-1, True).double())) - emax)
    expected = cast((blocks.double() / shared).float(), dtype, largest).double() * shared
    assert isinstance(got, GroupwiseFloatQuantTensor) and got.is_valid
    assert torch.equal(got.scale_.double(), shared)
    assert torch.equal(got.value.double(), expected.reshape(6, 64))


def test_microscaling_integers_follow_the_standard_to_the_letter() -> None:
    x = spread(6, 64)
    got = QuantIdentity(q.MXInt8OCPAct, return_quant_tensor=True, group_dim=-1)(x)
    blocks = x.reshape(6, 2, 32)
    shared = 2.0 ** torch.floor(torch.log2(blocks.abs().amax(-1, True)))
    codes = torch.clamp(torch.round(blocks / shared * 64), -128, 127)
    assert torch.equal(got.int().long(), codes.reshape(6, 64).long())
    assert torch.equal(got.value, (codes / 64 * shared).reshape(6, 64))


def test_a_group_of_zeros_shares_a_power_of_two() -> None:
    layer = QuantIdentity(q.MXFloat4e2m1Act, return_quant_tensor=True, group_dim=-1)
    x = torch.zeros(1, 64, requires_grad=True)
    got = layer(x)
    assert float(torch.log2(got.scale_[0, 0, 0].detach())) % 1 == 0
    got.value.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_nvfp4_has_scales_in_e4m3_under_one_float_scale() -> None:
    x = spread(6, 64)
    got = QuantIdentity(q.NVFloat4Act, return_quant_tensor=True, group_dim=-1)(x)
    whole = x.abs().max() / 6 / 448
    blocks = x.reshape(6, 4, 16)
    needed = blocks.abs().amax(-1, True) / 6 / whole
    scale = cast(needed, "float8_e4m3fn", 448.0).clamp_min(2.0**-9) * whole
    expected = cast(blocks / scale, "float4_e2m1fn", 6.0) * scale
    torch.testing.assert_close(got.scale_, scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.value, expected.reshape(6, 64), rtol=1e-5, atol=0)
    assert got.is_valid


def test_ragged_groups_are_filled_up_and_cut_again() -> None:
    layer = QuantLinear(70, 8, weight_quant=q.Int8WeightPerGroupFloat)
    got = layer.quant_weight()
    assert isinstance(got, GroupwiseIntQuantTensor)
    assert got.value_.shape == (8, 3, 32) and got.scale_.shape == (8, 3, 1)
    assert got.value.shape == got.scale.shape == (8, 70)
    expected = layer.weight[:, 64:].abs().amax(1) / 127
    torch.testing.assert_close(got.scale_[:, 2, 0], expected)
    torch.testing.assert_close(got.value / got.scale, got.int().float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("quantizer", "axis"), [("MXInt8Weight", 1), ("MXInt8Weight", 0)])
def test_groups_lie_along_any_axis_of_a_convolution(quantizer, axis) -> None:
    layer = QuantConv2d(
        8, 4, 3, weight_quant=getattr(q, quantizer), weight_group_size=2, weight_group_dim=axis
    )
    got = layer.quant_weight()
    groups = layer.weight.movedim(axis, 0).unflatten(0, (-1, 2)).abs().amax(1)
    scale = 2.0 ** torch.floor(torch.log2(groups)) / 128
    assert torch.equal(got.scale_.movedim(axis, 0).squeeze(axis + 1), scale)
    assert layer(torch.randn(1, 8, 5, 5)).shape == (1, 4, 3, 3)


def test_codes_are_those_of_the_format() -> None:
    layer = QuantLinear(64, 8, weight_quant=q.Fp8e4m3OCPWeightPerChannelFloat)
    got = layer.quant_weight()
    assert isinstance(got, FloatQuantTensor)
    bits = got.codes().numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(bits, got.minifloat().detach().numpy())
    torch.testing.assert_close(got.minifloat() * got.scale, got.value)


def test_an_overflow_that_does_not_saturate_is_infinite_or_not_a_number() -> None:
    x = torch.tensor([1.0, 1e6, -1e6, 60000.0])
    five = QuantIdentity(q.Fp8e5m2OCPAct, saturating=False, return_quant_tensor=True)(x)
    assert five.value.tolist() == [1.0, math.inf, -math.inf, 57344.0]
    assert five.is_valid and five.codes().tolist() == [0x3C, 0x7C, 0xFC, 0x7B]
    four = QuantIdentity(q.Fp8e4m3OCPAct, saturating=False)(x)
    assert four[0] == 1 and bool(four[1:].isnan().all())


def test_learned_widths_train() -> None:
    layer = QuantLinear(
        16,
        8,
        weight_quant=q.Fp8e4m3OCPWeightPerTensorFloat,
        weight_mantissa_bit_width_impl_type="parameter",
    )
    layer(torch.randn(4, 16)).square().sum().backward()
    width = layer.weight_quant.tensor_quant.mantissa_bit_width_impl.bit_width_offset
    assert width.grad is not None and width.grad.isfinite() and width.grad != 0


# ------------------------------------------------------------------ codebooks


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    offset = 0.5 * (1 - 1 / 32 + 1 - 1 / 30)
    upper = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    lower = norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([upper, [0.0], -lower]))
    assert np.allclose(levels / levels.max(), NORMAL_FLOAT_4, atol=2e-6)


def test_a_codebook_takes_the_nearest_entry() -> None:
    layer = QuantLinear(32, 8, weight_quant=q.NF4WeightPerGroupFloat, weight_group_size=16)
    got = layer.quant_weight()
    assert isinstance(got, CodebookQuantTensor) and got.is_valid
    book = torch.tensor(NORMAL_FLOAT_4)
    blocks = layer.weight.reshape(8, 2, 16)
    v = blocks / blocks.abs().amax(-1, True)
    nearest = (v.unsqueeze(-1) - book).abs().argmin(-1)
    assert torch.equal(got.codes().long(), nearest.reshape(8, 32))
    torch.testing.assert_close(
        got.value, (book[nearest] * blocks.abs().amax(-1, True)).reshape(8, 32)
    )


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_no_entry_stands_for_what_is_not_a_number(kernels) -> None:
    layer = QuantIdentity(q.APoT4ActPerTensorFloat)
    layer(torch.randn(64))
    with qframework.settings.use(kernels=kernels):
        got = layer.eval()(torch.tensor([float("nan"), float("inf"), 0.0]))
    assert got.isnan().tolist() == [True, False, False] and got[1] > 0


def test_a_users_codebook_may_have_any_levels() -> None:
    layer = QuantIdentity(
        q.CodebookActPerTensorFloat, codebook=[3, -1, 0.5], return_quant_tensor=True
    )
    x = torch.tensor([-9.0, -0.2, 0.0, 1.0, 9.0], requires_grad=True)
    layer(x)
    got = layer.eval()(x)
    assert (got.value / got.scale).tolist() == [-1.0, pytest.approx(0.5), 0.5, 0.5, 3.0]
    got.value.sum().backward()
    assert x.grad.tolist()[0] == 0.0 and x.grad.tolist()[2] == 1.0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_additive_powers_of_two_are_sums_of_powers_of_two(bits) -> None:
    levels = additive_powers_of_two(bits, 2, signed=False)
    assert len(levels) == 2**bits and levels[0] == 0.0 and levels[-1] == 1.0
    assert len(additive_powers_of_two(bits, 2)) == 2**bits - 1
    terms = -(-bits // 2)
    assert sorted(set(levels)) == list(levels)
    unit = sum(2.0**-i for i in range(terms))
    for level in levels:
        assert bin(round(level * unit * 2 ** (4 * terms))).count("1") <= terms


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("quantizer", "keywords", "says"),
    [
        ("FpOCPWeightPerTensorFloat", {"bit_width": 4, "exponent_bit_width": 0, "mantissa_bit_width": 3}, "exponent"),
        ("Fp8e4m3OCPWeight", {"bit_width": 7}, "needed: bit_width=8"),
        ("Fp8e4m3Weight", {"saturating": False}, "neither infinity nor NaN"),
        ("Fp8e4m3Weight", {"nan_values": ("11",)}, "mantissa_bit_width=3"),
        ("Fp8e4m3Weight", {"exponent_bias": 200}, "float32"),
        ("MXInt8Weight", {"group_size": 3, "group_padding": False}, "doesn't divide the 16"),
        ("Int8WeightPerTensorFloat", {"scaling_per_output_type": "group"}, "proxy for groups"),
        ("CodebookWeightPerTensorFloat", {"codebook": (1.0, 1.0)}, "different"),
        ("APoT4WeightPerTensorFloat", {"bit_width": 1}, "bit for magnitudes"),
    ],
)  # fmt: skip
def test_impossible_weights_are_refused_with_a_reason(quantizer, keywords, says) -> None:
    with pytest.raises(ValueError, match=says):
        QuantLinear(
            16,
            4,
            weight_quant=getattr(q, quantizer),
            **{f"weight_{k}": v for k, v in keywords.items()},
        )


def test_an_activation_says_which_axis_has_the_groups() -> None:
    with pytest.raises(PolicyValueError, match="group_dim has to be given"):
        QuantIdentity(q.MXInt8Act)
    layer = QuantIdentity(q.MXInt8Act, group_dim=-1, group_size=5, group_padding=False)
    with pytest.raises(ValueError, match="doesn't divide"):
        layer(torch.randn(2, 8))
    linear = QuantLinear(64, 4, input_quant=q.MXInt8Act)
    assert linear.input_quant(torch.randn(3, 64)).scale_.shape == (3, 2, 1)


def test_groups_of_one_weight_are_not_shared() -> None:
    first = QuantLinear(64, 4, weight_quant=q.MXInt8Weight)
    with pytest.raises(ValueError, match="can't be shared"):
        QuantLinear(64, 4, weight_quant=first.weight_quant)
