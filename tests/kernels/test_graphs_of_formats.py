"""Compiled graphs of formats and granularities are whole, and give what eager mode gives."""

import pytest
import torch

from qframework import quantizers as q
from qframework.layers import QuantLinear

pytestmark = pytest.mark.slow

PAIRS = [
    (q.MXFloat8e4m3Weight, q.MXFloat8e4m3Act),
    (q.Int8WeightPerChannelFloat, q.Int8DynamicActPerRowFloat),
    (q.Fp8e4m3OCPWeightPerChannelFloat, q.Int8DynamicActPerTensorFloat),
    (q.Int8WeightPerGroupFloat, None),
    (q.NVFloat4Weight, q.NVFloat4Act),
    (q.NF4WeightPerGroupFloat, None),
]


@pytest.mark.parametrize(("weight", "act"), PAIRS, ids=lambda c: getattr(c, "__name__", "none"))
def test_compiled_layers_are_those_of_eager_mode(weight, act) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x, upstream = (
        QuantLinear(64, 24, weight_quant=weight, input_quant=act),
        torch.randn(7, 64),
        torch.randn(7, 24),
    )
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], upstream)))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
