"""What a frozen model keeps, and everything that thaws it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import qframework
from qframework.core.quant import RescalingIntQuant
from qframework.graph import calibration_mode
from qframework.layers import QuantIdentity, QuantLinear, QuantLSTM, QuantReLU, QuantSigmoid
from qframework.quantizers import (
    Int8AccumulatorAwareWeightQuant,
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
    Int8DynamicActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFloat,
)

WEIGHTS = [
    Int8WeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    ShiftedUint8WeightPerTensorFloat,
    Int8WeightPerTensorFloat.let(scaling_impl_type="parameter_from_stats"),
    Int8WeightPerChannelFloatMSE,
    SignedBinaryWeightPerTensorConst,
]
NAMES = [w.__name__ + str(i) for i, w in enumerate(WEIGHTS)]


def full(weight=Int8WeightPerTensorFloat, bias=Int32Bias) -> tuple[QuantLinear, torch.Tensor]:
    """A layer with all quantizers, calibrated, in evaluation."""
    torch.manual_seed(0)
    layer = QuantLinear(
        4,
        3,
        weight_quant=weight,
        bias_quant=bias,
        input_quant=Int8ActPerTensorFloat,
        output_quant=ShiftedUint8ActPerTensorFloat,
    )
    x = torch.randn(6, 4)
    with calibration_mode(layer):
        layer(x)
    return layer.eval(), x


def proxies(model: nn.Module) -> list:
    return [m for m in model.modules() if getattr(m, "tensor_quant", None) is not None]


@pytest.fixture
def calls(monkeypatch) -> list[nn.Module]:
    """The tensor quantizers that ran, by their parts."""
    seen: list[nn.Module] = []
    forward = RescalingIntQuant.forward

    def counted(self, x, *args, **kwargs):
        seen.append(self)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(RescalingIntQuant, "forward", counted)
    return seen


# ------------------------------------------------------------ what is kept


@pytest.mark.parametrize("weight", WEIGHTS, ids=NAMES)
@pytest.mark.parametrize("bias", [None, Int32Bias, Int8BiasPerTensorFloatInternalScaling])
@pytest.mark.parametrize("grad", [False, True])
def test_a_frozen_layer_gives_the_very_same_numbers(weight, bias, grad) -> None:
    layer, x = full(weight, bias)
    with torch.set_grad_enabled(grad):
        before = layer(x)
        with qframework.frozen(layer):
            assert torch.equal(layer(x), before)
            assert torch.equal(layer(2 * x), layer(2 * x))
        assert torch.equal(layer(x), before)


@torch.no_grad()
@pytest.mark.parametrize("weight", WEIGHTS, ids=NAMES)
def test_a_weight_is_quantized_once_inside_and_at_each_call_outside(weight) -> None:
    layer, x = full(weight)
    assert layer.quant_weight() is not layer.quant_weight()
    with qframework.frozen(layer):
        kept = layer.quant_weight()
        layer(x)
        assert layer.quant_weight() is kept
    assert layer.quant_weight() is not kept


@torch.no_grad()
def test_each_weight_is_quantized_once_in_a_loop_of_validation(calls) -> None:
    model = nn.Sequential(QuantLinear(4, 4, bias=False), QuantLinear(4, 4, bias=False)).eval()
    with qframework.frozen(model):
        assert len(calls) == 2
        for _ in range(5):
            model(torch.randn(2, 4))
        assert len(calls) == 2
    model(torch.randn(2, 4))
    assert len(calls) == 4


@torch.no_grad()
def test_a_bias_of_its_own_scale_is_kept() -> None:
    layer = QuantLinear(4, 3, bias_quant=Int8BiasPerTensorFloatInternalScaling).eval()
    with qframework.frozen(layer):
        assert layer.quant_bias() is layer.quant_bias()
    assert layer.quant_bias() is not layer.quant_bias()


@torch.no_grad()
def test_a_bias_by_the_scale_of_the_input_is_kept_for_that_scale() -> None:
    layer, x = full()
    before = layer(x)
    seen: list[int] = []
    layer.bias_quant.tensor_quant.register_forward_hook(lambda *_: seen.append(1))
    with qframework.frozen(layer):
        for _ in range(4):
            assert torch.equal(layer(x), before)
    assert len(seen) == 1
    layer(x)
    assert len(seen) == 2


@torch.no_grad()
def test_a_bias_whose_scale_is_another_at_each_call_is_right_and_leaves_nothing_behind() -> None:
    options = {"bias_quant": Int32Bias, "input_quant": Int8DynamicActPerTensorFloat}
    layer = QuantLinear(4, 3, **options).eval()
    inputs = [torch.randn(5, 4) * (i + 1) for i in range(6)]
    expected = [layer(x) for x in inputs]
    with qframework.frozen(layer):
        for x, right in zip(inputs, expected, strict=True):
            assert torch.equal(layer(x), right)
        assert len(layer.bias_quant._memory.entries) <= 1


@torch.no_grad()
def test_the_scale_of_an_activation_is_computed_once(monkeypatch) -> None:
    layer, x = QuantReLU(collect_stats_steps=1), torch.rand(8)
    layer(x), layer(x)
    layer.eval()
    before = layer(x)
    with qframework.frozen(layer):
        scaling = layer.act_quant.tensor_quant.scaling_impl
        monkeypatch.setattr(type(scaling), "forward", None)  # would fail if it were called
        monkeypatch.setattr(type(scaling), "stored", None)
        assert torch.equal(layer(x), before)


@torch.no_grad()
def test_weights_that_depend_on_the_width_of_the_input_are_computed_at_each_call() -> None:
    layer = QuantLinear(
        4, 3, weight_quant=Int8AccumulatorAwareWeightQuant, input_quant=Uint8ActPerTensorFloat
    )
    x = torch.rand(5, 4)
    with calibration_mode(layer):
        layer(x)
    layer.eval()
    before = layer(x)
    with qframework.frozen(layer):
        assert torch.equal(layer(x), before)
        layer.weight.data.mul_(2)
        changed = layer(x)
    assert torch.equal(layer(x), changed)
    assert not torch.equal(changed, before)


def test_gradients_flow_to_inputs_and_not_to_weights() -> None:
    layer, x = full()
    x.requires_grad_(True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    with qframework.frozen(layer):
        layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert layer.weight.grad is None


@torch.no_grad()
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_frozen_under_inference_mode_serves_outside(mode) -> None:
    layer, x = full()
    before = layer(x)
    with mode():
        qframework.freeze(layer)
        layer(x)
    assert not layer.quant_weight().value.is_inference()
    with torch.enable_grad():
        given = x.clone().requires_grad_(True)
        assert torch.equal(layer(given), before)
        layer(given).sum().backward()


def test_a_frozen_weight_says_so() -> None:
    layer, _ = full()
    assert layer.weight_quant.path() != "frozen"
    with qframework.frozen(layer):
        assert layer.weight_quant.path() == "frozen"
        assert "frozen" in str(layer.weight_quant.explain())


# ------------------------------------------------------------ entering and leaving


def test_a_model_in_training_is_refused_by_name_and_nothing_is_frozen() -> None:
    model = nn.Sequential(QuantLinear(4, 4).eval(), QuantLinear(4, 4))
    model.training = False
    with pytest.raises(RuntimeError, match=r"1\.weight_quant is in training mode.*eval\(\)"):
        qframework.freeze(model)
    assert not any(p.is_frozen for p in proxies(model))
    with pytest.raises(RuntimeError, match="training mode"), qframework.frozen(model):
        pass


@torch.no_grad()
def test_by_hand_until_it_is_thawed_by_hand() -> None:
    layer, x = full()
    before = layer(x)
    qframework.freeze(layer)
    qframework.freeze(layer)  # again changes nothing
    kept = layer.quant_weight()
    assert layer.quant_weight() is kept
    qframework.unfreeze(layer)
    assert layer.quant_weight() is not kept
    assert torch.equal(layer(x), before)
    assert not any(p.is_frozen for p in proxies(layer))


def test_an_exception_inside_thaws() -> None:
    layer, _ = full()
    with pytest.raises(KeyError), qframework.frozen(layer):
        assert layer.weight_quant.is_frozen
        raise KeyError
    assert not any(p.is_frozen for p in proxies(layer))


def test_an_inner_block_leaves_what_an_outer_one_froze() -> None:
    model = nn.Sequential(QuantLinear(4, 4), QuantLinear(4, 4)).eval()
    with qframework.frozen(model[0]):
        with qframework.frozen(model):
            assert model[1].weight_quant.is_frozen
        assert model[0].weight_quant.is_frozen
        assert not model[1].weight_quant.is_frozen
    assert not any(p.is_frozen for p in proxies(model))


def test_what_is_switched_off_is_left_alone() -> None:
    layer, x = full()
    layer.weight_quant.disable_quant = True
    with qframework.frozen(layer):
        assert not layer.weight_quant.is_frozen
        assert layer.quant_weight() is layer.weight
        layer.weight_quant.disable_quant = False
        assert torch.equal(layer.quant_weight().value, copy.deepcopy(layer).quant_weight().value)


@torch.no_grad()
def test_quantization_switched_off_and_on_inside_is_followed() -> None:
    layer, x = full(bias=None)
    with qframework.frozen(layer):
        before = layer(x)
        for proxy in proxies(layer):
            proxy.disable_quant = True
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        for proxy in proxies(layer):
            proxy.disable_quant = False
        assert torch.equal(layer(x), before)


@torch.no_grad()
def test_the_name_of_the_reference_library_has_its_options() -> None:
    layer, x = full()
    before = layer(x)
    with qframework.quant_inference_mode(layer) as inside:
        assert inside is layer
        assert layer.weight_quant.is_frozen and layer.input_quant.is_frozen
        assert torch.equal(layer(x), before)
    with qframework.quant_inference_mode(layer, cache_quant_weight=False):
        assert not layer.weight_quant.is_frozen and layer.input_quant.is_frozen
        assert torch.equal(layer(x), before)
    with qframework.quant_inference_mode(layer, enabled=False):
        assert not any(p.is_frozen for p in proxies(layer))
    assert not any(p.is_frozen for p in proxies(layer))


@torch.no_grad()
def test_calibration_quantizes_weights_once_a_batch_of_batches_and_thaws_after(calls) -> None:
    layer = QuantLinear(4, 3, bias=False)
    with calibration_mode(layer):
        for _ in range(3):
            layer(torch.randn(2, 4))
    assert not layer.weight_quant.is_frozen


# ------------------------------------------------------------ what thaws


def optimizer_step(layer: QuantLinear) -> None:
    for parameter in (layer.weight, layer.bias):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([layer.weight, layer.bias], lr=0.5).step()


def view_written(layer: QuantLinear) -> None:
    layer.weight[1].fill_(2.0)


def assigned(layer: QuantLinear) -> None:
    layer.weight = nn.Parameter(torch.full((3, 4), 0.5))


def data_assigned(layer: QuantLinear) -> None:
    layer.weight.data = torch.full((3, 4), 0.5)


def loaded(layer: QuantLinear) -> None:
    layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()})


def loaded_by_assignment(layer: QuantLinear) -> None:
    layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}, assign=True)


def vector(layer: QuantLinear) -> None:
    parameters = [layer.weight, layer.bias]
    changed = 2 * nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(changed, parameters)


def converted(layer: QuantLinear) -> None:
    layer.double()
    layer.float()
    layer.weight.mul_(2)


def another_mode(layer: QuantLinear) -> None:
    layer.train()
    layer.eval()
    layer.weight.data.mul_(2)


def another_quantizer(layer: QuantLinear) -> None:
    other = QuantLinear(4, 3, weight_bit_width=2).weight_quant.tensor_quant.eval()
    layer.weight_quant.tensor_quant = other


def another_proxy(layer: QuantLinear) -> None:
    layer.weight_quant = QuantLinear(4, 3, weight_bit_width=2).eval().weight_quant
    layer.weight_quant.tracked_module_list[0] = layer


def another_part(layer: QuantLinear) -> None:
    other = QuantLinear(4, 3, weight_bit_width=2).weight_quant.tensor_quant
    layer.weight_quant.tensor_quant.msb_clamp_bit_width_impl = other.msb_clamp_bit_width_impl


def a_method_assigned(layer: QuantLinear) -> None:
    quantizer = layer.weight_quant.tensor_quant
    forward = type(quantizer).forward
    quantizer.forward = lambda w: (lambda y, *rest: (y / 2, *rest))(*forward(quantizer, w))


def a_hook(layer: QuantLinear) -> None:
    layer.weight_quant.tensor_quant.register_forward_hook(
        lambda module, args, result: (result[0] / 2, *result[1:])
    )


def built_anew(layer: QuantLinear) -> None:
    layer.weight.data.mul_(2)
    layer.weight_quant.init_tensor_quant()


def parametrized(layer: QuantLinear) -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Half())


def pruned(layer: QuantLinear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def swapped(layer: QuantLinear) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.full((3, 4), 0.5)))


CHANGES = [
    lambda layer: layer.weight.mul_(1.7),
    view_written,
    optimizer_step,
    assigned,
    data_assigned,
    loaded,
    loaded_by_assignment,
    vector,
    converted,
    another_mode,
    another_quantizer,
    another_proxy,
    another_part,
    a_method_assigned,
    a_hook,
    built_anew,
    parametrized,
    pruned,
]
CHANGES[0].__name__ = "written_in_place"


def without_memory(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer computes if nothing is kept."""
    qframework.unfreeze(layer)
    return layer(x)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("weight", WEIGHTS[:5], ids=NAMES[:5])
