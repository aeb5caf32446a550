"""bfloat16, autocast, and torch.func."""

import copy

import pytest
import torch
from torch import nn

import qframework.quantizers
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=1),
        QuantConv2d(2, 4, 3, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4),
        QuantReLU(collect_stats_steps=1),
        nn.Flatten(),
        QuantLinear(64, 3),
    )


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_low_precision_trains_with_scales_in_float32(how) -> None:
    model = network()
    if how == "bfloat16":
        model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(4):
        x = torch.randn(2, 2, 6, 6, dtype=torch.bfloat16 if how == "bfloat16" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            out = model(x)
            weight = model[4].quant_weight()
        assert out.dtype == torch.bfloat16
        assert weight.scale.dtype == torch.float32
        optimizer.zero_grad()
        out.float().pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == parameter.dtype, name
                assert parameter.grad.isfinite().all(), name
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "tensor_quant" in name:
            assert parameter.dtype == torch.float32
    model.eval()
    with torch.no_grad():
        assert model(x).isfinite().all()
        assert model[2](x.float().bfloat16()).dtype == torch.bfloat16


def learned() -> nn.Sequential:
    model = network()
    for _ in range(2):
        model(torch.randn(2, 2, 6, 6))
    return model.eval()


def test_functional_gradients_equal_those_of_autograd() -> None:
    model = learned()
    x = torch.randn(3, 2, 6, 6)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).pow(2).sum()

    found = torch.func.grad(loss)(parameters, x)
    model(x).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_each_sample_by_vmap() -> None:
    model = learned()
    x = torch.randn(3, 2, 6, 6)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for row in range(3):
        alone = copy.deepcopy(model)
        alone(x[row : row + 1]).pow(2).sum().backward()
        for name, parameter in alone.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-4, atol=1e-4)


def test_an_ensemble_of_weights_by_vmap() -> None:
    model = learned()
    stacked = {k: torch.stack([v.detach(), v.detach() * 0.5]) for k, v in model.named_parameters()}
    x = torch.randn(3, 2, 6, 6)
    both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)), in_dims=(0,))(
        stacked
    )
    for index in range(2):
        own = {k: v[index] for k, v in stacked.items()}
        torch.testing.assert_close(both[index], torch.func.functional_call(model, own, (x,)))


def test_batched_gradients() -> None:
    layer = QuantReLU(collect_stats_steps=1)
    for _ in range(2):
        layer(torch.rand(5))
    x = torch.randn(5, requires_grad=True)
    out = layer(x)
    rows = torch.autograd.grad(out, x, torch.eye(5), is_grads_batched=True)[0]
    alone = torch.stack([torch.autograd.grad(layer(x), x, row)[0] for row in torch.eye(5)])
    assert torch.equal(rows, alone)


@pytest.mark.parametrize(
    "quantizer",
    [
        "Int8WeightPerTensorFloat",
        "Int8WeightPerChannelFloat",
        "Int8WeightPerTensorFixedPoint",
        "ShiftedUint8WeightPerTensorFloat",
        "ShiftedUint8WeightPerChannelFloat",
        "Fp8e4m3WeightPerChannelFloat",
        "NF4WeightPerChannelFloat",
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_weights_take_several_gradients_at_once(quantizer, shared) -> None:
    layer = QuantLinear(6, 4, weight_quant=getattr(qframework.quantizers, quantizer))
    if shared:
        QuantLinear(6, 4, weight_quant=layer.weight_quant)
    value = layer.quant_weight().value
    many = torch.randn(3, 4, 6)
    (together,) = torch.autograd.grad(
        value, layer.weight, many, is_grads_batched=True, retain_graph=True
    )
    for one, upstream in zip(together, many, strict=True):
        (alone,) = torch.autograd.grad(value, layer.weight, upstream, retain_graph=True)
        torch.testing.assert_close(one, alone)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_collecting_inside_a_transform_is_refused_with_the_remedy(transform) -> None:
    layer = QuantReLU(collect_stats_steps=2)
    function = (lambda x: layer(x).sum()) if transform is torch.func.grad else layer
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="calibration_mode, or call"):
        transform(function)(x)
    assert layer.act_quant.tensor_quant.scaling_impl.collected_steps == 0
    layer(x), layer(x), layer(x)
    transform(function)(x)
