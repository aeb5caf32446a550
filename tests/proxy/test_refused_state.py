"""State dicts that can't be: refused by name, and nothing is changed. Models on the meta device."""

import copy

import pytest
import torch
from torch import nn

import qframework
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import ShiftedUint8ActPerTensorFloat

NAN, INF = float("nan"), float("inf")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantLinear(
            6,
            5,
            weight_scaling_impl_type="parameter_from_stats",
            weight_bit_width_impl_type="parameter",
        ),
        QuantReLU(collect_stats_steps=5),
        QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=1),
    )


def trained() -> nn.Sequential:
    model = net()
    for _ in range(3):
        model(torch.randn(8, 6))
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def is_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


WRONG = [
    ("0", "weight_quant.tensor_quant.scaling_impl.value", [NAN, INF, -0.1, 0.0]),
    ("0", "weight_quant.tensor_quant.msb_clamp_bit_width_impl.bit_width_offset", [NAN, 1e9, -1e9]),
    ("1", "act_quant.tensor_quant.scaling_impl.running_stats", [NAN, INF, -1.0]),
    ("1", "act_quant.tensor_quant.scaling_impl.collected_steps", [-7.0, NAN, 0.5]),
    ("1", "act_quant.tensor_quant.scaling_impl.used_batches", [-1.0, INF]),
    ("2", "act_quant.tensor_quant.scaling_impl.value", [NAN, INF, -1.0, 0.0]),
    ("2", "act_quant.tensor_quant.zero_point_impl.value", [NAN, INF]),
]


@pytest.mark.parametrize(
    ("layer", "key", "number"), [(layer, key, n) for layer, key, numbers in WRONG for n in numbers]
)
def test_numbers_that_cannot_be_are_refused_and_change_nothing(layer, key, number) -> None:
    model = trained()[int(layer)]
    before = snapshot(model)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in before.items()}
    state[key] = torch.full_like(before[key], number, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"{key}: got .*, allowed: "):
        model.load_state_dict(state)
    assert is_unchanged(model, before)


@pytest.mark.parametrize("broken", ["shape", "missing", "unexpected", "text"])
def test_all_of_a_model_is_loaded_or_nothing(broken) -> None:
    model = trained()
    before = snapshot(model)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in before.items()}
    last = list(state)[-1]
    if broken == "shape":
        state[last] = torch.ones(7)
    elif broken == "missing":
        del state[last]
    elif broken == "unexpected":
        state["other"] = torch.ones(())
    else:
        state[last] = "text"
    with pytest.raises(RuntimeError):
        qframework.load_state_dict(model, state)
    assert is_unchanged(model, before)
    model(torch.randn(8, 6))


def test_what_a_collection_of_zeros_has_saved_is_loaded() -> None:
    act = QuantReLU(collect_stats_steps=5)
    act(torch.zeros(3))
    QuantReLU(collect_stats_steps=5).load_state_dict(act.state_dict())


@pytest.mark.parametrize("scaling", ["stats", "parameter_from_stats"])
def test_a_model_on_meta_runs_with_assigned_tensors(scaling) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(
            QuantReLU(collect_stats_steps=1), QuantLinear(8, 8, weight_scaling_impl_type=scaling)
        )

    model, x = make(), torch.rand(4, 8)
    for _ in range(2):
        model(x)
    with torch.device("meta"):
        other = make()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(x), model.eval()(x))
    other.train()(x).sum().backward()


def test_a_scale_that_training_took_through_zero_is_saved_by_its_magnitude() -> None:
    model = trained()[0]
    with torch.no_grad():
        model.weight_quant.tensor_quant.scaling_impl.value.neg_()
    other = net()[0]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.quant_weight().value, model.quant_weight().value)
