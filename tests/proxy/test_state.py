"""Saving, loading, copying, moving; and scales that follow their weights."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qframework.inject import value
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
)


class Learned(Int8WeightPerTensorFloat):
    """A quantizer of a user's own file."""

    bit_width = 3
    scaling_impl_type = "parameter_from_stats"


def net() -> nn.Sequential:
    return nn.Sequential(
        QuantLinear(
            6,
            5,
            input_quant=ShiftedUint8ActPerTensorFloat,
            input_collect_stats_steps=2,
            weight_quant=Learned,
        ),
        QuantReLU(collect_stats_steps=2),
        QuantLinear(
            5,
            4,
            input_quant=Int8ActPerTensorFloat,
            input_collect_stats_steps=2,
            bias_quant=Int32Bias,
            weight_quant=Int8WeightPerTensorFloat.let(bit_width=4),
        ),
    )


def after(steps: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = net()
    for _ in range(steps):
        model(torch.randn(8, 6))
    return model


def save_and_load(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def load_state(model: nn.Module) -> nn.Module:
    other = net()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load, load_state]
)
def test_copies_give_the_very_same_outputs_and_go_on_alike(copied, steps) -> None:
    model = after(steps)
    other = copied(model)
    x = torch.randn(8, 6)
    assert torch.equal(model.eval()(x), other.eval()(x))
    model.train()
    other.train()
    for _ in range(3):
        assert torch.equal(model(x), other(x))
        x = x * 1.5


def test_keys_do_not_depend_on_what_has_run() -> None:
    assert list(after(0).state_dict()) == list(after(1).state_dict()) == list(after(4).state_dict())


def test_a_float_checkpoint_loads_strictly_and_learned_scales_start_from_it() -> None:
    floats = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model = after(4)
    kept = model[1].act_quant.scale().item()
    model.load_state_dict(floats.state_dict(), strict=True)
    assert model[0].weight_quant.scale().item() == pytest.approx(
        floats[0].weight.abs().max().item() / 3
    )
    assert model[1].act_quant.scale().item() == kept


def test_wrong_keys_are_still_reported() -> None:
    state = after(4).state_dict()
    state["0.weight_quant.tensor_quant.scaling_impl.wrong"] = torch.ones(())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scaling_impl\.wrong"):
        net().load_state_dict(state)
    state = after(4).state_dict()
    del state["1.act_quant.tensor_quant.scaling_impl.value"]
    with pytest.raises(RuntimeError, match=r"Missing key.*scaling_impl\.value"):
        net().load_state_dict(state)


def test_loading_keeps_the_parameters_of_an_optimizer() -> None:
    model = net()
    before = {n: id(p) for n, p in model.named_parameters()}
    model.load_state_dict(after(4).state_dict())
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_a_state_dict_with_the_names_of_the_reference_loads() -> None:
    model = after(4)
    theirs = {}
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_stats", "collected_steps", "used_batches")):
            continue
        for proxy in ("input_quant.", "act_quant."):
            key = key.replace(proxy + "tensor", proxy + "fused_activation_quant_proxy.tensor")
        theirs[key] = tensor
    theirs["0.input_quant.zero_hw_sentinel"] = torch.zeros(())
    other = net()
    other.load_state_dict(theirs, strict=True)
    x = torch.randn(8, 6)
    assert torch.equal(model.eval()(x), other.eval()(x))


def scale_of(layer: nn.Module) -> float:
    return layer.weight_quant.scale().item() * 3


def top_of(layer: nn.Module) -> float:
    return layer.weight.abs().max().item()


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_scale_that_was_never_trained_follows_its_weight(copied) -> None:
    layer = QuantLinear(6, 5, weight_quant=Learned)
    layer(torch.randn(2, 6))
    layer = copied(layer)
    with torch.no_grad():
        layer.weight.mul_(5)
    assert scale_of(layer) == pytest.approx(top_of(layer))
    layer.weight.data *= 100
    assert scale_of(layer) == pytest.approx(top_of(layer))
    nn.init.normal_(layer.weight, std=3)
    assert scale_of(layer) == pytest.approx(top_of(layer))
    layer.weight = nn.Parameter(torch.full((5, 6), 7.0))
    assert scale_of(layer) == pytest.approx(7)
    layer.reset_parameters()
    assert scale_of(layer) == pytest.approx(top_of(layer))


def test_following_does_not_disturb_a_backward_pass() -> None:
    layer = QuantLinear(6, 5, weight_quant=Learned, weight_restrict_scaling_type="power_of_two")
    loss = layer(torch.randn(2, 6)).sum() + layer(torch.randn(2, 6)).sum()
    loss.backward()
    assert layer.weight_quant.tensor_quant.scaling_impl.value.grad is not None


