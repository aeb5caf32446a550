import pickle
import threading

import pytest
import torch

from qframework.core.binary import BinaryQuant
from qframework.core.function_wrapper import FloorSte
from qframework.core.scaling import ConstScaling, ParameterScaling
from qframework.inject import (
    ExtendedInjector,
    ImmutableQuantizerError,
    Injector,
    this,
    value,
)
from qframework.inject.enum import QuantType, RestrictValueType, ScalingImplType
from qframework.layers import QuantLinear
from qframework.proxy import WeightQuantProxyFromInjector
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerTensorFloat


class Holder:
    def __init__(self, width, scale=0.5, extra=None):
        self.width, self.scale, self.extra = width, scale, extra


def test_plain_values_are_read_off_the_class() -> None:
    assert Int8ActPerTensorFloat.bit_width == 8
    assert "bit_width" in Int8ActPerTensorFloat
    assert "no_such_name" not in Int8ActPerTensorFloat
    assert ExtendedInjector is Injector


def test_subclasses_change_values_and_leave_their_bases_alone() -> None:
    class Four(Int8ActPerTensorFloat):
        bit_width = 4

    assert (Four.bit_width, Int8ActPerTensorFloat.bit_width) == (4, 8)
    assert Four.let(bit_width=3).bit_width == 3
    assert Four.bit_width == 4


def test_an_empty_body_and_the_diamond_merge_as_python_does() -> None:
    class Base(Injector):
        x = 1
        y = 1

    class Left(Base):
        x = 2

    class Right(Base):
        x = 3
        y = 3

    class Both(Left, Right):
        pass

    assert (Both.x, Both.y) == (2, 3)


def test_a_class_is_wired_by_the_names_of_its_arguments() -> None:
    class Q(Injector):
        holder = Holder
        width = 3
        extra = "more"

    built = Q.holder
    assert isinstance(built, Holder)
    assert (built.width, built.scale, built.extra) == (3, 0.5, "more")


def test_names_ending_in_class_stay_classes() -> None:
    class Q(Injector):
        width = 3
        holder_class = Holder

    assert Q.holder_class is Holder


def test_value_returns_a_value_a_class_or_another_name() -> None:
    class Q(Injector):
        width = 2
        spare = Holder

        @value
        def double(width):
            return width * 2

        @value
        def built(double):
            return Holder if double == 4 else None

        @value
        def elsewhere():
            return this.spare

        @value
        def with_default(nowhere=7):
            return nowhere

    assert Q.double == 4
    assert isinstance(Q.built, Holder)
    assert isinstance(Q.elsewhere, Holder)
    assert Q.with_default == 7
    assert Q.let(width=5).double == 10
    assert Q.let(width=5).built is None


def test_one_resolution_builds_a_name_once() -> None:
    class Pair:
        def __init__(self, first, second):
            self.first, self.second = first, second

    class Q(Injector):
        pair = Pair
        width = 1
        first = Holder
        second = this.first

    assert Q.pair.first is not Q.pair.first  # each reading is a resolution of its own
    pair = Q.pair
    assert pair.first is pair.second


def test_nested_injectors_reach_out_and_are_reached() -> None:
    class Outer(Injector):
        a = 5

        class inner(Injector):
            b = (this << 1).a

            @value
            def c(b):
                return b * 2

        d = this.inner.c

        @value
        def e(inner):
            return inner.b + 1

    assert (Outer.d, Outer.e, Outer.inner.c) == (10, 6, 10)
    assert Outer.let(a=1).d == 2


def test_classes_never_change() -> None:
    with pytest.raises(ImmutableQuantizerError, match="make a subclass"):
        Int8WeightPerTensorFloat.bit_width = 4
    with pytest.raises(ImmutableQuantizerError):
        del Int8WeightPerTensorFloat.bit_width
    with pytest.raises(TypeError, match="no instances"):
        Int8WeightPerTensorFloat()


def test_a_failed_resolution_leaves_the_class_as_it_was() -> None:
    class Q(Int8WeightPerTensorFloat):
        scaling_impl_type = "stats"

    with pytest.raises(AttributeError):
        _ = Q.tensor_quant
    layer = QuantLinear(
        4,
        4,
        weight_quant=Q,
        weight_scaling_impl_type="parameter_from_stats",
        weight_float_to_int_impl_type="floor",
    )
    assert "weight_quant.tensor_quant.scaling_impl.value" in layer.state_dict()
    assert isinstance(layer.weight_quant.tensor_quant.int_quant.float_to_int_impl, FloorSte)


