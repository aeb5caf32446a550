"""Gradients where a scale is NaN: the definition's are NaN wherever that scale is used, a fast form's where they depend on it."""

import pytest
import torch

import qframework
from qframework import quantizers
from qframework.layers import QuantIdentity, QuantLinear
from qframework.quant_tensor import dequantize

ROW = 2
PER_ROW = (
    "Int8WeightPerChannelFloat",
    "ShiftedUint8WeightPerChannelFloat",
    "Int8WeightPerChannelFloatMSE",
    "Int8WeightPerChannelLSQ",
    "Fp8e4m3WeightPerChannelFloat",
)


def weight_gradients(name: str, kernels: str, shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """The values of a weight with one NaN in a row, the gradient behind them and that of the weight."""
    torch.manual_seed(0)
    layer = QuantLinear(shape[1], shape[0], bias=False, weight_quant=getattr(quantizers, name))
    with torch.no_grad():
        layer.weight[ROW, 5] = torch.nan
    behind = torch.randn(shape)
    with qframework.settings.use(kernels=kernels):
        values = dequantize(layer.quant_weight())
        values.backward(behind.clone())
    return values.detach(), behind, layer.weight.grad


@pytest.mark.parametrize("kernels", ("auto", "fused"))
@pytest.mark.parametrize("shape", ((8, 16), (8, 64)))
@pytest.mark.parametrize("name", PER_ROW)
def test_values_and_gradients_of_other_rows_are_those_of_the_definition(
    name, shape, kernels
) -> None:
    values, behind, grad = weight_gradients(name, kernels, shape)
    defined, _, by_definition = weight_gradients(name, "reference", shape)
    assert torch.equal(values.isnan(), defined.isnan()) and bool(values[ROW].isnan().all())
    assert torch.equal(values.nan_to_num(), defined.nan_to_num())
    others = [i for i in range(shape[0]) if i != ROW]
    torch.testing.assert_close(grad[others], by_definition[others])
    assert bool(by_definition[ROW].isnan().all())
    within = grad[ROW][~grad[ROW].isnan()]
    passed = behind[ROW][~grad[ROW].isnan()]
    assert bool(((within == passed) | (within == 0)).all())  # as it comes, or stopped at an end
    assert int(grad[ROW].isnan().sum()) <= 1  # the element that the scale is made of


@pytest.mark.parametrize("kernels", ("auto", "fused"))
def test_with_one_scale_for_all_the_definition_s_gradients_are_nan_everywhere(kernels) -> None:
    name, shape = "Int8WeightPerTensorFloat", (8, 64)
    values, behind, grad = weight_gradients(name, kernels, shape)
    assert bool(values.isnan().all())
    assert bool(weight_gradients(name, "reference", shape)[2].isnan().all())
    assert int(grad.isnan().sum()) <= 1
    assert torch.equal(grad[~grad.isnan()], behind[~grad.isnan()])


@pytest.mark.parametrize("kernels", ("auto", "fused", "reference"))
def test_a_scale_that_is_learned_has_a_nan_gradient_with_every_form(kernels) -> None:
    layer = QuantIdentity(act_quant=quantizers.Int8ActPerTensorFloat, collect_stats_steps=1)
    layer(torch.randn(4, 64))
    x = torch.randn(4, 64)
    x[1, 3] = torch.nan
    with qframework.settings.use(kernels=kernels):
        out = dequantize(layer(x.requires_grad_()))
        out.sum().backward()
    assert torch.equal(out.isnan(), x.isnan())
    (value,) = (p for n, p in layer.named_parameters() if n.endswith("value"))
    assert bool(value.grad.isnan().all())
    assert int(x.grad.isnan().sum()) == 0
