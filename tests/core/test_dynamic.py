"""Activations with scales of their own."""

import copy

import pytest
import torch

from qframework import quantizers as q
from qframework.layers import QuantIdentity, QuantLinear

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_row_has_the_scale_of_its_maximum(training, bits) -> None:
    layer = QuantIdentity(q.Int8DynamicActPerRowFloat, return_quant_tensor=True, bit_width=bits)
    out = layer.train(training)(X)
    expected = X.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    assert torch.equal(out.scale, expected)
    top = 2 ** (bits - 1)
    assert torch.equal(out.value, (X / expected).round().clamp(-top, top - 1) * expected)
    assert not layer.state_dict()


def test_power_of_two_rows_are_rounded_down() -> None:
    scale = QuantIdentity(q.Int8DynamicActPerRowFixedPoint, return_quant_tensor=True)(X).scale
    assert torch.equal(scale, torch.exp2(X.abs().amax(-1, keepdim=True).log2().floor()) / 128)


@pytest.mark.parametrize(
    "name", ["ShiftedUint8DynamicActPerRowFloat", "ShiftedUint8DynamicActPerTensorFloat"]
)
def test_zero_points_follow_the_minimum(name) -> None:
    out = QuantIdentity(getattr(q, name), return_quant_tensor=True).eval()(X)
    shape = (2, 3, 1) if "Row" in name else ()
    low = X.amin(-1, keepdim=True) if "Row" in name else X.min()
    high = X.amax(-1, keepdim=True) if "Row" in name else X.max()
    scale = (high.clamp_min(0) - low.clamp_max(0)) / 255
    assert out.scale.shape == shape and out.zero_point.shape == shape
    torch.testing.assert_close(out.scale, scale)
    assert torch.equal(out.zero_point, (-low.clamp_max(0) / scale).round())
    assert (out.value - X).abs().max() <= out.scale.max() * 1.001


def test_two_results_are_never_taken_for_one_grid_and_no_scale_is_told() -> None:
    layer = QuantIdentity(q.Int8DynamicActPerTensorFloat, return_quant_tensor=True).eval()
    with pytest.raises(RuntimeError, match="different scales"):
        layer(X) + layer(2 * X)
    with pytest.raises(RuntimeError, match="dynamic"):
        layer.act_quant.scale()
    assert float(layer.act_quant.zero_point()) == 0 and float(layer.act_quant.bit_width()) == 8
    shifted = QuantIdentity(q.ShiftedUint8DynamicActPerTensorFloat)
    with pytest.raises(RuntimeError, match="dynamic"):
        shifted.act_quant.zero_point()


def test_impossible_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        QuantIdentity(q.Int8DynamicActPerTensorFloat, scaling_impl_type="parameter_from_stats")
    with pytest.raises(ValueError, match="scaling_per_row"):
        QuantIdentity(
            q.Int8DynamicActPerTensorFloat,
            scaling_per_output_type="channel",
            per_channel_broadcastable_shape=(1, 3, 1),
            scaling_stats_permute_dims=(1, 0, 2),
        )


def test_a_layer_takes_rows_with_scales_of_their_own() -> None:
    layer = QuantLinear(16, 4, input_quant=q.Int8DynamicActPerRowFloat).eval()
    x = layer.input_quant(X).value
    expected = torch.nn.functional.linear(x, layer.quant_weight().value, layer.bias)
    assert torch.equal(layer(X), expected)
    assert torch.equal(copy.deepcopy(layer)(X), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Int8DynamicActPerRowFloat", "ShiftedUint8DynamicActPerTensorFloat"]
)
def test_dynamic_quantizers_compile_and_export(name) -> None:
    layer = QuantIdentity(getattr(q, name)).eval()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(X), layer(X))
    torch.testing.assert_close(torch.export.export(layer, (X,)).module()(X), layer(X))
