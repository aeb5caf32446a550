"""Changes that version counters don't tell of, and what must not outlive them."""

import copy

import pytest
import torch
from torch import nn

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8WeightPerTensorFloat,
)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]
)
@pytest.mark.parametrize("quantizer", [Int8WeightPerTensorFloat, Int8WeightPerChannelFloatMSE])
def test_fused_optimizers_train_as_others_do(quantizer, optimizer) -> None:
    """They move no version counters on CPUs; learned scales read these too."""
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer, x, y = (
            QuantLinear(16, 8, weight_quant=quantizer),
            torch.randn(32, 16),
            torch.randn(32, 8),
        )
        steps = optimizer(layer.parameters(), lr=1e-2, fused=fused)
        for _ in range(5):
            steps.zero_grad()
            (layer(x) - y).square().mean().backward()
            steps.step()
        ends.append([p.detach().clone() for p in layer.parameters()])
    for plain, fused_one in zip(*ends, strict=True):
        torch.testing.assert_close(fused_one, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_unfrozen_gets_its_gradient(training) -> None:
    layer, x = QuantLinear(4, 3).train(training), torch.randn(2, 4)
    layer.weight.requires_grad_(False)
    layer(x)
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def with_bias() -> tuple[QuantLinear, torch.Tensor]:
    layer = QuantLinear(4, 3, input_quant=Int8ActPerTensorFloat, bias_quant=Int32Bias)
    x = torch.randn(2, 4)
    with calibration_mode(layer):
        layer(x)
    return layer.eval(), x


@torch.no_grad()
def test_a_bias_whose_data_is_set_is_seen_in_evaluation() -> None:
    layer, x = with_bias()
    before = layer(x)
    layer.bias.data = layer.bias + 1
    torch.testing.assert_close(layer(x), before + 1, rtol=0, atol=1e-3)  # a step of the bias


@torch.no_grad()
def test_memory_that_comes_again_is_not_taken_for_the_same() -> None:
    for _ in range(20):
        layer = QuantLinear(512, 512, bias=False).eval()
        layer.quant_weight()
        layer.weight.data = torch.randn(512, 512)
        layer.weight.data = torch.randn(512, 512)
        assert torch.equal(layer.quant_weight().value, copy.deepcopy(layer).quant_weight().value)


@torch.no_grad()
def test_without_the_cache_nothing_that_was_kept_is_used() -> None:
    layer = QuantLinear(4, 3).eval()
    kept = layer.quant_weight()
    assert layer.quant_weight() is kept
    with qframework.settings.use(cache=False):
        assert layer.quant_weight() is not kept


@torch.no_grad()
def test_results_of_replaced_parameters_are_freed() -> None:
    layer, x = with_bias()
    for _ in range(5):
        layer.weight, layer.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        layer(x)
    assert len(layer.weight_quant._memory._entries) == len(layer.bias_quant._memory._entries) == 1


@torch.no_grad()
def test_nothing_is_kept_in_evaluation_where_processes_may_write(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    layer = QuantLinear(4, 3).eval()
    assert layer.quant_weight() is not layer.quant_weight()


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_another_quantizer_is_another_result(training) -> None:
    layer, other = QuantLinear(4, 3).train(training), QuantLinear(4, 3, weight_bit_width=2)
    before = layer.quant_weight()
    layer.weight_quant.tensor_quant = other.weight_quant.tensor_quant.train(training)
    assert not torch.equal(layer.quant_weight().value, before.value)


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("part", ["weight_quant", "input_quant"])
def test_hooks_on_a_quantizer_see_each_call_in_evaluation(part, early) -> None:
    layer, x = with_bias()
    if not early:
        layer(x)
    seen = []
    quantizer = getattr(layer, part).tensor_quant
    handle = quantizer.register_forward_hook(lambda *_: seen.append(1))
    layer(x), layer(x)
    assert len(seen) == 2
    handle.remove()
    layer(x)
    assert len(seen) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_rather_than_zero(grad) -> None:
    layer = QuantReLU(collect_stats_steps=1)
    x = torch.randn(2, 4)
    layer(x), layer(x)
    layer.eval()
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="reverse mode"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with (
        torch.set_grad_enabled(grad),
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="reverse mode"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@torch.no_grad()
def test_a_zero_point_that_is_written_to_is_made_anew() -> None:
    layer = QuantLinear(4, 3, weight_quant=ShiftedUint8WeightPerTensorFloat).eval()
    before = layer.quant_weight().zero_point.clone()
    layer.quant_weight().zero_point.add_(1)
    assert torch.equal(layer.quant_weight().zero_point, before)


@torch.no_grad()
@pytest.mark.parametrize("change", ["restart", "dtype", "value"])
def test_a_learned_scale_that_changes_in_evaluation_is_seen(change) -> None:
    layer, x = QuantReLU(collect_stats_steps=1), torch.rand(50)
    layer(x), layer(x)
    layer.eval()
    before = layer(3 * x)
    quantizer = layer.act_quant.tensor_quant
    scaling = quantizer.scaling_impl
    if change == "restart":
        scaling.restart_collection()
        scaling.running_stats.fill_(9)
    elif change == "dtype":
        quantizer.double()  # the scale, and with it what is divided by it
        assert layer.act_quant(x).scale.dtype == torch.float64
        return
    else:
        scaling.value.fill_(9)
    assert not torch.equal(layer(3 * x), before)
