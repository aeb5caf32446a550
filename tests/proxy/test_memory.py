"""Quantized parameters are computed once while nothing that they are made of has changed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qframework.core.quant import RescalingIntQuant
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
)

WEIGHTS = [
    Int8WeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    ShiftedUint8WeightPerTensorFloat,
]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The tensor quantizers that ran."""
    seen: list[str] = []
    forward = RescalingIntQuant.forward

    def counted(self, x, *args, **kwargs):
        seen.append(type(self).__name__)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(RescalingIntQuant, "forward", counted)
    return seen


@pytest.mark.parametrize("weight", WEIGHTS)
def test_evaluation_quantizes_a_weight_once(weight, calls) -> None:
    layer = QuantLinear(4, 3, weight_quant=weight).eval()
    with torch.no_grad():
        first = layer(torch.ones(2, 4))
        calls.clear()
        for _ in range(3):
            assert torch.equal(layer(torch.ones(2, 4)), first)
    assert not calls


@torch.no_grad()
def in_place(layer: QuantLinear) -> None:
    layer.weight.mul_(1.7)


@torch.no_grad()
def through_a_view(layer: QuantLinear) -> None:
    layer.weight[1].fill_(2.0)


def assign(layer: QuantLinear) -> None:
    layer.weight = nn.Parameter(torch.full((3, 4), 0.5))


def optimize(layer: QuantLinear) -> None:
    layer.weight.grad = torch.ones(3, 4)
    torch.optim.SGD([layer.weight], lr=0.5).step()


def optimize_fused(layer: QuantLinear) -> None:
    layer.weight.grad = torch.ones(3, 4)
    torch.optim.SGD([layer.weight], lr=0.5, fused=True).step()


def set_data_twice(layer: QuantLinear) -> None:
    layer.weight.data = torch.full((3, 4), 0.75)
    layer.weight.data = torch.full((3, 4), 0.25)


def load(layer: QuantLinear) -> None:
    layer.load_state_dict({k: v + 0.25 for k, v in layer.state_dict().items()})


def load_by_assignment(layer: QuantLinear) -> None:
    changed = {k: v + 0.25 for k, v in layer.state_dict().items()}
    layer.load_state_dict(changed, assign=True)


def set_data(layer: QuantLinear) -> None:
    layer.weight.data = torch.full((3, 4), 0.25)


def convert(layer: QuantLinear) -> None:
    layer.double()
    layer.float()
    with torch.no_grad():
        layer.weight.mul_(2)


def requantize(layer: QuantLinear) -> None:
    layer.weight_quant.tensor_quant.int_quant.narrow_range = False
    with torch.no_grad():
        layer.weight[0, 0] = -3.0


