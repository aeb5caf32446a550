"""Experts that no batch reached: named, and as near to the float ones as nearest values are."""

import pytest
import torch
from torch import nn

from qframework.graph import ptq


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.b = nn.Linear(8, 4)

    def forward(self, x):
        h = torch.relu(self.a(x)) * 5
        return self.b(self.experts[int(h.sum() > 1e9)](h))


@pytest.mark.filterwarnings("ignore:.*no (batch|data) reached")
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("name", ["w4a8-gptq", "w4a8-qronos"])
def test_they_have_the_scale_of_one_that_was_reached(by_block, name) -> None:
    torch.manual_seed(0)
    net, data = Experts().eval(), [torch.randn(64, 8) for _ in range(2)]
    model, report = ptq(net, data, name, by_block=by_block)
    calibrate = next(s for s in report.steps if s.step == "calibrate")
    text = calibrate.skipped["experts.2.input_quant"]
    assert text.endswith("it has the scale of experts.0.input_quant")
    x = torch.relu(net.a(data[0])) * 5
    for i in (1, 2):
        wanted = net.experts[i](x)
        assert (model.experts[i](x) - wanted).norm() < 0.15 * wanted.norm()
    assert {x.name for x in report.layers} == {"a", "b", *(f"experts.{i}" for i in range(3))}
