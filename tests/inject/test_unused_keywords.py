"""Keywords that quantizers know, and what becomes of those that one of them has no use for."""

import pickle
import warnings

import dependencies
import pytest
import torch

import qframework
from qframework import inject, quantizers
from qframework.inject import UnusedKeywordWarning
from qframework.inject.enum import QuantType
from qframework.layers import (
    QuantConv2d,
    QuantHardTanh,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantReLU,
)
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFloat,
)
from qframework.quantizers.solver import WeightQuantSolver


def linear(**keywords):
    return QuantLinear(4, 3, **keywords)


def conv(**keywords):
    return QuantConv2d(2, 3, 3, **keywords)


OF_CHANNELS = {
    "per_channel_broadcastable_shape": (1, 3, 1, 1),
    "scaling_stats_permute_dims": (1, 0, 2, 3),
}
WEIGHTS = [
    quantizers.Int8WeightPerTensorFloat,
    quantizers.Int8WeightPerChannelFloat,
    quantizers.Int8WeightPerChannelFixedPoint,
    quantizers.ShiftedUint8WeightPerTensorFloat,
    quantizers.Int8WeightPerTensorFloatMSE,
    quantizers.Fp8e4m3OCPWeightPerChannelFloat,
]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("quantizer", WEIGHTS)
def test_the_older_name_of_granularity_decides_on_weights(quantizer, flag) -> None:
    torch.manual_seed(0)
    older = conv(weight_quant=quantizer, weight_scaling_per_output_channel=flag)
    torch.manual_seed(0)
    kind = "channel" if flag else "tensor"
    newer = conv(weight_quant=quantizer, weight_scaling_per_output_type=kind)
    assert older.weight_quant.scale().shape == ((3, 1, 1, 1) if flag else ())
    assert torch.equal(older.weight_quant.scale(), newer.weight_quant.scale())


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("prefix", ["input_", "output_", "act_", ""])
def test_the_older_name_of_granularity_decides_on_activations(prefix, flag) -> None:
    named = {"scaling_per_output_channel": flag, **(OF_CHANNELS if flag else {})}
    keywords = {prefix + k: v for k, v in named.items()}
    if prefix in ("input_", "output_"):
        layer = QuantConv2d(3, 3, 3, **{f"{prefix}quant": Int8ActPerTensorFloat}, **keywords)
        proxy = getattr(layer, f"{prefix}quant")
    else:
        proxy = QuantReLU(**keywords).act_quant
    assert proxy(torch.rand(2, 3, 4, 4)).scale.shape == ((1, 3, 1, 1) if flag else ())


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: linear(weight_sigma=3.0), ["QuantLinear.weight_quant", "weight_sigma=3.0"]),
        (lambda: linear(weight_accumulator_bit_width=16), ["weight_accumulator_bit_width=16"]),
        (lambda: linear(weight_collect_stats_steps=5), ["weight_collect_stats_steps=5"]),
        (lambda: QuantReLU(per_channel_broadcastable_shape=(1, 3)), ["broadcastable_shape=(1, 3)"]),
        (lambda: QuantReLU(scaling_stats_permute_dims=(1, 0)), ["permute_dims=(1, 0)"]),
        (lambda: linear(bias_narrow_range=True), ["bias_narrow_range=True", "bias_quant=..."]),
        (lambda: linear(input_bit_width=4), ["input_bit_width=4", "input_quant=..."]),
        (
            lambda: linear(weight_quant=SignedBinaryWeightPerTensorConst, weight_bit_width=4),
            ["weight_bit_width=4"],
        ),
    ],
)
def test_a_known_keyword_without_use_is_told_of(build, parts) -> None:
    with pytest.warns(UnusedKeywordWarning, match="has no effect") as seen:
        build()
    assert len(seen) == 1
    assert all(part in str(seen[0].message) for part in parts)
    assert seen[0].filename == __file__
    with pytest.warns(UnusedKeywordWarning):
        build()  # again
    with qframework.settings.use(unused_keywords="error"), pytest.raises(TypeError, match="effect"):
        build()
    with qframework.settings.use(unused_keywords="ignore"):
        build()


def test_a_message_names_no_keyword_that_was_not_given() -> None:
    with pytest.warns(UnusedKeywordWarning) as seen:
        linear(weight_sigma=3.0)
    assert str(seen[0].message).count("weight_") == 2  # the tensor and the keyword


@pytest.mark.parametrize(
    "build",
    [
        lambda: linear(weight_quant=SignedBinaryWeightPerTensorConst, weight_bit_width=1),
        lambda: QuantIdentity(SignedBinaryActPerTensorConst, bit_width=1),
        lambda: QuantHardTanh(
            quant_type="ternary",
            bit_width=2,
            threshold=0.5,
            scaling_impl_type="const",
            min_val=-1.0,
            max_val=1.0,
        ),
        lambda: linear(weight_quant_type="int", weight_quant_delay_steps=0),
        lambda: linear(weight_quant=None, weight_bit_width=6),
        lambda: QuantIdentity(None, bit_width=6),
        lambda: QuantReLU(act_quant=None, bit_width=6),
        lambda: linear(weight_quant_type="fp", weight_bit_width=8),
        lambda: QuantReLU(quant_type="fp", bit_width=8),
        lambda: QuantLSTM(4, 6, io_quant=None, io_bit_width=4),
        lambda: QuantLSTM(4, 6, weight_quant_type="int", dropout=0.0),
        lambda: linear(cache_inference_quant_bias=True),
        lambda: linear(compute_output_scale=True, compute_output_bit_width=True),
        lambda: QuantReLU(cache_inference_quant_act=True),
        lambda: QuantLSTM(4, 6, cache_inference_quant_bias=True),
    ],
)
def test_nothing_is_said_of_what_is_in_effect_or_was_switched_off(build) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()


