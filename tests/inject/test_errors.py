"""Every mistake fails where it is made, with a message that leads on."""

import pytest
import torch

from qframework.inject import QuantizerError, UnknownNameError, value
from qframework.inject.enum import RestrictValueType
from qframework.layers import QuantConv2d, QuantHardTanh, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    IntBias,
)


def linear(**keywords: object) -> QuantLinear:
    return QuantLinear(4, 4, **keywords)


class Circle(Int8WeightPerTensorFloat):
    @value
    def bit_width(narrow_range):
        return 4

    @value
    def narrow_range(bit_width):
        return True


class Lacking(Int8WeightPerTensorFloat):
    @value
    def bit_width(my_bits):
        return my_bits


class Misspelled(Int8WeightPerTensorFloat):
    narow_range = False


@pytest.mark.parametrize(
    ("build", "kind", "parts"),
    [
        (
            lambda: linear(weight_bit_widht=4),
            TypeError,
            ["QuantLinear.weight_quant", "weight_bit_widht=4", "'weight_bit_width'"],
        ),
        (
            lambda: linear(wieght_bit_width=4),
            TypeError,
            ["wieght_bit_width=4", "'weight_bit_width'"],
        ),
        (
            lambda: QuantReLU(bit_witdh=4),
            TypeError,
            ["QuantReLU.act_quant", "bit_witdh=4", "'bit_width'"],
        ),
        (lambda: QuantConv2d(1, 1, 1, foo=1), TypeError, ["QuantConv2d", "foo=1", "'weight_'"]),
        (
            lambda: linear(bias=False, bias_quant=Int32Bias, bias_bit_widht=4),
            TypeError,
            ["QuantLinear.bias_quant", "bias_bit_widht=4", "'bias_bit_width'"],
        ),
        (
            lambda: linear(weight_bit_width="eight"),
            TypeError,
            ["QuantLinear.weight_quant", "weight_bit_width='eight'", "1 to 32"],
        ),
        (lambda: linear(weight_bit_width=0), ValueError, ["weight_bit_width=0", "1 to 32"]),
        (lambda: linear(weight_bit_width=33), ValueError, ["weight_bit_width=33", "1 to 32"]),
        (
            lambda: linear(weight_bit_width=4.5),
            ValueError,
            ["weight_bit_width=4.5", "whole number"],
        ),
        (lambda: linear(weight_bit_width=1), ValueError, ["bit_width=1", "narrow_range", "binary"]),
        (
            lambda: linear(weight_scaling_impl_type=RestrictValueType.FP),
            ValueError,
            ["weight_scaling_impl_type", "is a RestrictValueType", "ScalingImplType", "'stats'"],
        ),
        (
            lambda: linear(weight_scaling_impl_type="statss"),
            ValueError,
            ["weight_scaling_impl_type='statss'", "Did you mean 'stats'?"],
        ),
        (
            lambda: QuantIdentity(scaling_per_output_type="chanel"),
            ValueError,
            ["'tensor', 'channel', 'group'", "'channel'?"],
        ),
        (
            lambda: QuantIdentity(scaling_per_output_type="channel"),
            ValueError,
            ["scaling_stats_permute_dims"],
        ),
        (
            lambda: QuantIdentity(scaling_impl_type="he"),
            ValueError,
            ["'he'", "an activation", "'const'"],
        ),
        (lambda: QuantHardTanh(), ValueError, ["QuantHardTanh.act_quant", "min_val and max_val"]),
        (
            lambda: linear(weight_quant=Int8ActPerTensorFloat),
            TypeError,
            ["Int8ActPerTensorFloat", "another kind"],
        ),
        (
            lambda: linear(weight_quant="int8"),
            TypeError,
            ["QuantLinear.weight_quant", "'int8'", "str"],
        ),
        (lambda: linear(bias_quant=IntBias), AttributeError, ["'bit_width'", "bias_bit_width"]),
        (
            lambda: linear(weight_quant=Circle),
            RuntimeError,
            ["need each other", "narrow_range -> bit_width -> narrow_range"],
        ),
        (lambda: linear(weight_quant=Lacking), AttributeError, ["'my_bits'", "weight_my_bits"]),
        (lambda: linear(weight_quant=Misspelled), TypeError, ["'narow_range'", "'narrow_range'"]),
        (
            lambda: linear(weight_quant=Int8WeightPerTensorFloat.let(bit_widht=3)),
            TypeError,
            ["'bit_widht'", "'bit_width'"],
        ),
        (
            lambda: linear(weight_scaling_affine_shifting_init=0.5),
            RuntimeError,
            ["scaling_affine_rescaling_init"],
        ),
        (lambda: linear(weight_scaling_impl_type="const"), ValueError, ["scaling_const"]),
        (
            lambda: linear(
                weight_scaling_stats_op="signed_max", weight_restrict_scaling_type="power_of_two"
            ),
            ValueError,
            ["'signed_max'", "'power_of_two'", "'signed_fp'"],
        ),
    ],
)
def test_a_mistake_is_named_at_construction(build, kind, parts) -> None:
    with pytest.raises(QuantizerError) as caught:
        build()
    assert isinstance(caught.value, kind)
    for part in parts:
        assert part in str(caught.value)