def test_what_changes_a_weight_thaws_it(change, weight) -> None:
    layer, x = full(weight, None)
    with qframework.frozen(layer):
        before = layer.quant_weight().value.clone()
        change(layer)
        after, inside = layer.quant_weight().value, layer(x)
        assert not torch.equal(after, before)
    assert torch.equal(inside, without_memory(layer, x))


@torch.no_grad()
@pytest.mark.parametrize("quantizer", [Int32Bias, Int8BiasPerTensorFloatInternalScaling])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.bias.add_(1),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(3))),
        lambda layer: setattr(layer.bias, "data", torch.ones(3)),
            vector,
        loaded,
        lambda layer: layer.input_quant.tensor_quant.scaling_impl.value.mul_(3),
        lambda layer: layer.weight.mul_(3),
    ],
    ids=["in place", "assigned", "data assigned", "vector", "loaded", "input", "weight"],
)
def test_what_changes_a_bias_thaws_it(quantizer, change) -> None:
    layer, x = full(bias=quantizer)
    with qframework.frozen(layer):
        before = layer(x)
        change(layer)
        inside = layer(x)
        assert not torch.equal(inside, before)
    assert torch.equal(inside, without_memory(layer, x))


def value_of(layer: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    scaling = layer.act_quant.tensor_quant.scaling_impl
    return scaling, scaling.value


def other_activation(layer: nn.Module) -> None:
    layer.act_quant.activation_impl = nn.Tanh()


SCALES = {
    "in place": lambda layer: value_of(layer)[1].mul_(2),
    "assigned": lambda layer: setattr(value_of(layer)[0], "value", nn.Parameter(torch.tensor(9.0))),
    "data assigned": lambda layer: setattr(value_of(layer)[1], "data", torch.tensor(9.0)),
    "loaded": lambda layer: layer.load_state_dict(
        {k: v * 2 if k.endswith("value") else v for k, v in layer.state_dict().items()}
    ),
    "scaling": lambda layer: setattr(
        layer.act_quant.tensor_quant, "scaling_impl", value_of(trained(QuantReLU, 3.0))[0]
    ),
    "quantizer": lambda layer: setattr(
        layer.act_quant, "tensor_quant", trained(QuantReLU, 3.0).act_quant.tensor_quant
    ),
    "activation": other_activation,
    "converted": lambda layer: layer.double(),
}


def trained(kind, largest: float = 1.0) -> nn.Module:
    layer = kind(collect_stats_steps=1)
    for _ in range(2):
        layer(torch.linspace(0, largest, 64))
    return layer.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [QuantReLU, QuantIdentity, QuantSigmoid])
