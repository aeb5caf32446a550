"""A quantizer class is resolved once; further layers are built from its plan, and are the same."""

import pytest
import torch
from torch import nn

from qframework.inject import cached_resolution, value
from qframework.inject.resolver import Resolver
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU, QuantTanh
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
)


@pytest.fixture
def resolutions(monkeypatch) -> list[str]:
    """The quantizer classes that were resolved in full."""
    monkeypatch.setattr(cached_resolution, "_cached", type(cached_resolution._cached)())
    seen: list[str] = []
    node = Resolver._node

    def counted(self, name):
        if name == "tensor_quant" and not self.injector.__name__.startswith("None"):
            seen.append(self.injector.__name__)
        return node(self, name)

    monkeypatch.setattr(Resolver, "_node", counted)
    return seen


BUILDERS = {
    "linear": lambda: QuantLinear(4, 3),
    "4 bits": lambda: QuantLinear(4, 3, weight_bit_width=4, weight_bit_width_impl_type="parameter"),
    "channel": lambda: QuantConv2d(2, 3, 3, weight_quant=Int8WeightPerChannelFloat),
    "shifted": lambda: QuantLinear(4, 3, weight_quant=ShiftedUint8WeightPerTensorFloat),
    "learned": lambda: QuantLinear(4, 3, weight_scaling_impl_type="parameter_from_stats"),
    "relu": lambda: QuantReLU(bit_width=3),
    "tanh": lambda: QuantTanh(),
    "act shifted": lambda: QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat),
    "learned rounding": lambda: QuantLinear(4, 3, weight_float_to_int_impl_type="learned_round"),
}


def quantizer(layer: nn.Module) -> nn.Module:
    return (layer.act_quant if hasattr(layer, "act_quant") else layer.weight_quant).tensor_quant


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_layer_from_a_plan_is_like_the_first(kind, resolutions) -> None:
    first = BUILDERS[kind]()
    resolutions.clear()
    second = BUILDERS[kind]()
    assert not resolutions
    assert repr(first) == repr(second)
    assert str(first.explain()) == str(second.explain())
    assert [n for n, _ in first.named_modules()] == [n for n, _ in second.named_modules()]
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 2, 5, 5) if kind == "channel" else torch.randn(2, 4)
    assert torch.equal(first(x), second(x))
    for own, other in zip(quantizer(first).modules(), quantizer(second).modules(), strict=True):
        assert own is not other
    a, b = quantizer(first), quantizer(second)
    if hasattr(a, "int_quant"):
        assert a.int_quant.float_to_int_impl is not b.int_quant.float_to_int_impl


def test_shapes_and_types_are_the_layers_own(resolutions) -> None:
    small = QuantConv2d(2, 3, 3, weight_quant=Int8WeightPerChannelFloat)
    large = QuantConv2d(2, 7, 1, weight_quant=Int8WeightPerChannelFloat, dtype=torch.float64)
    assert resolutions == ["Int8WeightPerChannelFloat"]
    assert small.weight_quant.scale().shape == (3, 1, 1, 1)
    assert large.weight_quant.scale().shape == (7, 1, 1, 1)
    assert large.weight_quant.scale().dtype == torch.float64


def test_the_activation_function_belongs_to_the_layer(resolutions) -> None:
    relu = QuantReLU(act_quant=Int8ActPerTensorFloat)
    tanh = QuantTanh(act_quant=Int8ActPerTensorFloat)
    assert type(relu.act_quant.activation_impl) is nn.ReLU
    assert type(tanh.act_quant.activation_impl) is nn.Tanh


def test_a_users_function_is_called_for_each_layer(resolutions) -> None:
    seen = []

    class Mine(Int8WeightPerTensorFloat):
        scaling_impl_type = "parameter"

        @value
        def scaling_init(module):
            seen.append(module)
            return module.weight.abs().max().detach()

    layers = [QuantLinear(4, 3, weight_quant=Mine) for _ in range(3)]
    assert [m in seen for m in layers] == [True] * 3
    for layer in layers:
        torch.testing.assert_close(
            layer.weight_quant.scale() * 127, layer.weight.abs().max().detach()
        )
    assert resolutions == ["Mine"]


def test_a_function_that_chooses_otherwise_is_resolved_in_full(resolutions) -> None:
    from qframework.core.stats import AbsAve, AbsMax

    class Mine(Int8WeightPerTensorFloat):
        @value
        def scaling_stats_impl(module):
            return AbsMax if module.in_features > 4 else AbsAve

    wide, narrow = (QuantLinear(n, 3, weight_quant=Mine) for n in (8, 4))
    assert type(quantizer(wide).scaling_impl.scaling_stats_impl) is AbsMax
    assert type(quantizer(narrow).scaling_impl.scaling_stats_impl) is AbsAve


def test_errors_are_those_of_the_first_layer(resolutions) -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(TypeError) as caught:
            QuantLinear(4, 3, weight_bit_widht=4)
        messages.append(str(caught.value))
        QuantLinear(4, 3)
        with pytest.raises(ValueError, match="bit_width") as caught:
            QuantLinear(4, 3, weight_bit_width=0)
        messages.append(str(caught.value))
    assert messages[:2] == messages[2:]


def test_true_and_one_are_different_overrides(resolutions) -> None:
    QuantLinear(4, 3, weight_narrow_range=True)
    with pytest.raises(TypeError, match="narrow_range"):
        QuantLinear(4, 3, weight_narrow_range=1)
