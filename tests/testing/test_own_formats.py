"""The contract takes quantizers that draw at random, formats and modules of one's own."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
from qframework.testing import QuantizerContract

_PATH = Path(__file__).parents[2] / "examples" / "new_format.py"
_SPEC = importlib.util.spec_from_file_location("new_format", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
new_format = sys.modules["new_format"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(new_format)


class StochasticWeight(Int8WeightPerTensorFloat):
    float_to_int_impl_type = "stochastic_round"


class StochasticAct(Int8ActPerTensorFloat):
    float_to_int_impl_type = "stochastic_round"


class TestStochasticWeight(QuantizerContract):
    quantizer = StochasticWeight
    random = True


class TestStochasticAct(QuantizerContract):
    quantizer = StochasticAct
    random = True


class TestPositAct(QuantizerContract):
    quantizer = new_format.PositAct


class TestPositWeight(QuantizerContract):
    quantizer = new_format.PositWeight


class TestLogarithmicWeight(QuantizerContract):
    quantizer = new_format.LogarithmicWeight


class Drawing(torch.nn.Module):
    """Draws in evaluation, and says that it doesn't."""

    def forward(self, x):
        return torch.floor(x + torch.rand_like(x))


def test_one_that_draws_and_does_not_say_so_is_found() -> None:
    class Undeclared(Int8WeightPerTensorFloat):
        float_to_int_impl = Drawing

    class Contract(QuantizerContract):
        quantizer = Undeclared

    with pytest.raises(pytest.fail.Exception, match="differ by up to"):
        Contract().test_copies_and_pickles_compute_the_same()