@pytest.mark.parametrize("change", SCALES)
def test_what_changes_the_scale_of_an_activation_thaws_it(kind, change) -> None:
    layer, x = trained(kind), torch.linspace(-2, 2, 999)
    with qframework.frozen(layer):
        before = layer.act_quant(x)
        SCALES[change](layer)
        inside = layer.act_quant(x)
        if change == "converted":
            assert inside.scale.dtype == torch.float64
        else:
            assert not torch.equal(inside.value, before.value)
    qframework.unfreeze(layer)
    after = layer.act_quant(x)
    assert torch.equal(inside.value, after.value) and torch.equal(inside.scale, after.scale)


@torch.no_grad()
@pytest.mark.parametrize("part", ["value", "scale", "zero_point"])
@pytest.mark.parametrize("weight", [Int8WeightPerChannelFloat, ShiftedUint8WeightPerTensorFloat])
def test_a_result_that_is_written_to_is_made_anew(part, weight) -> None:
    layer, x = full(weight)
    before = layer(x)
    with qframework.frozen(layer):
        good = getattr(layer.quant_weight(), part).clone()
        getattr(layer.quant_weight(), part).add_(1)
        assert torch.equal(getattr(layer.quant_weight(), part), good)
        assert torch.equal(layer(x), before)


@torch.no_grad()
def test_a_change_thaws_only_what_it_concerns() -> None:
    layer, x = full()
    with qframework.frozen(layer):
        layer(x)
        layer.bias.add_(1)
        layer(x)
        assert layer.weight_quant.is_frozen and layer.input_quant.is_frozen


