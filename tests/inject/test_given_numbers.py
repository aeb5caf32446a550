"""Numbers from elsewhere, of NumPy or in tensors, mean what they hold when a layer is built."""

from typing import Any

import numpy as np
import pytest
import torch

from qframework.inject import PolicyTypeError, PolicyValueError
from qframework.layers import QuantLinear, QuantReLU
from qframework.quantizers import Int8WeightPerGroupFloat, Uint8ActPerTensorFloatMaxInit

FOURS = [4, 4.0, np.int64(4), np.uint8(4), np.float32(4), torch.tensor(4), torch.tensor([4.0])]


@pytest.mark.parametrize("four", FOURS, ids=repr)
def test_a_whole_number_is_one_of_whatever_type(four: Any) -> None:
    act = QuantReLU(bit_width=four, max_val=four, act_quant=Uint8ActPerTensorFloatMaxInit)
    assert act.act_quant.bit_width() == 4
    assert act.act_quant.scale() == torch.tensor(4.0) / 15
    layer = QuantLinear(8, 2, weight_quant=Int8WeightPerGroupFloat, weight_group_size=four)
    assert layer.quant_weight().scale_.shape == (2, 2, 1)


@pytest.mark.parametrize("true", [True, np.True_, torch.tensor(True)], ids=repr)
def test_a_flag_is_one_of_whatever_type(true: Any) -> None:
    layer = QuantLinear(8, 2, weight_narrow_range=true)
    assert layer.weight_quant.tensor_quant.int_quant.narrow_range is True


@pytest.mark.parametrize("wrong", [np.float32(4.5), torch.tensor(4.5), True, "4"], ids=repr)
def test_what_is_no_whole_number_is_refused(wrong: Any) -> None:
    with pytest.raises((PolicyTypeError, PolicyValueError), match="bit_width"):
        QuantReLU(bit_width=wrong)


def test_text_is_no_number() -> None:
    with pytest.raises(PolicyValueError, match="max_val='4': is a str, needed is a number"):
        QuantReLU(max_val="4", act_quant=Uint8ActPerTensorFloatMaxInit)


def test_a_tensor_that_was_written_to_counts_as_it_is_now() -> None:
    largest = torch.tensor(1.0)

    class Bound(Uint8ActPerTensorFloatMaxInit):
        max_val = largest

    for number in (1.0, 3.0):
        largest.fill_(number)
        for layer in (
            QuantReLU(max_val=largest, act_quant=Uint8ActPerTensorFloatMaxInit),
            QuantReLU(act_quant=Bound),
        ):
            torch.testing.assert_close(layer.act_quant.scale(), torch.tensor(number / 255))
