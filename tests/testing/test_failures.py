"""A contract that isn't kept says what failed and why, in one line."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qframework.functional import round_ste
from qframework.layers import QuantLinear
from qframework.quantizers import Int8WeightPerTensorFloat
from qframework.testing import LayerContract, QuantizerContract


class WithoutGradient(nn.Module):
    def forward(self, x):
        return torch.round(x * 8) / 8, 0.125, 0, 8


class OffTheGrid(nn.Module):
    def forward(self, x):
        return x * 1.0, 0.125, 0, 4


class TooManyCodes(nn.Module):
    def forward(self, x):
        return round_ste(x * 100) / 100, 0.01, 0, 2


class Breaking(nn.Module):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return round_ste(x)


class Raising(nn.Module):
    def forward(self, x):
        raise ValueError("not today\nnor tomorrow")


def quantizer(**names: object) -> type:
    return type("Mine", (Int8WeightPerTensorFloat,), names)


@pytest.mark.filterwarnings("ignore:.*results that count on integers are wrong")
@pytest.mark.parametrize(
    ("names", "checked", "said"),
    [
        ({"tensor_quant": WithoutGradient}, "gradients_flow_and_are_finite", "a gradient reaches what is quantized"),
        ({"tensor_quant": OffTheGrid}, "values_are_on_the_grid", "of a step off the grid"),
        ({"tensor_quant": TooManyCodes}, "values_are_on_the_grid", "and 2 bits hold -2 to 1"),
        ({"float_to_int_impl": Breaking}, "traces_as_one_graph", "as one graph"),
        ({"float_to_int_impl": Raising}, "builds_and_gives_a_quantized_tensor", "ValueError: not today"),
    ],
)  # fmt: skip
def test_one_line_says_what_failed_and_why(names, checked, said) -> None:
    class Contract(QuantizerContract):
        quantizer = quantizer(**names)

    with pytest.raises(pytest.fail.Exception) as caught:
        getattr(Contract(), f"test_{checked}")()
    text = str(caught.value)
    assert text.startswith("Mine: ") and said in text and "\n" not in text
    assert caught.value.pytrace is False
    assert caught.value.__context__ is None


def test_the_place_in_a_program_is_told() -> None:
    class Contract(QuantizerContract):
        quantizer = quantizer(float_to_int_impl=Raising)

    with pytest.raises(pytest.fail.Exception, match=r"\(test_failures\.py:\d+\)"):
        Contract().test_builds_and_gives_a_quantized_tensor()


class Forgetful(QuantLinear):
    """Keeps something outside of its state dict, and counts calls."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.gain = float(torch.rand(())) + 1
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.gain + self.calls


class ForgetfulContract(LayerContract):
    def layer(self, **keywords):
        return Forgetful(16, 8, **keywords)

    def sample(self):
        return torch.randn(4, 16)

    def float_layer(self):
        return nn.Linear(16, 8)


ForgetfulContract.__test__ = False


@pytest.mark.parametrize(
    ("checked", "said"),
    [
        ("a_state_dict_carries_everything", "values differ by up to"),
        ("evaluates_twice_alike", "a second call gives the same"),
        ("without_quantizers_it_is_the_float_layer", "what the float layer does"),
    ],
)
def test_a_layer_is_found_out_in_one_line(checked, said) -> None:
    with pytest.raises(pytest.fail.Exception, match=said) as caught:
        getattr(ForgetfulContract(), f"test_{checked}")()
    assert "\n" not in str(caught.value)


def test_the_marker_registers_itself_and_failures_are_short(pytester, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makepyfile(
        """
        from torch import nn
        from qframework.quantizers import Int8WeightPerTensorFloat
        from qframework.testing import QuantizerContract

        class Breaking(nn.Module):
            def forward(self, x):
                return x.round() if float(x.sum()) > 1e9 else x + (x.round() - x).detach()

        class Mine(Int8WeightPerTensorFloat):
            float_to_int_impl = Breaking

        class TestMine(QuantizerContract):
            quantizer = Mine
        """
    )
    done = pytester.runpytest_subprocess(
        "--strict-markers", "-W", "error", "-m", "slow", "-k", "one_graph"
    )
    done.assert_outcomes(failed=1, deselected=10)
    assert len(done.outlines) < 25, "\n".join(done.outlines)
    assert not done.errlines
