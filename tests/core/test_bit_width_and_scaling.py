import pytest
import torch

from qframework.core.bit_width import BitWidthConst, BitWidthParameter, BitWidthStatefulConst
from qframework.core.restrict_val import (
    IntRestrictValue,
    LogFloatRestrictValue,
    PowerOfTwoRestrictValue,
    SignedFloatRestrictValue,
)
from qframework.core.scaling import ConstScaling, IntScaling, ParameterScaling, PowerOfTwoIntScaling

X = torch.zeros(3)


def test_constant_widths_and_state_dicts() -> None:
    assert BitWidthConst(5)().item() == 5
    assert not BitWidthConst(5).state_dict()
    assert list(BitWidthStatefulConst(5).state_dict()) == ["bit_width"]
    loaded = BitWidthParameter(4)
    loaded.load_state_dict(BitWidthStatefulConst(6).state_dict())
    assert loaded().item() == 6


def test_learned_width_has_gradient_one_and_respects_bounds() -> None:
    width = BitWidthParameter(4, bit_width_offset_max_val=6.0)
    width().backward()
    assert width.bit_width_offset.grad.item() == 1
    with torch.no_grad():
        width.bit_width_offset.fill_(40.0)
    assert width().item() == 6
    with torch.no_grad():
        width.bit_width_offset.fill_(0.0)
    assert width().item() == 2


def test_declared_width_can_override_a_loaded_one() -> None:
    trained = BitWidthParameter(8).state_dict()
    kept = BitWidthParameter(4, override_pretrained_bit_width=True)
    kept.load_state_dict(trained)
    assert kept().item() == 4


@pytest.mark.parametrize(("bits", "error"), [(0, ValueError), (4.0, TypeError), (True, TypeError)])
def test_impossible_widths_are_refused(bits, error) -> None:
    with pytest.raises(error, match="bit_width must be"):
        BitWidthConst(bits)
    with pytest.raises(ValueError, match="below min_bit_width"):
        BitWidthParameter(2, min_bit_width=3)


@pytest.mark.parametrize(
    ("restriction", "init", "scale"),
    [
        (None, 0.6, 0.6),
        (LogFloatRestrictValue(), 0.6, 0.6),
        (PowerOfTwoRestrictValue(), 0.6, 0.5),
        (IntRestrictValue(), 2.6, 3.0),
        (SignedFloatRestrictValue(), -0.6, -0.6),
    ],
)
def test_domains(restriction, init, scale) -> None:
    assert ConstScaling(init, restriction)(X).item() == pytest.approx(scale)
    learned = ParameterScaling(init, (), restriction)
    assert learned(X).item() == pytest.approx(scale)
    learned(X).backward()
    assert learned.value.grad.item() != 0


def test_minimum_bounds_the_magnitude_and_passes_the_gradient() -> None:
    learned = ParameterScaling(1e-5, scaling_min_val=0.1)
    assert learned(X).item() == pytest.approx(0.1)
    learned(X).backward()
    assert learned.value.grad.item() == 1


def test_shape_of_a_learned_scale() -> None:
    assert ParameterScaling(0.5, (3, 1))(X).shape == (3, 1)
    with pytest.raises(RuntimeError, match="scaling_shape is"):
        ParameterScaling(torch.ones(4), (3, 1))


@pytest.mark.parametrize(
    ("signed", "narrow", "float_threshold", "power_threshold"),
    [(True, False, 8, 8), (True, True, 7, 8), (False, False, 15, 16), (False, True, 14, 16)],
)
def test_integer_thresholds_of_four_bits(signed, narrow, float_threshold, power_threshold) -> None:
    four = torch.tensor(4.0)
    assert IntScaling(narrow, signed)(four).item() == float_threshold
    assert PowerOfTwoIntScaling(signed)(four).item() == power_threshold


def test_constants_survive_the_meta_device() -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleList([BitWidthConst(5), ConstScaling(0.25)])
    module.to_empty(device="cpu")
    assert module[0]().item() == 5
    assert module[1](X).item() == 0.25


def test_low_precision_models_keep_wide_scales() -> None:
    learned = ParameterScaling(0.3).bfloat16()
    assert learned.value.dtype == torch.float32
    assert ParameterScaling(0.3).double().value.dtype == torch.float64