@torch.no_grad()
@pytest.mark.parametrize("how", ["data", "numpy", "fused"])
def test_what_leaves_no_trace_is_seen_as_soon_as_the_model_is_thawed(how) -> None:
    layer, x = full()
    with qframework.frozen(layer):
        before = layer(x)
        if how == "data":
            layer.weight.data.mul_(2)
        elif how == "numpy":
            layer.weight.detach().numpy()[:] *= 2
        else:
            layer.weight.grad = torch.ones_like(layer.weight)
            torch.optim.Adam([layer.weight], lr=0.5, fused=True).step()
        assert torch.equal(layer(x), before)  # as documented: it leaves no trace
    assert not torch.equal(layer(x), before)


@torch.no_grad()
def test_a_function_called_with_other_parameters_is_not_answered_from_memory() -> None:
    layer, x = full(WEIGHTS[4])
    keys = ["weight", "bias", "weight_quant.tensor_quant.scaling_impl.value"]
    keys.append("input_quant.tensor_quant.scaling_impl.value")
    with qframework.frozen(layer):
        plain = layer(x)
        for key in keys:
            other = {key: layer.state_dict()[key] * 3}
            found = torch.func.functional_call(layer, other, (x,))
            assert not torch.equal(found, plain), key
            assert torch.equal(layer(x), plain)


