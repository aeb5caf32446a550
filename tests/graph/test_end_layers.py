"""First and last layers, and bias quantizers that lack a scale."""

import pytest
import torch
from torch import nn

from qframework.graph import Rule, quantize_model
from qframework.quantizers import Int8ActPerTensorFloat, Int32Bias


class OutOfOrder(nn.Module):
    """Calls its layers otherwise than they are registered."""

    def __init__(self, control=False):
        super().__init__()
        self.head, self.body, self.stem = (nn.Linear(4, 4) for _ in range(3))
        self.control = control

    def forward(self, x):
        if self.control and x.sum() > 1e9:
            return x
        return self.head(self.body(self.stem(x)).relu())


def widths(model):
    return [float(m.weight_quant.bit_width()) for m in (model.stem, model.body, model.head)]


def test_first_and_last_are_those_that_are_called_first_and_last() -> None:
    model, _ = quantize_model(
        OutOfOrder(),
        weight_bit_width=4,
        first={"weight_bit_width": 8},
        last={"weight_bit_width": 6},
        rules=[Rule("*", weight_bit_width=3)],
    )
    assert widths(model) == [8, 3, 6]


def test_where_a_model_cannot_be_traced_they_are_those_that_are_registered_so() -> None:
    model, _ = quantize_model(OutOfOrder(True), weight_bit_width=4, first={"weight_bit_width": 8})
    assert widths(model) == [4, 4, 8]


def test_they_may_stay_float() -> None:
    model, report = quantize_model(
        OutOfOrder(), first={"keep_float": True}, last={"keep_float": True}
    )
    assert type(model.stem) is type(model.head) is nn.Linear
    assert [e.name for e in report.kept] == ["head", "stem"]


@pytest.mark.parametrize("said", [8, "float"])
def test_what_is_no_rule_is_refused(said) -> None:
    with pytest.raises(TypeError, match="first must be a dict"):
        quantize_model(OutOfOrder(), first=said)
    with pytest.raises(ValueError, match="no layer has a weight"):
        quantize_model(nn.ReLU(), last={"weight_bit_width": 8})


def test_a_bias_quantizer_without_the_scale_of_an_input_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"stem \(bias_quant=Int32Bias: its input isn't quantized\)"
    ):
        quantize_model(OutOfOrder(), bias_quant=Int32Bias)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model, _ = quantize_model(
        net, bias_quant=Int32Bias, rules=[Rule("0", input_quant=Int8ActPerTensorFloat)]
    )
    assert model(torch.randn(2, 2)).shape == (2, 2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)), "behind a ReLU"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), "no running statistics"),
        (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)), "which is no layer"),
    ],
)  # fmt: skip
def test_a_norm_that_is_not_folded_is_told_with_the_reason(make, reason) -> None:
    _, report = quantize_model(make().eval(), fold_batch_norm=True)
    (told,) = [e.reason for e in report.kept if "not folded" in e.reason]
    assert reason in told
