"""However a parameter is changed, a layer computes by the numbers that are there: as one built freshly of the same numbers."""

import copy
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import qframework
from qframework.graph import calibration_mode
from qframework.layers import QuantIdentity, QuantLinear, QuantLSTM, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8WeightPerChannelFloat,
)

LEARNED = {"weight_scaling_impl_type": "parameter_from_stats"}
#: A layer's keywords.
KINDS = {
    "per tensor": {"weight_quant": Int8WeightPerTensorFloat},
    "per channel": {"weight_quant": Int8WeightPerChannelFloat},
    "zero points": {"weight_quant": ShiftedUint8WeightPerChannelFloat},
    "learned scale": {"weight_quant": Int8WeightPerTensorFloat, **LEARNED},
    "learned scales": {"weight_quant": Int8WeightPerChannelFloat, **LEARNED},
    "searched scales": {"weight_quant": Int8WeightPerChannelFloatMSE, **LEARNED},
    "bias": {"bias_quant": Int32Bias, "input_quant": Int8ActPerTensorFloat},
    "bias of its own scale": {"bias_quant": Int8BiasPerTensorFloatInternalScaling},
    "learned scale of a bias": {
        "bias_quant": Int8BiasPerTensorFloatInternalScaling,
        "bias_scaling_impl_type": "parameter_from_stats",
    },
}
#: Kinds and sizes: fused functions run, and from 256 elements on those in C++.
SIZED = [(kind, 4) for kind in KINDS if kind != "searched scales"]
if qframework.settings.kernels != "reference":  # else all sizes take the same road
    SIZED += [(kind, 64) for kind in ("per tensor", "per channel", "zero points", "learned scale")]


def build(kind: str, size: int, outputs: int | None = None) -> QuantLinear:
    """A layer of a kind, whose input has been seen."""
    torch.manual_seed(0)
    layer = QuantLinear(size, outputs or size, **KINDS[kind])
    with calibration_mode(layer):
        layer(inputs(size))
    return layer


def inputs(size: int) -> Tensor:
    return torch.linspace(-2, 2, 3 * size).reshape(3, size)


def used(layer: QuantLinear, training: bool) -> QuantLinear:
    """The layer after two calls, with gradients of its own in training."""
    layer.train(training)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            layer.zero_grad()
            out = layer(inputs(layer.weight.shape[1]))
            if training:
                out.square().sum().backward()
    return layer


