"""Means that are exact for any range and order, thresholds that stay what they are, searches that don't end worse."""

import itertools

import pytest
import torch

import qframework
from qframework import quantizers as q
from qframework.core.restrict_val import PowerOfTwoRestrictValue
from qframework.graph import calibration_mode
from qframework.layers import QuantIdentity, QuantLinear


def calibrated(layer: QuantIdentity, *batches: float) -> float:
    with calibration_mode(layer):
        for batch in batches:
            layer(torch.tensor([batch, -batch / 2]))
    layer.eval()
    return float(layer.act_quant.scale().detach()) * 128


@pytest.mark.parametrize("before", [1e4, 1e30, 1e-30])
@pytest.mark.parametrize("top", [1e-2, 1e-8, 1e-9, 1e20])
def test_a_calibration_knows_nothing_of_the_one_before(before, top) -> None:
    layer = QuantIdentity()
    calibrated(layer, before)
    assert calibrated(layer, top) == pytest.approx(top, rel=1e-6)


def test_the_mean_doesnt_depend_on_the_order_of_batches() -> None:
    numbers = [1e4, 1e-2, 3.0, 2e-5]
    expected = sum(numbers) / 4
    for order in itertools.permutations(numbers):
        assert calibrated(QuantIdentity(), *order) == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    ("quantizer", "more", "threshold"),
    [
        (q.Fp8e4m3ActPerTensorFloat, {"restrict_scaling_type": "power_of_two"}, 512),
        (q.Uint8ActPerTensorFloat, {"restrict_scaling_impl": PowerOfTwoRestrictValue}, 256),
        (q.Uint8ActPerTensorFixedPoint, {}, 256),
        (q.Int8ActPerTensorFixedPoint, {}, 128),
    ],
)
def test_the_threshold_is_the_same_while_statistics_are_collected_and_after(
    quantizer, more, threshold, kernels
) -> None:
    layer = QuantIdentity(quantizer, return_quant_tensor=True, collect_stats_steps=1, **more)
    x = torch.tensor([4.0, 1.0])  # a power of two stays what it is
    with qframework.settings.use(kernels=kernels):
        found = [float(layer(x).scale.detach()) for _ in range(3)]
        layer.eval()
        found.append(float(layer(x).scale.detach()))
    assert found == [4 / threshold] * 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "quantizer",
    [
        q.Int8WeightPerTensorFloatMSE,
        q.Int8WeightPerChannelFloatMSE,
        q.ShiftedUint8WeightPerChannelFloatMSE,
        q.Int8WeightPerChannelFixedPointMSE,
    ],
)
def test_a_fibonacci_search_is_nowhere_worse_than_a_grid(quantizer, bits) -> None:
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(bits))
    errors = []
    for method in ("grid", "fibonacci"):
        layer = QuantLinear(
            40, 8, weight_quant=quantizer, weight_bit_width=bits, weight_mse_search_method=method
        )
        layer.weight.data.copy_(w)
        errors.append((layer.quant_weight().value.detach() - w).square().sum().item())
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_a_fibonacci_search_finds_the_best_scale_of_many() -> None:
    w = torch.randn(40, generator=torch.Generator().manual_seed(3))
    layer = QuantLinear(40, 1, False, q.Int8WeightPerTensorFloatMSE, weight_bit_width=4,
                        weight_mse_search_method="fibonacci")  # fmt: skip
    layer.weight.data.copy_(w)
    error = float((layer.quant_weight().value.detach() - w).square().sum())
    scales = w.abs().max() / 7 * torch.linspace(0.05, 1, 4000)[:, None]
    values = (w / scales).round().clamp(-7, 7) * scales
    assert error <= float((values - w).square().sum(1).min()) * 1.002


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(ValueError, match="'grid', 'fibonacci'"):
        QuantLinear(
            4, 4, weight_quant=q.Int8WeightPerTensorFloatMSE, weight_mse_search_method="golden"
        )


@pytest.mark.parametrize(
    "more",
    [{}, {"weight_scaling_impl_type": "parameter"}, {"weight_bit_width_impl_type": "parameter"}],
)
def test_all_ternary_weights_get_their_gradient(more) -> None:
    quantizer = q.SignedTernaryWeightPerTensorConst.let(scaling_const=0.125)  # exact products
    layer = QuantLinear(6, 3, bias=False, weight_quant=quantizer, **more)
    up = torch.randn(3, 6)
    (layer.quant_weight().value * up).sum().backward()
    assert torch.equal(layer.weight.grad, up)
