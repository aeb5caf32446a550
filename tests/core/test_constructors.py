"""Parts by themselves, made with the argument names and the order that users know."""

import pytest
import torch
from torch import nn

from qframework.core.binary import ClampedBinaryQuant
from qframework.core.bit_width import BitWidthConst, BitWidthParameter
from qframework.core.constants import ParameterWrapper, SingleArgStatelessBuffer, StatelessBuffer
from qframework.core.decoupled import (
    AccumulatorAwareParameterPreScaling,
    ParameterPreScalingWeightNorm,
    PreZeroCenterZeroPoint,
)
from qframework.core.function_wrapper import Identity, OverOutputChannelView, TensorClampSte
from qframework.core.groups import OverSubChannelBlockView, RuntimeDynamicGroupStatsScaling
from qframework.core.learned_round import (
    LearnedRoundHardSigmoid,
    LearnedRoundIdentity,
    LearnedRoundSigmoid,
    LearnedRoundSte,
)
from qframework.core.minifloat import FloatClamp, FloatScaling
from qframework.core.scaling import ConstScaling
from qframework.core.stats import AbsMax, L1Norm
from qframework.core.stochastic_round import StochasticRoundSte
from qframework.core.trunc import TruncIntScaling, TruncScalingWrapper
from qframework.core.views import StatsInputViewShapeImpl
from qframework.functional import get_upper_bound_on_l1_norm, max_float
from qframework.functional.shape import (
    identity,
    over_batch_over_output_channels,
    over_batch_over_tensor,
    over_output_channels,
    over_output_features,
    over_tensor,
)

CPU, F64 = torch.device("cpu"), torch.float64


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_float_scaling_takes_the_settings_of_a_format() -> None:
    scaling = FloatScaling(448.0, None, ("111",), True, CPU, F64)
    assert scaling(number(4.0), number(3.0), number(7.0)) == 448
    free = FloatScaling(dtype=torch.float32)
    assert free(number(4.0), number(3.0), number(7.0)) == 480
    assert max_float(number(4.0), number(1.875), number(7.0)) == 480


def test_float_clamp_takes_device_and_dtype() -> None:
    clamp = FloatClamp(TensorClampSte(), True, None, ("111",), 448.0, True, CPU, F64)
    assert clamp(number(500.0), number(-448.0), number(448.0)) == 448


@pytest.mark.parametrize("positional", [True, False])
def test_trunc_scaling_wrapper_bounds_its_scale(positional) -> None:
    parts = {"scaling_impl": ConstScaling(64.0), "trunc_int_scaling_impl": TruncIntScaling()}
    wrapper = TruncScalingWrapper(*parts.values()) if positional else TruncScalingWrapper(**parts)
    q = torch.tensor([100.0])
    assert wrapper(q, number(12.0), number(4.0), True) == 8  # 64 / 8
    assert wrapper(q, number(5.0), number(4.0), True) == 2  # not above 2^(5 - 4)
    assert wrapper(q, number(12.0), number(8.0), False) == 1  # not below 1


def test_a_clamp_decides_on_the_gradient_of_a_wrapped_scale() -> None:
    for clamp, expected in ((None, 0.0), (TensorClampSte(), 1.0)):
        scale = ParameterWrapper(torch.tensor(64.0))
        wrapper = TruncScalingWrapper(_Called(scale), TruncIntScaling(), clamp)
        wrapper(torch.ones(1), number(5.0), number(4.0), True).sum().backward()
        assert scale.value.grad == expected


class _Called(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *ignored: object) -> torch.Tensor:
        return self.inner()


def test_learned_rounding_takes_a_device_before_a_dtype() -> None:
    init = torch.full((2, 2), 0.4)
    x = torch.full((2, 2), 1.2)
    expected = {
        LearnedRoundHardSigmoid(1.1, -0.1): 2.0,
        LearnedRoundSigmoid(2.0): 2.0,
        LearnedRoundIdentity(): 2.0,
    }
    for rule, result in expected.items():
        rounding = LearnedRoundSte(rule, init, Identity(), CPU, F64).eval()
        assert rounding.value.dtype == F64
        assert torch.all(rounding(x) == result)
    assert torch.equal(StochasticRoundSte(True, 1, CPU).eval()(x), torch.ones(2, 2))