def test_standing_in_for_parameters_does_not_change_them() -> None:
    layer = QuantLinear(6, 5, weight_quant=Learned)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    others = {n: p.detach() * 2 for n, p in layer.named_parameters()}
    out = torch.func.functional_call(layer, others, (torch.randn(2, 6),))
    assert out.shape == (2, 5)
    assert all(torch.equal(before[n], p) for n, p in layer.named_parameters())
    layer.weight.data.mul_(3)
    assert scale_of(layer) == pytest.approx(top_of(layer))


def test_a_frozen_scale_stays() -> None:
    layer = QuantLinear(6, 5, weight_quant=Learned)
    frozen = scale_of(layer)
    layer.weight_quant.tensor_quant.scaling_impl.value.requires_grad_(False)
    layer.weight.data.mul_(3)
    assert scale_of(layer) == frozen


def test_a_trained_scale_stays() -> None:
    layer = QuantLinear(6, 5, weight_quant=Learned)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 6)).pow(2).sum().backward()
    optimizer.step()
    trained = scale_of(layer)
    with torch.no_grad():
        layer.weight.mul_(5)
    assert scale_of(layer) == trained


def test_low_precision_keeps_wide_scales() -> None:
    model = after(4).bfloat16()
    assert model(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    assert model[0].weight_quant.scale().dtype == torch.float32
    assert model[1].act_quant.scale().dtype == torch.float32
    assert after(4).double()(torch.randn(3, 6).double()).dtype == torch.float64


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = net()
    for mode in (True, False):
        assert model.train(mode)(torch.empty(3, 6, device="meta")).shape == (3, 4)
    trained = after(4)
    model.to_empty(device="cpu").load_state_dict(trained.state_dict())
    x = torch.randn(8, 6)
    assert torch.equal(model.eval()(x), trained.eval()(x))


def test_evaluation_before_any_data_warns_once_by_name() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Sequential(QuantReLU(), QuantIdentity()))
    model.eval()
    with pytest.warns(
        UserWarning, match=r"head\.[01] \(Quant\w+\)\.act_quant.*calibration_mode"
    ) as caught:
        model(torch.randn(3))
        model(torch.randn(3))
    assert len(caught) == 2  # one for each layer
    model.train()(torch.randn(3))
    model.eval()(torch.randn(3))  # warnings are errors here


def test_reading_a_quantized_weight_does_not_need_a_forward() -> None:
    layer = QuantConv2d(2, 3, 3, weight_bit_width=4)
    q = layer.quant_weight()
    assert q.is_valid
    assert torch.equal(q.scale, layer.weight_quant.scale())
    assert layer.weight_quant.bit_width().item() == 4
    assert layer.weight_quant.zero_point().item() == 0


def test_disabling_switches_quantization_off_and_on() -> None:
    layer = QuantLinear(6, 5)
    x = torch.randn(2, 6)
    quantized = layer(x)
    layer.weight_quant.disable_quant = True
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.weight_quant.scale() is None
    layer.weight_quant.disable_quant = False
    assert torch.equal(layer(x), quantized)


def test_a_bias_that_is_assigned_later_is_quantized() -> None:
    layer = QuantLinear(
        6,
        5,
        bias=False,
        input_quant=Int8ActPerTensorFloat,
        bias_quant=Int32Bias,
        return_quant_tensor=True,
    )
    assert layer(torch.randn(2, 6)).bit_width.item() < 30
    layer.bias = nn.Parameter(torch.ones(5))
    assert layer(torch.randn(2, 6)).bit_width.item() == 33


def test_functions_of_the_layer_follow_a_loaded_checkpoint() -> None:
    class FromModule(Int8WeightPerTensorFloat):
        scaling_impl_type = "const"

        @value
        def scaling_init(module):
            return module.weight.detach().abs().max()

    layer = QuantLinear(6, 5, weight_quant=FromModule)
    layer.load_state_dict({"weight": torch.full((5, 6), 12.7), "bias": torch.zeros(5)})
    assert layer.weight_quant.scale().item() == pytest.approx(0.1)


def test_loading_leaves_a_quantizer_that_holds_nothing_alone() -> None:
    layer = QuantLinear(6, 5)
    before = layer.weight_quant.tensor_quant
    layer.load_state_dict(layer.state_dict())
    assert layer.weight_quant.tensor_quant is before


def test_parametrized_weights_are_quantized() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    layer = QuantLinear(6, 5)
    scale = layer.weight_quant.scale().item()
    nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    assert layer.quant_weight().scale.item() == pytest.approx(2 * scale)
    assert layer(torch.randn(2, 6)).shape == (2, 5)