# ------------------------------------------------------------ hooks


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("part", ["weight_quant", "input_quant", "bias_quant", "output_quant"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_the_proxies_of_a_layer_see_each_call(part, before, frozen) -> None:
    layer, x = full()
    if not before:
        layer(x)
    seen = []
    handle = getattr(layer, part).register_forward_hook(lambda *_: seen.append(1))
    if frozen:
        qframework.freeze(layer)
    layer(x), layer(x)
    assert len(seen) == 2
    handle.remove()
    layer(x)
    assert len(seen) == 2


@torch.no_grad()
@pytest.mark.parametrize("part", ["weight_quant", "input_quant", "output_quant"])
@pytest.mark.parametrize("inner", ["", "scaling_impl", "int_quant", "msb_clamp_bit_width_impl"])
def test_hooks_on_parts_that_come_while_a_model_is_frozen_see_each_call(part, inner) -> None:
    layer, x = full()
    with qframework.frozen(layer):
        before, seen = layer(x), []
        module = getattr(layer, part).tensor_quant
        module = getattr(module, inner) if inner else module
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(layer(x), before) and torch.equal(layer(x), before)
        calls = len(seen)
        assert calls >= 2
        handle.remove()
        layer(x)
        assert len(seen) == calls


def test_an_idle_proxy_is_left_out_but_its_hooks_are_heard() -> None:
    layer = QuantLinear(4, 3)
    assert layer.input_quant.is_idle
    seen = []
    layer.input_quant.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.ones(1, 4))
    assert seen == [1]
    assert sum(1 for _ in layer.modules()) <= 12


# ------------------------------------------------------------ sharing


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["stats", "parameter_from_stats"])
@pytest.mark.parametrize("how", ["in place", "assigned", "data assigned", "pruned"])
def test_layers_that_share_a_quantizer_have_a_result_each_and_see_each_others_changes(
    scaling, how
) -> None:
    torch.manual_seed(0)
    first = QuantLinear(4, 3, weight_scaling_impl_type=scaling)
    second = QuantLinear(4, 3, weight_quant=first.weight_quant)
    model = nn.ModuleList([first, second]).eval()
    with qframework.frozen(model):
        a, b = first.quant_weight(), second.quant_weight()
        assert first.quant_weight() is a and second.quant_weight() is b
        assert torch.equal(a.scale, b.scale)
        if how == "in place":
            first.weight.mul_(7)
        elif how == "assigned":
            first.weight = nn.Parameter(first.weight * 7)
        elif how == "data assigned":
            first.weight.data = first.weight * 7
        else:
            second.weight.mul_(0.1)
            qframework.unfreeze(model), qframework.freeze(model)
            b = second.quant_weight()
            prune.random_unstructured(first, "weight", 1.0)
        inside = second.quant_weight()
        assert not torch.equal(inside.scale, b.scale)
    assert torch.equal(inside.value, second.quant_weight().value)