def test_a_keyword_of_a_shared_quantizer_is_refused() -> None:
    first = linear()
    with pytest.raises(TypeError, match="weight_bit_width has no effect, the quantizer is shared"):
        linear(weight_quant=first.weight_quant, weight_bit_width=4)
    assert len(first.weight_quant.tracked_module_list) == 1


def test_an_error_in_a_value_function_says_where() -> None:
    class Broken(Int8WeightPerTensorFloat):
        @value
        def bit_width(module):
            return module.no_such_attribute

    with pytest.raises(AttributeError) as caught:
        linear(weight_quant=Broken)
    assert "QuantLinear.weight_quant (Broken)" in caught.value.__notes__[0]
    assert "module=QuantLinear" in caught.value.__notes__[0]


def test_a_name_that_only_a_layer_provides_is_explained() -> None:
    with pytest.raises(AttributeError, match="can only be read inside a layer"):
        _ = Int8WeightPerTensorFloat.tensor_quant
    assert not hasattr(Int8WeightPerTensorFloat, "no_such_name")


def test_a_value_function_with_self_is_refused() -> None:
    with pytest.raises(TypeError, match="without self"):

        class Wrong(Int8WeightPerTensorFloat):
            @value
            def bit_width(self):
                return 4


def test_errors_at_run_time_name_the_layer_in_its_model() -> None:
    from qframework.quantizers import Int8Bias

    model = torch.nn.Sequential()
    model.add_module("classifier", linear(bias_quant=Int8Bias))
    with pytest.raises(
        RuntimeError, match=r"classifier \(QuantLinear\): Input scale required.*input_quant="
    ):
        model(torch.randn(2, 4))
    with pytest.raises(
        RuntimeError, match=r"QuantLayer is not correctly configured\..*quantized input"
    ):
        linear(return_quant_tensor=True)(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="quantized weight"):
        linear(return_quant_tensor=True, weight_quant=None)(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match=r"QuantIdentity: return_quant_tensor=True.*act_quant="):
        QuantIdentity(act_quant=None, return_quant_tensor=True)(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("bits", "bit_width"),
        ("num_bits", "bit_width"),
        ("per_channel", "scaling_per_output_type"),
        ("rounding", "float_to_int_impl_type"),
        ("percentile", "high_percentile_q"),
    ],
)
def test_what_other_libraries_call_it_is_understood_in_errors(given: str, meant: str) -> None:
    for build, shown in (
        (lambda: QuantLinear(4, 4, **{f"weight_{given}": 1}), f"weight_{meant}"),
        (lambda: QuantLinear(4, 4, **{given: 1}), f"weight_{meant}"),
        (lambda: QuantReLU(**{given: 1}), meant),
        (lambda: QuantLinear(4, 4, weight_quant=Int8WeightPerTensorFloat.let(**{given: 1})), meant),
    ):
        with pytest.raises(UnknownNameError, match=f"Did you mean '{shown}'"):
            build()