def test_group_scales_take_size_and_axis_first() -> None:
    view = OverSubChannelBlockView(2, 1, (2, 2, 2))
    scaling = RuntimeDynamicGroupStatsScaling(2, 1, view, AbsMax(2, True), 1e-3)
    x = torch.tensor([[1.0, -2.0, 0.0, 0.0], [4.0, 1.0, 3.0, -5.0]])
    assert scaling(x).flatten().tolist() == pytest.approx([2.0, 1e-3, 4.0, 5.0])


@pytest.mark.parametrize("aware", [False, True])
def test_weight_norms_take_the_scale_first(aware) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -3.0], [2.0, 2.0]]))
    norm, view = L1Norm(1), OverOutputChannelView()
    scale = ConstScaling(0.5)
    if aware:
        part = AccumulatorAwareParameterPreScaling(
            scale, norm, BitWidthConst(8), view, [weight], (2, 1)
        )
        pre = part(weight, number(1.0), number(4.0), False)
        bound = get_upper_bound_on_l1_norm(number(8.0), number(4.0), False)
        assert bound == 127 / 16
        assert torch.allclose(pre, torch.full((2, 1), 4 / 7.9375))
    else:
        part = ParameterPreScalingWeightNorm(scale, norm, view, [weight], (2, 1))
        assert torch.allclose(part(weight, number(1.0)), torch.full((2, 1), 0.5))
    assert part.value.flatten().tolist() == [4.0, 4.0]


def test_the_center_takes_axis_view_and_shape() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, -4.0]])
    rows = PreZeroCenterZeroPoint(1, OverOutputChannelView(), (2, 1))
    assert rows(x, number(0.5), number(8.0)).tolist() == [[-4.0], [4.0]]
    whole = PreZeroCenterZeroPoint(None, StatsInputViewShapeImpl.OVER_TENSOR())
    assert whole(x, number(0.5), number(8.0)) == 0


def test_clamped_binary_takes_the_delay_third() -> None:
    quantizer = ClampedBinaryQuant(ConstScaling(0.5), TensorClampSte(), 1)
    x = torch.tensor([0.2])
    assert quantizer(x)[0] == x and quantizer(x)[0] == 0.5


def test_a_learned_width_tells_its_base() -> None:
    width = BitWidthParameter(5, 3, override_pretrained_bit_width=True)
    assert width.bit_width_base == 3 and width.override_pretrained
    assert width.bit_width_offset == 2 and width() == 5
    width.load_state_dict({"bit_width_offset": number(7.0)})
    assert width() == 5


def test_constants_move_and_arent_saved() -> None:
    part = nn.Sequential(StatelessBuffer(torch.tensor([1.5])), SingleArgStatelessBuffer(2.0))
    assert part.state_dict() == {}
    assert part[0]().tolist() == [1.5] and part[1](torch.ones(3)) == 2
    assert part.to(F64)[0]().dtype == F64
    assert not part[0]().requires_grad
    wrapped = ParameterWrapper(torch.ones(2))
    assert list(wrapped.state_dict()) == ["value"] and wrapped().requires_grad


def test_shapes_are_those_of_the_views() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    views = StatsInputViewShapeImpl
    for shape, view in (
        (over_tensor, views.OVER_TENSOR),
        (over_output_channels, views.OVER_OUTPUT_CHANNELS),
        (over_batch_over_tensor, views.OVER_BATCH_OVER_TENSOR),
        (over_batch_over_output_channels, views.OVER_BATCH_OVER_OUTPUT_CHANNELS),
        (over_output_features, views.OVER_OUTPUT_FEATURES),
    ):
        assert torch.equal(x.reshape(shape(x)), view()(x))
    assert identity(x) is x