@torch.no_grad()
def test_a_pruned_partner_that_is_frozen_sees_a_write_to_what_it_is_computed_from() -> None:
    first = QuantLinear(4, 3)
    second = QuantLinear(4, 3, weight_quant=first.weight_quant)
    prune.l1_unstructured(first, "weight", 0.5)
    model = nn.ModuleList([first, second]).eval()
    with qframework.frozen(model):
        before = second.quant_weight()
        first.weight_orig.mul_(9)
        first(torch.ones(1, 4))  # pruning computes the weight in a hook
        assert not torch.equal(second.quant_weight().scale, before.scale)


@torch.no_grad()
def test_a_shared_activation_quantizer_keeps_the_function_of_each_layer() -> None:
    first = trained(QuantIdentity)
    second = QuantReLU(act_quant=first.act_quant).eval()
    x = torch.linspace(-1, 1, 9)
    expected = first(x), second(x)
    with qframework.frozen(nn.ModuleList([first, second])):
        assert torch.equal(first(x), expected[0]) and torch.equal(second(x), expected[1])


# ------------------------------------------------------------ copies


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "averaged"])
def test_copies_of_a_frozen_model_are_not_frozen_and_follow_their_own_weights(how) -> None:
    layer, x = full()
    with qframework.frozen(layer):
        before = layer(x)
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        elif how == "save":
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = torch.optim.swa_utils.AveragedModel(layer).module
        assert not any(p.is_frozen for p in proxies(other))
        assert torch.equal(other(x), before)
        other.weight.data.mul_(2)
        assert not torch.equal(other(x), before)
        assert torch.equal(layer(x), before)
        assert layer.weight_quant.is_frozen