@pytest.mark.parametrize(
    ("build", "hint"),
    [
        (lambda: conv(bit_width=4), "weight_bit_width"),
        (lambda: conv(bit_widht=4), "weight_bit_width"),
        (lambda: linear(max_val=4.0), "input_max_val"),
        (lambda: linear(weight_quants=None), "weight_quant"),
        (lambda: linear(inputbit_width=4), "input_bit_width"),
        (lambda: linear(weiight_scaling_min_val=4), "weight_scaling_min_val"),
        (lambda: linear(WEIGHT_QUANT=None), "weight_quant"),
        (lambda: linear(w_quant=None), "weight_quant"),
        (lambda: QuantReLU(bit_witdh=4), "bit_width"),
        (lambda: QuantReLU(return_quant_tenso=True), "return_quant_tensor"),
    ],
)
def test_a_hint_names_what_was_meant(build, hint) -> None:
    with pytest.raises(TypeError, match=f"Did you mean '{hint}'"):
        build()


def test_a_value_that_cannot_be_is_refused_though_nothing_reads_it() -> None:
    with pytest.raises(ValueError, match="weight_collect_stats_steps=0"):
        linear(weight_collect_stats_steps=0)


# ------------------------------------------------------------ bodies of classes


@pytest.mark.parametrize("base", [Int8WeightPerChannelFloat, Int8ActPerTensorFloat])
@pytest.mark.parametrize("prefix", ["weight_", "act_", "input_", "bias_", "output_"])
def test_a_prefix_in_a_body_is_refused_with_the_name_without(prefix, base) -> None:
    quantizer = type("Mine", (base,), {f"{prefix}bit_width_impl_type": "parameter"})
    assert quantizer.__module__ == __name__
    with pytest.raises(TypeError, match="write 'bit_width_impl_type'"):
        if base is Int8ActPerTensorFloat:
            QuantIdentity(quantizer)
        else:
            linear(weight_quant=quantizer)


class Bits(WeightQuantSolver):
    """Float, binary or integers, by the number of bits."""

    narrow_range, signed = True, True
    scaling_impl_type = "const"
    scaling_const = 1.0

    @inject.value
    def quant_type(bit_width):
        if bit_width is None:
            return QuantType.FP
        return QuantType.BINARY if bit_width == 1 else QuantType.INT


@pytest.mark.parametrize(("bits", "expected"), [(None, None), (1, 1.0), (4, 4.0)])
def test_a_function_may_make_a_float_layer_of_no_bits(bits, expected) -> None:
    layer = linear(weight_quant=Bits, weight_bit_width=bits)
    found = layer.weight_quant.bit_width()
    assert found == expected if expected is None else float(found) == expected


def test_no_bits_are_refused_where_some_are_needed() -> None:
    with pytest.raises(TypeError, match="weight_bit_width=None"):
        linear(weight_bit_width=None)


def test_functions_and_paths_of_the_injection_library_are_read() -> None:
    class Theirs(Int8WeightPerTensorFloat):
        bits = 5
        bit_width = dependencies.this.bits

        @dependencies.value
        def narrow_range(bits):
            return bits < 4

    class Nested(Int8WeightPerTensorFloat):
        bits = 3

        class inner(inject.Injector):
            width = (dependencies.this << 1).bits

        @dependencies.value
        def bit_width(inner):
            return inner.width

    layer = linear(weight_quant=Theirs)
    assert float(layer.weight_quant.bit_width()) == 5
    assert not layer.weight_quant.is_narrow_range
    assert float(linear(weight_quant=Nested).weight_quant.bit_width()) == 3


def test_items_of_paths_are_refused() -> None:
    with pytest.raises(TypeError, match="@value"):

        class Wrong(Int8WeightPerTensorFloat):
            bit_width = dependencies.this.bits[0]


# ------------------------------------------------------------ attributes


@pytest.mark.parametrize(
    ("assign", "keyword"),
    [
        (lambda layer: setattr(layer, "bit_width", 3), "weight_bit_width=3"),
        (lambda layer: setattr(layer, "weight_bit_width", 3), "weight_bit_width=3"),
        (lambda layer: setattr(layer.weight_quant, "bit_width", 3), "weight_bit_width=3"),
        (lambda layer: setattr(layer.weight_quant, "narrow_range", 3), "weight_narrow_range=3"),
    ],
)
def test_what_a_quantizer_was_built_with_is_not_assigned(assign, keyword) -> None:
    layer = linear()
    with pytest.raises(AttributeError, match=keyword):
        assign(layer)
    assert float(pickle.loads(pickle.dumps(layer)).weight_quant.bit_width()) == 8


def test_a_layer_of_ones_own_may_hold_its_settings() -> None:
    class Mine(QuantLinear):
        def __init__(self, bit_width):
            super().__init__(4, 3, weight_bit_width=bit_width)
            self.bit_width = bit_width

    assert Mine(3).bit_width == 3


def test_an_explanation_is_iterated_as_it_prints() -> None:
    layer = linear(bias_quant=Int8BiasPerTensorFloatInternalScaling)
    explanations = layer.explain()
    assert "\n".join(map(str, explanations)) == str(explanations)
    assert list(explanations.keys()) == [n for n, _ in explanations.items()]
    weight = explanations["weight_quant"]
    assert [row.name for row in weight] == [row.name for row in weight.rows]
    assert QuantReLU(Uint8ActPerTensorFloat).explain()["act_quant"]["bit_width"].value == "8"
