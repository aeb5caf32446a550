"""A layer that isn't frozen computes its quantized parameters at each call, from what is there."""

import copy

import pytest
import torch
from torch import nn

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
)

WEIGHTS = [
    Int8WeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
]
OPTIMIZERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


# ------------------------------------------------------------ training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "quantizer",
    [
        Int8WeightPerTensorFloat,
        Int8WeightPerTensorFloat.let(scaling_impl_type="parameter_from_stats"),
        Int8WeightPerChannelFloatMSE,
    ],
)
def test_fused_optimizers_train_as_others_do(quantizer, optimizer) -> None:
    """They move no version counters on CPUs."""
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = QuantLinear(16, 8, weight_quant=quantizer)
        x, y = torch.randn(32, 16), torch.randn(32, 8)
        steps = optimizer(layer.parameters(), lr=1e-2, fused=fused)
        for _ in range(5):
            steps.zero_grad()
            (layer(x) - y).square().mean().backward()
            steps.step()
        ends.append([p.detach().clone() for p in layer.parameters()])
    for plain, fused_one in zip(*ends, strict=True):
        torch.testing.assert_close(fused_one, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_to_be_trained_from_now_on_gets_its_gradient(training) -> None:
    layer, x = QuantLinear(4, 3).train(training), torch.randn(2, 4)
    layer.weight.requires_grad_(False)
    layer(x)
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("weight", WEIGHTS)
def test_two_calls_of_a_step_have_the_gradients_of_each(weight) -> None:
    layer = QuantConv2d(2, 3, 3, weight_quant=weight, dtype=torch.float64)
    x, y = torch.randn(2, 1, 2, 5, 5, dtype=torch.float64)
    (layer(x).sin().sum() + layer(y).cos().sum()).backward()
    together = layer.weight.grad.clone()
    layer.weight.grad = None
    for function, inputs in ((torch.sin, x), (torch.cos, y)):
        function(layer(inputs)).sum().backward()
    torch.testing.assert_close(together, layer.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_calls_of_a_step_may_be_differentiated_one_by_one(weight) -> None:
    layer = QuantConv2d(2, 3, 3, weight_quant=weight)
    first, second = (layer(torch.randn(1, 2, 5, 5)).sum() for _ in range(2))
    first.backward()
    second.backward()
    layer(torch.randn(1, 2, 5, 5)).sum().backward()


@pytest.mark.parametrize("weight", WEIGHTS[:4])
@pytest.mark.parametrize("size", [4, 128])
def test_a_weight_that_changes_before_the_backward_pass_is_an_error(weight, size) -> None:
    layer = QuantLinear(size, size, weight_quant=weight)
    found = layer.quant_weight()
    loss = found.value.sum() + found.scale.sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("calls", [1, 3])
def test_a_hook_on_a_weight_runs_once_a_backward_pass(weight, calls) -> None:
    layer, x = QuantLinear(4, 3, weight_quant=weight), torch.randn(2, 4)
    sum(layer(x).sin().sum() for _ in range(calls)).backward()
    right, seen = layer.weight.grad * 0.5, []
    layer.weight.grad = None
    layer.weight.register_hook(lambda grad: (seen.append(1), grad * 0.5)[1])
    sum(layer(x).sin().sum() for _ in range(calls)).backward()
    assert len(seen) == 1
    torch.testing.assert_close(layer.weight.grad, right)


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


# ------------------------------------------------------------ evaluation


def with_bias() -> tuple[QuantLinear, torch.Tensor]:
    layer = QuantLinear(4, 3, input_quant=Int8ActPerTensorFloat, bias_quant=Int32Bias)
    x = torch.randn(2, 4)
    with calibration_mode(layer):
        layer(x)
    return layer.eval(), x


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_another_quantizer_is_another_result(training) -> None:
    layer, other = QuantLinear(4, 3).train(training), QuantLinear(4, 3, weight_bit_width=2)
    before = layer.quant_weight()
    layer.weight_quant.tensor_quant = other.weight_quant.tensor_quant.train(training)
    assert not torch.equal(layer.quant_weight().value, before.value)


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("part", ["weight_quant", "input_quant", "bias_quant"])
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


@torch.no_grad()
@pytest.mark.parametrize("part", ["value", "scale", "zero_point", "bit_width"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [Int8WeightPerTensorFloat, ShiftedUint8WeightPerTensorFloat])
def test_a_result_that_is_written_to_is_made_anew(weight, training, part) -> None:
    layer = QuantLinear(4, 3, weight_quant=weight).train(training)
    before = getattr(layer.quant_weight(), part).clone()
    getattr(layer.quant_weight(), part).add_(1)
    assert torch.equal(getattr(layer.quant_weight(), part), before)


@torch.no_grad()
def test_what_draws_at_random_draws_at_each_call() -> None:
    kind = {"weight_float_to_int_impl_type": "stochastic_round"}
    layer = QuantLinear(64, 64, **kind, weight_deterministic_inference=False).eval()
    assert not torch.equal(layer.quant_weight().value, layer.quant_weight().value)
    layer = QuantLinear(64, 64, **kind).train()
    assert not torch.equal(layer.quant_weight().value, layer.quant_weight().value)


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
        layer.train()(9 * x)
        layer.eval()
    elif change == "dtype":
        quantizer.double()  # the scale, and with it what is divided by it
        assert layer.act_quant(x).scale.dtype == torch.float64
        return
    else:
        scaling.value.fill_(9)
    assert not torch.equal(layer(3 * x), before)


@torch.no_grad()
def test_statistics_collected_after_evaluation_are_seen() -> None:
    layer = QuantIdentity(collect_stats_steps=10, return_quant_tensor=True)
    layer(torch.ones(4))
    layer.eval()
    first = layer(torch.ones(4)).scale.clone()
    layer.train()
    layer(torch.full((4,), 100.0))
    layer.eval()
    assert layer(torch.ones(4)).scale > first


# ------------------------------------------------------------ forward-mode derivatives


def networks() -> list[nn.Module]:
    shifted = {"input_quant": ShiftedUint8ActPerTensorFloat, "weight_quant": WEIGHTS[3]}
    return [
        QuantReLU(collect_stats_steps=1),
        with_bias()[0],
        QuantLinear(4, 3, weight_quant=Int8WeightPerChannelFloat),
        QuantLinear(4, 3, **shifted),
        nn.Sequential(QuantLinear(4, 4), QuantReLU(collect_stats_steps=1), QuantLinear(4, 2)),
    ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_derivatives_are_those_of_the_definition(index, grad, frozen) -> None:
    torch.manual_seed(0)
    model, x, tangent = networks()[index], torch.randn(2, 4), torch.randn(2, 4)
    with calibration_mode(model):
        model(x)
    model.eval()

    def both() -> list[torch.Tensor]:
        found = [*torch.func.jvp(model, (x,), (tangent,))]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            found += torch.autograd.forward_ad.unpack_dual(model(dual))
        return found

    with torch.set_grad_enabled(grad):
        with qframework.settings.use(kernels="reference"):
            expected = both()
        if frozen:
            qframework.freeze(model)
        found = both()
    assert expected[1].any()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    rows = torch.autograd.functional.jacobian(lambda t: model(t).flatten(), x)
    torch.testing.assert_close(found[1].flatten(), (rows * tangent).sum((1, 2)))


def test_the_derivative_along_a_weight_is_that_of_the_definition() -> None:
    layer, x = with_bias()
    tangents = {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    values = {n: p.detach() for n, p in layer.named_parameters()}

    def call(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    found = torch.func.jvp(call, (values,), (tangents,))
    with qframework.settings.use(kernels="reference"):
        expected = torch.func.jvp(call, (values,), (tangents,))
    assert expected[1].any()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
