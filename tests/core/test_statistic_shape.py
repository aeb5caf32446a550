"""A statistic that doesn't fit its scale is told of by layer, tensor, part and both shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qframework
from qframework.inject import PolicyValueError
from qframework.layers import QuantIdentity, QuantLinear, QuantNonLinearActLayer, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8DynamicActPerRowFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerGroupFloat,
    ShiftedUint8ActPerTensorFloat,
)

CHANNELS = {"scaling_per_output_type": "channel", "scaling_stats_permute_dims": (1, 0, 2, 3)}


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().mean()


class Number(nn.Module):
    def forward(self, x: Tensor) -> float:
        return 3.0


def act(channels: int = 3, **keywords: Any) -> nn.Module:
    shape = (1, channels, 1, 1)
    return QuantIdentity(**{**CHANNELS, "per_channel_broadcastable_shape": shape, **keywords})


def weight(**keywords: Any) -> nn.Module:
    quantizer = keywords.pop("quantizer", Int8WeightPerChannelFloat)
    return QuantLinear(4, 3, **{"weight_quant": quantizer, **keywords})


IMAGES, ROWS = torch.ones(2, 3, 4, 4), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("build", "x", "words"),
    [
        (lambda: act(4), IMAGES, ["act_quant", "(3,)", "(1, 4, 1, 1)", "broadcastable_shape"]),
        (
            lambda: act(4, act_quant=ShiftedUint8ActPerTensorFloat),
            IMAGES,
            ["act_quant", "(1, 4, 1, 1)"],
        ),
        (lambda: act(scaling_stats_impl=One), IMAGES, ["One", "1 number", "(1, 3, 1, 1)"]),
        (
            lambda: weight(weight_scaling_stats_impl=One),
            ROWS,
            ["weight_quant", "One", "(3, 1)", "stats_reduce_dim"],
        ),
        (
            lambda: QuantIdentity(Int8DynamicActPerRowFloat, scaling_stats_impl=One),
            ROWS,
            ["act_quant", "One", "(2, 1)"],
        ),
        (lambda: act(), ROWS, ["act_quant", "permute_dims=(1, 0, 2, 3)", "(2, 4)"]),
    ],
)
def test_a_statistic_of_another_shape(
    build: Callable[[], nn.Module], x: Tensor, words: list[str]
) -> None:
    model = nn.Sequential(nn.Identity(), build())
    with pytest.raises((RuntimeError, ValueError)) as caught:
        model(x)
    assert all(word in str(caught.value) for word in ["1 (Quant", *words]), str(caught.value)


def test_a_statistic_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"QuantLinear.weight_quant: Number .* a float"):
        weight(weight_scaling_stats_impl=Number).quant_weight()


def test_at_construction_the_layer_is_named_once() -> None:
    with pytest.raises(RuntimeError, match=r"^QuantLinear.weight_quant \(\w+\): One gave"):
        weight(
            weight_scaling_stats_impl=One, weight_scaling_impl_type="parameter_from_stats"
        ).quant_weight()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: weight(weight_scaling_stats_op="max_ave"), "max_ave.*channel"),
        (
            lambda: weight(quantizer=Int8WeightPerGroupFloat, weight_group_dim=5),
            r"group_dim=5 .*\(3, 4\)",
        ),
        (lambda: act(scaling_stats_permute_dims=(1, 0, 2, 2)), r"\(1, 0, 2, 2\) .* once"),
    ],
)
def test_what_never_fits_is_refused_at_construction(
    build: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(PolicyValueError, match=words):
        build()


def test_an_array_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="must be a tensor of real numbers; got a ndarray"):
        QuantIdentity()(np.ones(3, dtype=np.float32))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4), (4, 4)])
@pytest.mark.parametrize("layer", [QuantIdentity, QuantReLU])
def test_scales_of_channels_do_not_spread_an_input(
    layer: type[nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer(**CHANNELS, per_channel_broadcastable_shape=(1, 3, 1, 1)))
    model(IMAGES)
    assert model.eval()(IMAGES).shape == IMAGES.shape
    with pytest.raises(ValueError, match=r"0 \(Quant\w+\).act_quant: .*\(1, 3, 1, 1\)"):
        model(torch.ones(shape))
    with qframework.frozen(model), pytest.raises(ValueError, match="channels of the scales"):
        model(torch.ones(shape))


def test_an_activation_of_ones_own_may_change_the_shape() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], 1)

    class QuantTwice(QuantNonLinearActLayer):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(
                act_impl=Twice,
                passthrough_act=False,
                input_quant=None,
                act_quant=Int8ActPerTensorFloat,
                return_quant_tensor=False,
                **keywords,
            )

    layer = QuantTwice(**CHANNELS, per_channel_broadcastable_shape=(1, 6, 1, 1))
    assert layer(IMAGES).shape == (2, 6, 4, 4)
    assert layer.eval()(IMAGES).shape == (2, 6, 4, 4)