def test_a_quantizer_from_nothing_works_by_hand_and_in_a_layer() -> None:
    class Learned(ExtendedInjector):
        tensor_quant = BinaryQuant
        scaling_impl = ParameterScaling
        scaling_init = 0.1
        proxy_class = WeightQuantProxyFromInjector
        signed = True

    y, scale, zero_point, bit_width = Learned.tensor_quant(torch.tensor([-3.0, 0.0, 2.0]))
    assert y.tolist() == pytest.approx([-0.1, 0.1, 0.1])
    assert (scale.item(), zero_point.item(), bit_width.item()) == (pytest.approx(0.1), 0, 1)
    assert QuantLinear(4, 4, weight_quant=Learned).quant_weight().is_valid


def test_an_explicit_slot_wins_over_the_policy() -> None:
    class Fixed(Int8WeightPerTensorFloat):
        scaling_impl = ConstScaling
        scaling_init = 1.27

    layer = QuantLinear(4, 4, weight_quant=Fixed)
    assert layer.weight_quant.scale().item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    "text", ["parameter_from_stats", "PARAMETER_FROM_STATS", "Parameter_From_Stats"]
)
def test_strings_stand_for_members(text) -> None:
    assert text == ScalingImplType.PARAMETER_FROM_STATS
    layer = QuantLinear(4, 4, weight_scaling_impl_type=text)
    assert "weight_quant.tensor_quant.scaling_impl.value" in layer.state_dict()


def test_members_of_different_enums_differ_and_are_hashable() -> None:
    assert RestrictValueType.FP != QuantType.FP
    assert len({RestrictValueType.FP, QuantType.FP}) == 2
    assert {QuantType.INT: 1}[QuantType.INT] == 1


def test_value_functions_see_what_the_layer_provides() -> None:
    class FromModule(Int8WeightPerTensorFloat):
        scaling_impl_type = "parameter"

        @value
        def scaling_init(module):
            return module.weight.detach().abs().max()

    layer = QuantLinear(8, 4, weight_quant=FromModule)
    parameter = layer.weight_quant.tensor_quant.scaling_impl.value
    assert (layer.weight_quant.scale() * 127).item() == pytest.approx(
        layer.weight.abs().max().item()
    )
    with torch.no_grad():
        layer.weight.mul_(3)
    layer.weight_quant.init_tensor_quant()
    assert (layer.weight_quant.scale() * 127).item() == pytest.approx(
        layer.weight.abs().max().item()
    )
    assert layer.weight_quant.tensor_quant.scaling_impl.value is parameter


def test_granularity_and_channels_are_provided() -> None:
    seen = {}

    class Spy(Int8WeightPerTensorFloat):
        @value
        def bit_width(out_channels, scaling_per_output_channel, weight_shape, dtype, device):
            seen.update(locals())
            return 6

    QuantLinear(8, 4, weight_quant=Spy, weight_scaling_per_output_channel=True)
    assert seen["out_channels"] == 4
    assert seen["scaling_per_output_channel"] is True
    assert seen["weight_shape"] == (4, 8)
    assert (seen["dtype"], seen["device"].type) == (torch.float32, "cpu")


def test_classes_made_by_let_can_be_pickled() -> None:
    derived = Int8WeightPerTensorFloat.let(bit_width=3).let(narrow_range=False)
    again = pickle.loads(pickle.dumps(derived))
    assert (again.bit_width, again.narrow_range) == (3, False)
    assert pickle.loads(pickle.dumps(Int8WeightPerTensorFloat)) is Int8WeightPerTensorFloat


def test_threads_build_independent_layers() -> None:
    wrong = []

    def build(bits: int) -> None:
        for _ in range(40):
            layer = QuantLinear(4, 4, weight_bit_width=bits)
            if layer.weight_quant.bit_width().item() != bits:
                wrong.append(bits)

    threads = [threading.Thread(target=build, args=(b,)) for b in range(2, 10)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