@torch.no_grad()
def test_a_pickle_of_a_frozen_model_is_small() -> None:
    layer = QuantLinear(64, 64).eval()
    plain = len(pickle.dumps(layer))
    with qframework.frozen(layer):
        assert len(pickle.dumps(layer)) <= plain + 100


# ------------------------------------------------------------ recurrent layers


@torch.no_grad()
def test_a_recurrent_layer_quantizes_its_weights_once_and_sees_what_thaws_them() -> None:
    torch.manual_seed(0)
    layer, x = QuantLSTM(4, 3, num_layers=2, bidirectional=True), torch.randn(5, 2, 4)
    with calibration_mode(layer):
        layer(x)
    layer.eval()
    before = layer(x)[0]
    own = [p for p in proxies(layer) if hasattr(p, "parameter_name")]
    with qframework.frozen(layer):
        assert torch.equal(layer(x)[0], before)
        assert torch.equal(layer(x)[0], before)
        assert all(p.is_frozen for p in own)
        gate = layer.layers[1][0].parameters_of("input")
        gate.hidden_weight.weight.mul_(3)
        inside = layer(x)[0]
        assert not torch.equal(inside, before)
        gate.bias.add_(1)
        layer.io_quant.tensor_quant.scaling_impl.value.mul_(1.5)
        inside = layer(x)[0]
    assert torch.equal(inside, layer(x)[0])


# ------------------------------------------------------------ compilers and transforms


def compiled(layer: nn.Module) -> tuple:
    graphs = []

    def backend(graph, operands):
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    return torch.compile(layer, backend=backend, fullgraph=True), graphs


@torch.no_grad()
@pytest.mark.parametrize("weight", WEIGHTS[:4], ids=NAMES[:4])
def test_graphs_of_a_frozen_model_take_the_quantized_weight_as_it_is(weight) -> None:
    torch._dynamo.reset()
    layer, x = QuantLinear(4, 3, weight_quant=weight).eval(), torch.randn(2, 4)
    run, graphs = compiled(layer)
    with qframework.frozen(layer):
        assert torch.equal(run(x), layer(x))
        assert len(graphs) == 1 and len(graphs[0]) == 1  # the product
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [assigned, loaded, another_mode, another_quantizer, qframework.unfreeze]
)
def test_graphs_of_a_frozen_model_follow_what_thaws_it(change) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = QuantLinear(4, 3).eval(), torch.randn(2, 4)
    run, _ = compiled(layer)
    with qframework.frozen(layer):
        before = run(x)
        change(layer)
        if change is qframework.unfreeze:
            layer.weight.data.mul_(2)
        inside = run(x)
        assert not torch.equal(inside, before)
        torch.testing.assert_close(inside, layer(x))
    torch._dynamo.reset()


@torch.no_grad()
def test_transforms_and_tracers_inside_leave_nothing_behind() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x = full()
    before = layer(x)
    ways = {
        "vmap": lambda: torch.vmap(layer)(torch.stack([x, x]))[0],
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,))[0],
        "make_fx": lambda: make_fx(layer)(x)(x),
        "export": lambda: torch.export.export(layer, (x,), strict=False).module()(x),
    }
    for name, way in ways.items():
        with qframework.frozen(layer):
            torch.testing.assert_close(way(), before)
            assert torch.equal(layer(x), before), name
            for proxy in proxies(layer):
                for entry in proxy._memory.entries:
                    if hasattr(entry.result, "value"):
                        assert type(entry.result.value) is torch.Tensor
                        assert not torch._C._functorch.is_functorch_wrapped_tensor(
                            entry.result.value
                        )


def test_a_model_may_be_frozen_within_a_transform() -> None:
    layer, x = full()
    before = layer(x)

    def frozen_inside(given: torch.Tensor) -> torch.Tensor:
        with qframework.frozen(layer):
            return layer(given)

    torch.testing.assert_close(torch.vmap(frozen_inside)(torch.stack([x, x]))[1], before)
    assert torch.equal(layer(x), before)
