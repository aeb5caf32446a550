from qframework.layers import QuantLinear, QuantReLU
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerTensorFloat


class Four(Int8WeightPerTensorFloat):
    bit_width = 4


def test_origins_are_keyword_class_layer_and_computation() -> None:
    layer = QuantLinear(4, 4, weight_quant=Four, weight_narrow_range=False)
    told = layer.weight_quant.explain()
    assert (told["bit_width"].value, told["bit_width"].origin) == ("4", "class Four")
    assert (told["narrow_range"].value, told["narrow_range"].origin) == (
        "False",
        "keyword weight_narrow_range",
    )
    assert told["out_channels"].origin == "provided by the layer"
    assert told["scaling_impl"].value == "StatsFromParameterScaling"
    assert "computed by" in told["scaling_impl"].origin
    assert "nonsense" not in told


def test_a_class_explains_itself() -> None:
    told = Int8ActPerTensorFloat.explain()
    assert told["collect_stats_steps"].value == "300"
    assert told["collect_stats_steps"].origin == "class ParamFromRuntimePercentileScaling"
    assert Four.explain()["tensor_quant"].value == "RescalingIntQuant"
    assert Four.explain()["scaling_shape"].value == "(needs a layer)"


def test_a_layer_explains_each_tensor() -> None:
    layer = QuantLinear(4, 4, input_quant=Int8ActPerTensorFloat)
    told = layer.explain()
    assert told["input_quant"]["bit_width"].value == "8"
    assert "bias_quant = NoneBiasQuant: not quantized" in str(told)


def test_a_layer_prints_in_four_lines_with_bits_granularity_and_scaling() -> None:
    from qframework.quantizers import Int32Bias

    layer = QuantLinear(
        4,
        4,
        weight_bit_width=3,
        input_quant=Int8ActPerTensorFloat,
        output_quant=Int8ActPerTensorFloat,
        bias_quant=Int32Bias,
    )
    lines = repr(layer).splitlines()
    assert len(lines) <= 4
    for part in (
        "int3 narrow",
        "per tensor",
        "stats max",
        "int32, input scale x weight scale",
        "int8",
        "percentile",
    ):
        assert part in repr(layer)
    assert len(repr(QuantReLU()).splitlines()) <= 2