def fresh(kind: str, layer: QuantLinear, learned: bool = False) -> QuantLinear:
    """A layer that is built of the same numbers.

    Args:
        kind: of layer.
        layer: with the numbers.
        learned: take over scales of parameters too.
    """
    outputs, features = layer.weight.shape
    other = build(kind, features, outputs)
    entries = dict(layer.state_dict())
    if not learned:
        entries = {k: v for k, v in entries.items() if not k.startswith(("weight_q", "bias_q"))}
    entries = {k: v for k, v in entries.items() if "param" not in k and "_orig" not in k}
    entries = {k: v for k, v in entries.items() if "_mask" not in k}
    entries |= {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    other.load_state_dict({k: v.clone() for k, v in entries.items()})
    now = layer.weight.detach()
    # laid out alike, gaps included, so that all is added up in the same order
    other.weight.data = torch.empty_strided(now.shape, now.stride(), dtype=now.dtype).copy_(now)
    return other.train(layer.training)


def check(kind: str, layer: QuantLinear, learned: bool = False) -> None:
    """Numbers and gradients are those of a layer that is built freshly."""
    other = fresh(kind, layer, learned)
    with torch.no_grad():
        ours, theirs = layer.quant_weight(), other.quant_weight()
        for name in ("value", "scale", "zero_point"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    found = []
    for one in (layer, other):
        one.zero_grad()
        x = inputs(layer.weight.shape[1]).requires_grad_()
        with torch.set_grad_enabled(layer.training):
            out = one(x)
        found.append([out])
        if layer.training:
            out.square().sum().backward()
            leaves = [one.weight, one.bias] if one.weight.is_leaf and one.bias.is_leaf else []
            found[-1] += [x.grad, *(p.grad for p in leaves)]
    count = min(map(len, found))
    for a, b in zip(found[0][:count], found[1][:count], strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------ ways to change both parameters


@torch.no_grad()
def in_place(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.mul_(1.7)


@torch.no_grad()
def through_a_view(layer: QuantLinear) -> None:
    layer.weight[1].fill_(2.0)
    layer.bias[1:].fill_(0.25)


def data_in_place(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.data.mul_(-3)


def data_assigned(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.data = p.data * 3 + 0.1


def data_assigned_after_edits(layer: QuantLinear) -> None:
    for _ in range(3):
        data_assigned(layer)
        in_place(layer)
        data_in_place(layer)


def data_sliced(layer: QuantLinear) -> None:
    """As structured pruning does: the same address, the same version."""
    layer.weight.data = layer.weight.data[:-1]
    layer.bias.data = layer.bias.data[:-1]
    layer.weight.data = layer.weight.data[:, :-1]
    layer.weight.grad = layer.bias.grad = None
    if layer.bias_quant.is_quant_enabled or layer.weight_quant.scale().numel() > 1:
        layer.bias.data.mul_(2)


def data_transposed(layer: QuantLinear) -> None:
    layer.weight.data = layer.weight.data.t()


def data_at_the_same_address(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        memory = p.data.view(p.shape)
        p.data = torch.randn(p.shape)
        memory.neg_().mul_(0.5)
        p.data = memory


def numpy_view(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.detach().numpy()[:] *= 2.5


def detached(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.detach().mul_(2.5)


def from_vector(layer: QuantLinear) -> None:
    parameters = [layer.weight, layer.bias]
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector * 1.3 - 0.1, parameters)


def clamped(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.data.clamp_(-0.05, 0.02)


def averaged(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.data.mul_(0.9).add_(torch.ones_like(p.data), alpha=0.1)


def lerped(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        p.data.lerp_(torch.ones_like(p.data), 0.3)


def a_loop_of_ones_own(layer: QuantLinear) -> None:
    for p in (layer.weight, layer.bias):
        gradient = torch.full_like(p, 0.3) if p.grad is None else p.grad
        p.data.add_(gradient, alpha=-0.1)


def stepping(make: Callable, **options: object) -> Callable:
    def step(layer: QuantLinear) -> None:
        parameters = [layer.weight, layer.bias]
        optimizer = make(parameters, lr=0.3, **options)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.register_step_post_hook(lambda o, *_: o.zero_grad())
        optimizer.step()

    return step


def assigned(layer: QuantLinear) -> None:
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * 2 + 0.1))


def registered(layer: QuantLinear) -> None:
    for name in ("weight", "bias"):
        layer.register_parameter(name, nn.Parameter(getattr(layer, name).detach() * 2 + 0.1))


def written_into_the_dictionary(layer: QuantLinear) -> None:
    for name in ("weight", "bias"):
        layer._parameters[name] = nn.Parameter(getattr(layer, name).detach() * 2 + 0.1)


def loading(assign: bool) -> Callable:
    def load(layer: QuantLinear) -> None:
        state = {k: layer.state_dict()[k] * 2 - 0.1 for k in ("weight", "bias")}
        state |= {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("input_q")}
        layer.load_state_dict(state, assign=assign)

    return load


def swapped(layer: QuantLinear) -> None:
    for name in ("weight", "bias"):
        p = getattr(layer, name)
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2 + 0.1))


def made_under_inference_mode(layer: QuantLinear) -> None:
    with torch.inference_mode():
        made = {n: getattr(layer, n) * 3 for n in ("weight", "bias")}
    for name, values in made.items():
        getattr(layer, name).data.copy_(values)


def initialised(layer: QuantLinear) -> None:
    nn.init.normal_(layer.weight, std=3)
    nn.init.uniform_(layer.bias)


def converted(layer: QuantLinear) -> None:
    layer.double()
    data_in_place(layer)
    layer.float()
    data_in_place(layer)


def shared(layer: QuantLinear) -> None:
    layer.share_memory()
    data_in_place(layer)


WAYS = {
    "in place": in_place,
    "through a view": through_a_view,
    "data in place": data_in_place,
    "data assigned": data_assigned,
    "data assigned after edits": data_assigned_after_edits,
    "data sliced": data_sliced,
    "data transposed": data_transposed,
    "data at the same address": data_at_the_same_address,
    "numpy view": numpy_view,
    "detached": detached,
    "vector_to_parameters": from_vector,
    "clamp": clamped,
    "moving average": averaged,
    "lerp": lerped,
    "a loop of one's own": a_loop_of_ones_own,
    "SGD": stepping(torch.optim.SGD),
    "fused SGD": stepping(torch.optim.SGD, fused=True),
    "fused Adam": stepping(torch.optim.Adam, fused=True),
    "fused AdamW": stepping(torch.optim.AdamW, fused=True),
    "fused Adagrad": stepping(torch.optim.Adagrad, fused=True),
    "foreach Adam": stepping(torch.optim.Adam, foreach=True),
    "assigned": assigned,
    "registered": registered,
    "written into the dictionary": written_into_the_dictionary,
    "loaded": loading(False),
    "loaded by assignment": loading(True),
    "swapped": swapped,
    "made under inference_mode": made_under_inference_mode,
    "initialised": initialised,
    "converted": converted,
    "shared memory": shared,
}


SEARCHED = ["data in place", "data assigned", "numpy view", "fused Adam", "loaded", "swapped"]
CASES = [(way, *case) for way in WAYS for case in SIZED]
CASES += [(way, "searched scales", 4) for way in SEARCHED]  # searching takes long


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("way", "kind", "size"), CASES)
def test_a_change_is_seen_by_the_next_call(way, kind, size, training) -> None:
    layer = used(build(kind, size), training)
    with torch.no_grad():
        before = layer(inputs(size)).clone()
    WAYS[way](layer)
    with torch.no_grad():
        after = layer(inputs(layer.weight.shape[1]))
    assert before.shape != after.shape or not torch.equal(before, after)
    check(kind, layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["learned scales", "searched scales"])
def test_fewer_channels_than_learned_scales_are_an_error_that_says_what_to_do(
    kind, training
) -> None:
    layer = used(build(kind, 4), training)
    layer.weight_quant.tensor_quant.scaling_impl.value.data.mul_(2)
    layer.weight.data, layer.bias.data = layer.weight.data[:-1], layer.bias.data[:-1]
    with pytest.raises(RuntimeError, match=r"weight_quant: weight was given the shape.*Assign"):
        layer(inputs(4))
    layer.weight = torch.nn.Parameter(layer.weight.data)
    layer(inputs(4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_built_under_inference_mode_sees_what_is_written_there(kind, training) -> None:
    with torch.inference_mode():
        layer = build(kind, 64).train(training)
        before = layer(inputs(64))
        for p in (layer.weight, layer.bias):
            p.mul_(2).add_(0.1)  # such tensors count no versions
        after = layer(inputs(64))
        assert not torch.equal(after, before)
        other = fresh(kind, layer)
        assert torch.equal(after, other(inputs(64)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", ["pruned", "pruned for good", "parametrized", "parametrized and back"]
)
def test_a_weight_that_is_computed_is_seen(how, kind, training) -> None:
    layer = used(build(kind, 4), training)
    if how.startswith("pruned"):
        prune.l1_unstructured(layer, "weight", 0.5)
        layer.weight_orig.data.mul_(2)
        layer(inputs(4))  # pruning computes the weight in a hook
        if how.endswith("good"):
            prune.remove(layer, "weight")
            layer.weight.data.mul_(2)
    else:
        parametrize.register_parametrization(layer, "weight", Negative())
        layer.parametrizations.weight.original.data.mul_(2)
        layer(inputs(4))
        if how.endswith("back"):
            parametrize.remove_parametrizations(layer, "weight")
            layer.weight.data.mul_(2)
    check(kind, layer)


class Negative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def write(layers: nn.Module) -> None:
    """What a second process does."""
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(-2)
            layer.bias.add_(0.3)


def test_what_a_second_process_writes_to_shared_memory_is_seen() -> None:
    layers = nn.ModuleDict()
    for kind in KINDS:
        for training in (True, False):
            layers[f"{kind}, {training}"] = used(build(kind, 8), training)
    for p in layers.parameters():
        p.grad = None
    layers.share_memory()
    before = {name: layer(inputs(8)).detach() for name, layer in layers.items()}
    process = torch.multiprocessing.get_context("spawn").Process(target=write, args=(layers,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for name, layer in layers.items():
        assert not torch.equal(layer(inputs(8)), before[name]), name
        check(name.split(",")[0], layer)


# ------------------------------------------------------------ other numbers in their place for a call


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_and_vmap_take_the_numbers_that_they_are_given(kind, training) -> None:
    layer = used(build(kind, 4), training)
    x = inputs(4)
    with torch.no_grad():
        plain = layer(x)
        given = [{n: getattr(layer, n) * k for n in ("weight", "bias")} for k in (2.0, -3.0)]
        expected = []
        for one in given:
            other = copy.deepcopy(layer)
            for name, values in one.items():
                getattr(other, name).copy_(values)
            expected.append(other(x))
            # A learned scale is that of the layer's own parameters while others stand in.
            if "learned" not in kind and "searched" not in kind:
                assert torch.equal(torch.func.functional_call(layer, one, (x,)), expected[-1])
        if "learned" not in kind and "searched" not in kind:
            stacked = {n: torch.stack([one[n] for one in given]) for n in given[0]}
            call = torch.vmap(lambda one: torch.func.functional_call(layer, one, (x,)))
            torch.testing.assert_close(call(stacked), torch.stack(expected))
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["learned scale", "learned scales", "searched scales"])
def test_functional_call_takes_the_scale_that_it_is_given(kind, training) -> None:
    layer = used(build(kind, 4), training)
    key, x = "weight_quant.tensor_quant.scaling_impl.value", inputs(4)
    with torch.no_grad():
        plain = layer(x)
        other = copy.deepcopy(layer)
        changed = layer.state_dict()[key] * 3
        other.get_parameter(key).copy_(changed)
        assert torch.equal(torch.func.functional_call(layer, {key: changed}, (x,)), other(x))
        assert torch.equal(layer(x), plain)


# ------------------------------------------------------------ partners of a shared quantizer


def prune_partner(layer: QuantLinear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.weight_orig.data.mul_(5)
    layer(inputs(4))


def parametrize_partner(layer: QuantLinear) -> None:
    parametrize.register_parametrization(layer, "weight", Negative())
    layer.parametrizations.weight.original.data.mul_(5)


PARTNERS = {n: WAYS[n] for n in ("data in place", "data assigned", "numpy view", "fused SGD")}
PARTNERS |= {n: WAYS[n] for n in ("assigned", "written into the dictionary", "loaded", "swapped")}
PARTNERS |= {"pruned": prune_partner, "parametrized": parametrize_partner}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", list(KINDS)[:5])
@pytest.mark.parametrize("way", PARTNERS)
def test_the_scale_that_layers_share_follows_a_change_of_each(way, kind, training) -> None:
    first = build(kind, 4)
    second = QuantLinear(4, 4, weight_quant=first.weight_quant).train(training)
    used(first, training), used(second, training)
    before = first.quant_weight().scale.clone()
    PARTNERS[way](second)
    with torch.no_grad():
        assert not torch.equal(first.quant_weight().scale, before)
        other = build(kind, 4)
        other.weight.copy_(first.weight)
        partner = QuantLinear(4, 4, weight_quant=other.weight_quant)
        partner.weight.copy_(second.weight)
        other.train(training)
        assert torch.equal(first.quant_weight().scale, other.quant_weight().scale)
        assert torch.equal(
            first(inputs(4)),
            nn.functional.linear(inputs(4), other.quant_weight().value, first.bias),
        )
        assert torch.equal(second.quant_weight().value, partner.quant_weight().value)


# ------------------------------------------------------------ results that go elsewhere


@torch.no_grad()
@pytest.mark.parametrize("make", [QuantIdentity, QuantReLU])
@pytest.mark.parametrize("size", [16, 1 << 14])
def test_a_result_that_is_sent_over_a_queue_leaves_the_quantizer_as_it_was(make, size) -> None:
    layer = make(return_quant_tensor=True, collect_stats_steps=1)
    x = torch.linspace(-2, 2, size)
    layer(x), layer(x)
    layer.eval()
    right = layer(x).value.clone()
    sent = ForkingPickler.dumps(layer(x))  # what queue.put does: moves tensors to shared memory
    others = [torch.full((1,), 7.0) for _ in range(4096)]  # memory is used again
    assert torch.equal(layer(x).value, right)
    assert len(sent) and len(others)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_weight_that_is_sent_over_a_queue_leaves_the_layer_as_it_was(kind) -> None:
    layer = used(build(kind, 64), False)
    right = layer(inputs(64)).clone()
    sent = ForkingPickler.dumps(layer.quant_weight())
    others = [torch.full((64, 64), 7.0) for _ in range(16)]
    assert torch.equal(layer(inputs(64)), right)
    data_in_place(layer)
    check(kind, layer)
    assert len(sent) and len(others)


# ------------------------------------------------------------ learned scales

SCALES = ["learned scale", "learned scales", "searched scales"]
WRITES = {
    "data in place": lambda p: p.data.fill_(0.254),
    "data assigned": lambda p: setattr(p, "data", torch.full_like(p.data, 0.254)),
    "in place": lambda p: p.detach().fill_(0.254),
    "numpy": lambda p: p.detach().numpy().__setitem__(..., 0.254),
}


def scale_of(layer: QuantLinear) -> nn.Parameter:
    return layer.weight_quant.tensor_quant.scaling_impl.value


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("write", WRITES)
def test_a_learned_scale_keeps_what_was_written_before_the_first_step(
    write, kind, training, called
) -> None:
    layer = build(kind, 4).train(training)
    if called:
        layer(inputs(4))
    WRITES[write](scale_of(layer))
    for _ in range(2):
        scale = layer.quant_weight().scale
        torch.testing.assert_close(scale, torch.full_like(scale, 0.002))
    layer.weight.data.mul_(3)
    torch.testing.assert_close(layer.quant_weight().scale, scale)
    check(kind, layer, learned=True)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("way", ["fused Adam", "SGD", "a loop of one's own"])
def test_a_learned_scale_that_was_trained_stays_what_it_is(way, kind) -> None:
    layer = used(build(kind, 4), True)
    value = scale_of(layer)
    if way == "SGD":
        torch.optim.SGD([value], lr=0.01).step()
    elif way == "fused Adam":
        torch.optim.Adam([value], lr=0.01, fused=True).step()
    else:
        value.data.add_(value.grad, alpha=-0.01)
    trained = value.detach().clone()
    layer.weight.data.mul_(3)
    layer(inputs(4))
    assert torch.equal(value, trained)
    check(kind, layer, learned=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "averaged": lambda layer: torch.optim.swa_utils.AveragedModel(layer).module,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_and_what_was_copied_see_changes_of_their_own_alone(way, kind, training) -> None:
    layer = used(build(kind, 64), training)
    other = COPIES[way](layer)
    with torch.no_grad():
        assert torch.equal(other(inputs(64)), layer(inputs(64)))
        right = layer(inputs(64))
    data_in_place(other)
    check(kind, other)
    with torch.no_grad():
        assert torch.equal(layer(inputs(64)), right)
    data_assigned(layer)
    check(kind, layer)
    check(kind, other)


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("way", COPIES)
def test_copies_keep_whether_a_learned_scale_was_initialised(way, kind, called, written) -> None:
    layer = build(kind, 4)
    if called:
        layer(inputs(4))
    if written:
        scale_of(layer).data.fill_(0.254)
    other = COPIES[way](layer)
    other.weight.data.mul_(3)
    if written:
        assert torch.equal(scale_of(other), torch.full_like(scale_of(other), 0.254))
    check(kind, other, learned=written)


@pytest.mark.parametrize("kind", SCALES)
def test_an_average_of_models_averages_learned_scales(kind) -> None:
    layer = used(build(kind, 4), True)
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    first = scale_of(layer).detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    average.update_parameters(layer)
    second = scale_of(layer).detach()
    assert not torch.equal(first, second)
    found = average.module.weight_quant.tensor_quant.scaling_impl
    average.module(inputs(4))
    torch.testing.assert_close(found.value.detach(), (first + second) / 2)


@pytest.mark.parametrize("training", [True, False])
def test_a_scale_of_an_activation_keeps_what_is_written_through_data(training) -> None:
    layer = QuantReLU(collect_stats_steps=1, return_quant_tensor=True)
    x = torch.linspace(0, 1, 1 << 13)
    layer(x), layer(x)
    layer.train(training)
    layer(x)
    value = layer.act_quant.tensor_quant.scaling_impl.value
    for write in WRITES.values():
        value.data.fill_(1.0)
        layer(x)
        write(value)
        assert layer(x).scale.item() == pytest.approx(0.254 / 255)


# ------------------------------------------------------------ whole loops


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_loop_of_ones_own_is_that_of_an_optimizer(kind) -> None:
    first = build(kind, 8).train()
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    x, y = inputs(8), torch.randn(3, 8)
    plain = torch.optim.SGD(second.parameters(), lr=0.05)
    fused = torch.optim.SGD(third.parameters(), lr=0.05, fused=True)
    for _ in range(5):
        for layer in (first, second, third):
            layer.zero_grad()
            (layer(x) - y).square().mean().backward()
        for p in first.parameters():
            if p.grad is not None:
                p.data.add_(p.grad.data, alpha=-0.05)
        plain.step()
        fused.step()
    for a, b, c in zip(*(m.parameters() for m in (first, second, third)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, b)
    assert torch.equal(first(x), second(x))
    check(kind, first, learned=True)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_recurrent_layer_computes_by_the_numbers_that_are_there(training) -> None:
    torch.manual_seed(0)
    layer, x = QuantLSTM(4, 3, bidirectional=True), 2 * torch.randn(5, 2, 4)
    with calibration_mode(layer):
        layer(x)
    layer.train(training)
    before = layer(x)[0]
    gate = layer.layers[0][0].parameters_of("cell")
    for change in (
        lambda: gate.hidden_weight.weight.data.mul_(3),
        lambda: gate.bias.data.sub_(0.5),
        lambda: gate.input_weight.weight.detach().numpy().__imul__(-2),
        lambda: layer.io_quant.tensor_quant.scaling_impl.value.data.mul_(2),
    ):
        change()
        other = QuantLSTM(4, 3, bidirectional=True)
        other.load_state_dict(layer.state_dict())
        now = layer(x)[0]
        assert torch.equal(now, other.train(training)(x)[0])
        assert not torch.equal(now, before)
        before = now