CHANGES = {
    "in place": in_place,
    "through a view": through_a_view,
    "assigned": assign,
    "optimizer": optimize,
    "fused optimizer": optimize_fused,
    "data assigned twice": set_data_twice,
    "state dict": load,
    "state dict, assigned": load_by_assignment,
    "data assigned": set_data,
    "converted": convert,
    "quantizer changed": requantize,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_is_seen(change, weight, training) -> None:
    layer = QuantLinear(4, 3, weight_quant=weight, bias=False).train(training)
    with torch.set_grad_enabled(training):
        before = layer.quant_weight()
        assert layer.quant_weight() is before
        CHANGES[change](layer)
        after = layer.quant_weight()
        fresh = layer.weight_quant.tensor_quant(layer.weight)[0]
    assert torch.equal(after.value, fresh)
    assert not torch.equal(after.value, before.value)


def test_a_changed_result_is_computed_anew() -> None:
    layer = QuantLinear(4, 3).eval()
    with torch.no_grad():
        good = layer.quant_weight().value.clone()
        layer.quant_weight().value.zero_()
        assert torch.equal(layer.quant_weight().value, good)


def test_a_learned_scale_that_changes_is_seen() -> None:
    layer = QuantLinear(4, 3, weight_scaling_impl_type="parameter_from_stats").eval()
    with torch.no_grad():
        before = layer.quant_weight()
        layer.weight_quant.tensor_quant.scaling_impl.value.mul_(2)
        assert layer.quant_weight().scale == 2 * before.scale


def test_functional_call_is_not_answered_from_memory() -> None:
    layer = QuantLinear(4, 3, weight_scaling_impl_type="parameter_from_stats").eval()
    x = torch.ones(1, 4)
    key = "weight_quant.tensor_quant.scaling_impl.value"
    with torch.no_grad():
        plain = layer(x)
        other = {key: layer.state_dict()[key] * 3}
        assert not torch.equal(torch.func.functional_call(layer, other, (x,)), plain)
        assert torch.equal(layer(x), plain)


def test_release_and_a_change_of_mode_free_what_is_kept() -> None:
    layer = QuantLinear(4, 3).eval()
    with torch.no_grad():
        first = layer.quant_weight()
        layer.weight_quant.release()
        assert layer.quant_weight() is not first
        second = layer.quant_weight()
        layer.train()
        layer.eval()
        assert layer.quant_weight() is not second


def test_biases_are_kept_too() -> None:
    own = QuantLinear(4, 3, bias_quant=Int8BiasPerTensorFloatInternalScaling).eval()
    given = QuantLinear(4, 3, bias_quant=Int32Bias, input_quant=Int8ActPerTensorFloat)
    x = torch.randn(5, 4)
    given(x)
    given.eval()
    with torch.no_grad():
        assert own.quant_bias() is own.quant_bias()
        seen = []
        inner = given.bias_quant.tensor_quant
        inner.register_forward_pre_hook(lambda *_: seen.append(1))
        first = given(x)
        assert torch.equal(given(x), first)
        given.bias.add_(1)
        assert not torch.equal(given(x), first)


def test_what_draws_at_random_is_not_kept() -> None:
    kind = {"weight_float_to_int_impl_type": "stochastic_round"}
    layer = QuantLinear(64, 64, **kind, weight_deterministic_inference=False).eval()
    with torch.no_grad():
        assert not torch.equal(layer.quant_weight().value, layer.quant_weight().value)
    layer = QuantLinear(64, 64, **kind).train()
    assert not torch.equal(layer.quant_weight().value, layer.quant_weight().value)


# ------------------------------------------------------------ training


@pytest.mark.parametrize("weight", [*WEIGHTS, SignedBinaryWeightPerTensorConst])
def test_two_calls_of_a_step_share_the_weight_and_have_the_same_gradients(weight) -> None:
    layer = QuantConv2d(2, 3, 3, weight_quant=weight, dtype=torch.float64)
    x, y = torch.randn(2, 1, 2, 5, 5, dtype=torch.float64)
    assert layer.quant_weight() is layer.quant_weight()
    (layer(x).sin().sum() + layer(y).cos().sum()).backward()
    together = layer.weight.grad.clone()
    layer.weight.grad = None
    for function, inputs in ((torch.sin, x), (torch.cos, y)):
        layer.weight_quant.release()
        function(layer(inputs)).sum().backward()
    torch.testing.assert_close(together, layer.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [*WEIGHTS, SignedBinaryWeightPerTensorConst])
def test_calls_of_a_step_may_be_differentiated_one_by_one(weight) -> None:
    layer = QuantConv2d(2, 3, 3, weight_quant=weight)
    first, second = (layer(torch.randn(1, 2, 5, 5)).sum() for _ in range(2))
    first.backward()
    second.backward()
    third = layer(torch.randn(1, 2, 5, 5)).sum()  # gradients accumulate, the weight is the same
    third.backward()


def test_a_weight_is_quantized_once_a_step(calls) -> None:
    layer = QuantLinear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    for _ in range(3):
        calls.clear()
        x = torch.ones(1, 4)
        for _ in range(5):
            x = layer(x)
        optimizer.zero_grad()
        x.sum().backward()
        optimizer.step()
        assert len(calls) <= 1


def test_a_weight_that_changes_before_the_backward_pass_is_an_error() -> None:
    layer = QuantLinear(4, 4)
    loss = layer.quant_weight().value.sum() + layer.quant_weight().scale.sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_that_share_a_quantizer_have_a_result_each() -> None:
    first = QuantLinear(4, 3)
    second = QuantLinear(4, 3, weight_quant=first.weight_quant)
    with torch.no_grad():
        second.weight.mul_(3)
    for model in (first, second):
        model.eval()
    with torch.no_grad():
        a, b = first.quant_weight(), second.quant_weight()
        assert first.quant_weight() is a
        assert second.quant_weight() is b
        assert torch.equal(a.scale, b.scale)
        first.weight.mul_(7)
        assert not torch.equal(second.quant_weight().scale, b.scale)


def test_data_parallel_training_in_one_process(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        plain = nn.Sequential(QuantLinear(4, 4), QuantReLU(collect_stats_steps=1))
        # While statistics are collected the scale to be learned takes no part.
        parallel = nn.parallel.DistributedDataParallel(
            copy.deepcopy(plain), find_unused_parameters=True
        )
        for _ in range(4):
            x = torch.randn(3, 4)
            outs = []
            for model in (plain, parallel):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                optimizer.zero_grad()
                out = model(x)
                out.sum().backward()
                optimizer.step()
                outs.append(out)
            assert torch.equal(*outs)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------ activations


def test_the_scale_of_an_activation_is_computed_once_in_evaluation(monkeypatch) -> None:
    layer = QuantReLU(collect_stats_steps=1)
    for _ in range(2):
        layer(torch.rand(8))
    layer.eval()
    with torch.no_grad():
        before = layer(torch.rand(8))
        scaling = layer.act_quant.tensor_quant.scaling_impl
        monkeypatch.setattr(type(scaling), "forward", None)  # would fail if it were called
        assert before.shape == layer(torch.rand(8)).shape
        monkeypatch.undo()
        scaling.value.mul_(2)
        assert layer.act_quant(torch.rand(8)).scale == layer.act_quant.scale()


def test_statistics_collected_after_evaluation_are_seen() -> None:
    layer = QuantIdentity(collect_stats_steps=10, return_quant_tensor=True)
    layer(torch.ones(4))
    layer.eval()
    with torch.no_grad():
        first = layer(torch.ones(4)).scale.clone()
        layer.train()
        layer(torch.full((4,), 100.0))
        layer.eval()
        assert layer(torch.ones(4)).scale > first


# ------------------------------------------------------------ copies


def test_copies_keep_nothing_and_pickles_are_small() -> None:
    layer = QuantLinear(64, 64).eval()
    with torch.no_grad():
        kept = layer.quant_weight()
        other = copy.deepcopy(layer)
        assert other.quant_weight() is not kept
        assert torch.equal(other.quant_weight().value, kept.value)
        loaded = pickle.loads(pickle.dumps(layer))
        assert torch.equal(loaded.quant_weight().value, kept.value)
    weights = layer.weight.numel() * 4
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.tell() < weights + 20_000


def test_inference_mode_keeps_results_of_its_own() -> None:
    layer = QuantLinear(4, 3).eval()
    with torch.inference_mode():
        inside = layer.quant_weight()
        assert layer.quant_weight() is inside
    with torch.no_grad():
        outside = layer.quant_weight()
        assert not outside.value.is_inference()
    assert torch.equal(inside.value, outside.value)


def test_an_idle_proxy_is_left_out_but_its_hooks_are_heard() -> None:
    layer = QuantLinear(4, 3)
    assert layer.input_quant.is_idle
    seen = []
    layer.input_quant.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.ones(1, 4))
    assert seen == [1]
    assert sum(1 for _ in layer.modules()) <= 12
