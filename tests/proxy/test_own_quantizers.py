"""Tensor quantizers of a user's own, layers of a user's own, and what a bias is after a forward."""

import warnings

import pytest
import torch
from torch import nn

from qframework.inject import Injector
from qframework.layers import (
    QuantConv2d,
    QuantIdentity,
    QuantLinear,
    QuantNonLinearActLayer,
    QuantReLU,
    QuantWeightBiasInputOutputLayer,
)
from qframework.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloatMaxInit,
)


def quantizer(proxy, returned):
    class Own(nn.Module):
        def forward(self, x):
            y = x + ((x / 0.25).round().clamp(-8, 7) * 0.25 - x).detach()
            return returned(y)

    class Declared(Injector):
        tensor_quant = Own
        proxy_class = proxy
        signed, narrow_range = True, False

    return Declared


def weight(returned):
    return QuantLinear(
        4, 3, bias=False, weight_quant=quantizer(WeightQuantProxyFromInjector, returned)
    )


def activation(returned):
    quant = quantizer(ActQuantProxyFromInjector, returned)
    return QuantIdentity(quant, return_quant_tensor=True)


def result(layer):
    return layer.quant_weight() if hasattr(layer, "weight") else layer(torch.randn(4))


@pytest.mark.parametrize("build", [weight, activation])
@pytest.mark.parametrize("training", [True, False])
def test_numbers_become_tensors(build, training) -> None:
    layer = build(lambda y: (y, 0.25, 0, 4)).train(training)
    for _ in range(2):
        q = result(layer)
        assert (float(q.scale), float(q.zero_point), float(q.bit_width)) == (0.25, 0, 4)
        assert all(isinstance(t, torch.Tensor) for t in (q.scale, q.zero_point, q.bit_width))
        assert q.is_valid
        assert (q + q).is_valid
    proxy = layer.weight_quant if build is weight else layer.act_quant
    assert float(proxy.scale()) == 0.25


@pytest.mark.parametrize("build", [weight, activation])
def test_values_off_the_grid_are_told_of_once_by_the_layers_name(build) -> None:
    model = nn.Sequential()
    model.add_module("first", build(lambda y: (y + 0.1, 0.25, 0.0, 4)))
    with pytest.warns(UserWarning, match=r"no signed integers of 4 bits"):
        result(model.first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result(model.first)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda y: y, "must return"),
        (lambda y: (y, 0.25), "got 2 values"),
        (lambda y: (y, "a", 0, 4), "scale must be a number"),
        (lambda y: (y, -0.25, 0, 4), "scale must be positive"),
        (lambda y: (y[:1], 0.25, 0, 4), "must return values of shape"),
    ],
)
@pytest.mark.parametrize("build", [weight, activation])
def test_what_cannot_be_is_refused(build, returned, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        result(build(returned))


# ------------------------------------------------------------ layers


class Bounded(nn.Module):
    def __init__(self, alpha: float = 1.5) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        return x.clamp(0, self.alpha)


def test_an_activation_layer_is_made_by_arguments() -> None:
    layer = QuantNonLinearActLayer(
        Uint8ActPerTensorFloatMaxInit, act_impl=Bounded, passthrough_act=True, max_val=3.0
    )
    x = torch.linspace(-3, 3, 13)
    step = 3.0 / 255
    torch.testing.assert_close(layer(x).detach(), (x.clamp(0, 1.5) / step).round() * step)
    assert layer.act_quant.is_passthrough_act
    plain = QuantNonLinearActLayer(None, act_impl=nn.SiLU)
    assert torch.equal(plain(x), nn.functional.silu(x))
    with pytest.raises(TypeError, match="must be a module class"):
        QuantNonLinearActLayer(act_impl=nn.SiLU())


class Doubled(QuantWeightBiasInputOutputLayer, nn.Linear):
    def __init__(self, *sizes, **keywords) -> None:
        nn.Linear.__init__(self, *sizes)
        QuantWeightBiasInputOutputLayer.__init__(self, **keywords)

    def inner_forward_impl(self, x, quant_weight, quant_bias):
        return 2 * nn.functional.linear(x, quant_weight, quant_bias)


def test_a_layer_with_weights_is_made_of_the_public_base() -> None:
    torch.manual_seed(0)
    layer = Doubled(4, 3, weight_bit_width=4, input_quant=Int8ActPerTensorFloat)
    torch.manual_seed(0)
    ours = QuantLinear(4, 3, weight_bit_width=4, input_quant=Int8ActPerTensorFloat)
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), 2 * ours(x))


def test_a_base_without_its_parts_says_what_is_missing() -> None:
    class Empty(QuantWeightBiasInputOutputLayer, nn.Linear):
        def __init__(self) -> None:
            QuantWeightBiasInputOutputLayer.__init__(self)

    class Silent(QuantWeightBiasInputOutputLayer, nn.Linear):
        def __init__(self) -> None:
            nn.Linear.__init__(self, 2, 2)
            QuantWeightBiasInputOutputLayer.__init__(self)

    with pytest.raises(RuntimeError, match="build the float layer first"):
        Empty()
    with pytest.raises(TypeError, match="define inner_forward_impl"):
        Silent()(torch.ones(2))


# ------------------------------------------------------------ biases


def test_the_bias_after_a_forward_gives_its_integers() -> None:
    layer = QuantConv2d(2, 3, 3, bias_quant=Int32Bias, weight_quant=Int8WeightPerTensorFloat)
    act = QuantReLU(return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="run the layer once"):
        layer.quant_bias()
    for size in (1.0, 3.0):
        x = act(size * torch.rand(1, 2, 5, 5))
        layer(x)
        scale = (x.scale * layer.quant_weight().scale).detach()
        expected = (layer.bias.detach() / scale).round().to(torch.int32)
        assert torch.equal(layer.quant_bias().int(), expected)
