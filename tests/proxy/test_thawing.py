"""Whatever changes a frozen quantizer thaws it; hooks are heard, partners of a shared quantizer seen."""

import pytest
import torch
from frozen_layers import (
    NAMES,
    WEIGHTS,
    a_hook,
    a_method_assigned,
    another_mode,
    another_part,
    another_proxy,
    another_quantizer,
    assigned,
    built_anew,
    converted,
    data_assigned,
    full,
    loaded,
    loaded_by_assignment,
    optimizer_step,
    parametrized,
    pruned,
    swapped,
    trained,
    vector,
    view_written,
)
from torch import nn
from torch.nn.utils import prune

import qframework
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU, QuantSigmoid
from qframework.quantizers import (
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int32Bias,
    ShiftedUint8WeightPerTensorFloat,
)

# ------------------------------------------------------------ what thaws


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
    swapped,
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


def a_method_of_its_class(scaling: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    method = type(scaling).forward
    monkeypatch.setattr(type(scaling), "forward", lambda self, *args: method(self, *args) * 2)


def an_override_in_between(scaling: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        return nn.Module.__call__(self, *args) * 2

    monkeypatch.setattr(type(scaling), "__call__", doubled, raising=False)


def another_class(scaling: nn.Module, _: object) -> None:
    kind = type(scaling)
    methods = {"forward": lambda self, *args: kind.forward(self, *args) * 2}
    scaling.__class__ = type("Own", (kind,), methods)


def another_dictionary(scaling: nn.Module, _: object) -> None:
    method = scaling.forward
    scaling.__dict__ = {**vars(scaling), "forward": lambda *args: method(*args) * 2}


def a_hook_on_all_modules(scaling: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(module: nn.Module, args: object, result: torch.Tensor) -> torch.Tensor | None:
        return result * 2 if module is scaling else None

    monkeypatch.setitem(nn.modules.module._global_forward_hooks, 1, hook)


CODE = [
    a_method_of_its_class,
    an_override_in_between,
    another_class,
    another_dictionary,
    a_hook_on_all_modules,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CODE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("of", ["weight_quant", "input_quant"])
@pytest.mark.parametrize("frozen", [True, False])
def test_other_code_of_a_part_counts_at_the_next_call(frozen, of, change, monkeypatch) -> None:
    layer, x = full(WEIGHTS[0], None)
    if frozen:
        qframework.freeze(layer)
    before = layer(x)
    change(getattr(layer, of).tensor_quant.scaling_impl, monkeypatch)
    after = layer(x)
    assert not torch.equal(after, before)
    with qframework.settings.use(kernels="reference"):
        assert torch.equal(after, without_memory(layer, x))


@torch.no_grad()
@pytest.mark.parametrize("of", ["weight_quant", "input_quant"])
def test_a_setting_of_a_part_thaws_it(of) -> None:
    layer, x = full(WEIGHTS[0], None)
    qframework.freeze(layer)
    before = layer(x)
    getattr(layer, of).tensor_quant.msb_clamp_bit_width_impl.bits = 3
    after = layer(x)
    assert not torch.equal(after, before) and torch.equal(after, without_memory(layer, x))


@torch.no_grad()
def test_what_a_compiler_notes_in_the_class_of_all_modules_thaws_nothing(monkeypatch) -> None:
    layer, x = full(WEIGHTS[0], None)
    qframework.freeze(layer)
    monkeypatch.setattr(nn.Module, "___a_note", False, raising=False)
    layer(x)
    assert layer.weight_quant.is_frozen


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
