"""Inputs that are on a grid already aren't quantized again; inputs that are never negative are unsigned."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.graph import Rule, calibration_mode, quantize_model
from qframework.quantizers import Int8ActPerTensorFloat, Int32Bias


def convert(net, **options):
    return quantize_model(net.eval(), input_quant=Int8ActPerTensorFloat, **options)


def test_behind_an_activation_the_input_is_not_quantized_twice() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    model, report = convert(net)
    assert model[0].input_quant.is_quant_enabled and not model[4].input_quant.is_quant_enabled
    assert "quantized by the activation in front" in report.replaced[-1].reason


def test_fewer_bits_of_the_input_are_kept_without_a_sign() -> None:
    model, _ = convert(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), input_bit_width=4)
    proxy = model[1].input_quant
    assert proxy.bit_width() == 4 and not proxy.is_signed


def test_a_bias_on_the_scale_of_the_input_keeps_a_quantizer_for_it() -> None:
    model, _ = convert(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), bias_quant=Int32Bias)
    assert model[1].input_quant.is_quant_enabled and not model[1].input_quant.is_signed


def test_a_rule_that_names_an_input_quantizer_is_followed() -> None:
    rule = Rule("1", input_quant=Int8ActPerTensorFloat)
    model, _ = convert(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), rules=[rule])
    assert model[1].input_quant.is_signed


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Conv2d(2, 2, 1), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize(
    ("function", "signed"),
    [
        (lambda x: F.relu(x).mean((2, 3)), False),
        (lambda x: F.adaptive_avg_pool2d(x.relu(), 1).flatten(1), False),
        (lambda x: (torch.sigmoid(x) + F.relu(x)).mean((2, 3)), False),
        (lambda x: torch.cat([F.relu(x), x.clamp(0, 6)], 2).mean((2, 3)), False),
        (lambda x: (F.relu(x) + x).mean((2, 3)), True),
        (lambda x: (F.relu(x) - 1).mean((2, 3)), True),
        (lambda x: (F.relu(x) * -1).mean((2, 3)), True),
        (lambda x: F.gelu(x).mean((2, 3)), True),
    ],
)
def test_a_sign_is_left_out_where_nothing_is_negative(function, signed) -> None:
    model, _ = convert(Net(function))
    assert model.b.input_quant.is_signed == signed


def test_a_batch_norm_with_an_activation_inside_counts_as_that_activation() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x):
            torch._assert(x.ndim == 4, "four axes")
            if self.training:
                self.num_batches_tracked.add_(1)
            x = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                0.1,
                self.eps,
            )
            return self.act(self.drop(x))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), NormAct(3), nn.Conv2d(3, 2, 1)).eval()
    net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2)
    model, _ = convert(net)
    assert not model[2].input_quant.is_quant_enabled and model[1].act.act_quant.is_quant_enabled
    folded, report = convert(net, fold_batch_norm=True)
    assert not any("not folded" in e.reason for e in report.entries)
    x = torch.randn(2, 2, 4, 4)
    with torch.no_grad(), calibration_mode(folded):
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert folded[1].act.act_quant.is_quant_enabled and not hasattr(folded[1], "running_mean")
