"""What a frozen model keeps, for whom, and how long."""

import copy
import io
import pickle

import pytest
import torch
from frozen_layers import (
    NAMES,
    WEIGHTS,
    another_mode,
    another_quantizer,
    assigned,
    full,
    loaded,
    proxies,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qframework
from qframework.core.quant import RescalingIntQuant
from qframework.graph import calibration_mode
from qframework.kernels.plan import Plan
from qframework.layers import QuantLinear, QuantLSTM, QuantReLU
from qframework.quantizers import (
    Int8AccumulatorAwareWeightQuant,
    Int8BiasPerTensorFloatInternalScaling,
    Int8DynamicActPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)


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
        monkeypatch.setattr(Plan, "run", None)  # would fail if it were called
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
    layer, _ = full()
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
def test_calibration_leaves_nothing_frozen() -> None:
    layer = QuantLinear(4, 3, bias=False)
    with calibration_mode(layer):
        for _ in range(3):
            layer(torch.randn(2, 4))
    assert not layer.weight_quant.is_frozen


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


@torch.no_grad()
def test_modes_see_what_a_frozen_activation_computes() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    layer, x, names = QuantReLU().eval(), torch.randn(64, 64), []
    layer.act_quant.tensor_quant.scaling_impl.value.data.fill_(2.0)
    before = layer(x)
    with qframework.frozen(layer):
        assert torch.equal(layer(x), before)  # by a call that is laid out, from here on
        with Seen():
            inside = layer(x)
        assert torch.equal(inside, before) and any("round" in name for name in names)
        dual = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        assert torch.equal(dual[0], before)


def test_a_model_may_be_frozen_within_a_transform() -> None:
    layer, x = full()
    before = layer(x)

    def frozen_inside(given: torch.Tensor) -> torch.Tensor:
        with qframework.frozen(layer):
            return layer(given)

    torch.testing.assert_close(torch.vmap(frozen_inside)(torch.stack([x, x]))[1], before)
    assert torch.equal(layer(x), before)
