"""What rules mean, what a failure leaves, and what comes along with a module."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qframework.graph import Rule, quantize_model
from qframework.layers import QuantGELU, QuantLayerNorm, QuantLinear
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat


def test_rules_win_by_name_pattern_and_type_the_last_one_first() -> None:
    net = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Identity(),
            nn.ReLU(),
            Holder(),
            nn.Identity(),
            nn.Flatten(),
            nn.Linear(36, 10),
        ),
        nn.GELU(),
        nn.LayerNorm(10),
        nn.Linear(10, 3),
    )
    model, report = quantize_model(
        net,
        weight_bit_width=4,
        rules=[
            Rule("0.*", weight_quant=Int8WeightPerChannelFloat),
            Rule(re.compile(r"0\.[06]"), weight_bit_width=6),
            Rule(nn.LayerNorm),
            Rule((nn.GELU, nn.ReLU), bit_width=3),
            Rule("3", keep_float=True),
        ],
    )
    assert (
        model[0][0].weight_quant.bit_width() == 6 and model[0][3].conv.weight_quant.bit_width() == 4
    )
    assert model[0][0].weight_quant.scale().numel() == 4
    assert isinstance(model[1], QuantGELU) and isinstance(model[2], QuantLayerNorm)
    assert model[1].act_quant.bit_width() == 3 and model[0][2].act_quant.bit_width() == 3
    assert type(model[3]) is nn.Linear
    assert [e.name for e in report.kept if e.reason == "as a rule says"] == ["3"]


def linears(count: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def test_a_rule_for_a_container_holds_within_it() -> None:
    model, _ = quantize_model(
        nn.Sequential(linears(), nn.Linear(4, 4)), rules=[Rule("0", weight_bit_width=3)]
    )
    assert [model[0][i].weight_quant.bit_width() for i in (0, 1)] == [3, 3]
    assert model[1].weight_quant.bit_width() == 8


def test_a_later_rule_may_quantize_within_a_container_that_is_kept() -> None:
    net = nn.Sequential(linears())
    rules = [Rule("0", keep_float=True), Rule("0.1", weight_bit_width=3)]
    model, _ = quantize_model(net, rules=rules)
    assert type(model[0][0]) is nn.Linear and model[0][1].weight_quant.bit_width() == 3
    with pytest.raises(TypeError, match="has no effect"):
        quantize_model(net, rules=rules[::-1])


def test_a_rule_finds_a_shared_module_by_any_of_its_names() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    model, _ = quantize_model(net, rules=[Rule("b.0", weight_bit_width=3)])
    assert model["a"] is model["b"][0] and model["a"].weight_quant.bit_width() == 3
    model, _ = quantize_model(net, rules=[Rule("b", keep_float=True)])
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


def test_keywords_for_all_do_not_bring_back_what_a_rule_takes_away() -> None:
    model, _ = quantize_model(
        nn.Sequential(*linears(), nn.ReLU()),
        weight_bit_width=4,
        input_quant=Int8ActPerTensorFloat,
        input_bit_width=5,
        act_bit_width=3,
        rules=[Rule("0", weight_quant=None, input_quant=None), Rule("2", act_quant=None)],
    )
    assert not model[0].weight_quant.is_quant_enabled and not model[0].input_quant.is_quant_enabled
    assert model[1].weight_quant.bit_width() == 4 and model[1].input_quant.bit_width() == 5
    assert not model[2].act_quant.is_quant_enabled


def test_a_keyword_without_effect_is_refused() -> None:
    with pytest.raises(TypeError, match=r"act_bit_width of Rule.* has no effect"):
        quantize_model(linears(), rules=[Rule("*", act_bit_width=3)])


@pytest.mark.parametrize(
    "options", [{"rules": [Rule("1", nonsense=1)]}, {"strict": True}, {"rules": [Rule("*", act_bit_width=3)]}]
)  # fmt: skip
def test_an_error_leaves_a_model_as_it_was_even_in_place(options) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Mish())
    modules = list(net)
    with pytest.raises((TypeError, ValueError)):
        quantize_model(net, inplace=True, **options)
    assert list(net) == modules


@pytest.mark.parametrize("reparametrize", [lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm])  # fmt: skip
def test_weights_that_are_computed_at_each_call_are_told(reparametrize) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    reparametrize(net[0])
    with pytest.warns(UserWarning, match="left layers in floats"):
        model, report = quantize_model(net)
    assert [e.name for e in report.unsupported] == ["0"] and not report.replaced
    x = torch.randn(2, 4)
    assert torch.equal(model(x), net(x))


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"proj_size": 2}])
def test_recurrent_layers_of_another_make_are_told(options) -> None:
    with pytest.warns(UserWarning, match="no quantized form"):
        model, report = quantize_model(nn.Sequential(nn.LSTM(4, 4, 2, **options)))
    assert type(model[0]) is nn.LSTM and [e.name for e in report.unsupported] == ["0"]


def test_hooks_of_all_kinds_come_along_and_are_the_new_modules_own() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    seen: list[str] = []
    net[0].register_forward_pre_hook(lambda m, a, k: seen.append("before"), with_kwargs=True)
    net[0].register_forward_hook(lambda m, a, k, o: seen.append("after"), with_kwargs=True)
    net[0].register_full_backward_hook(lambda m, a, b: seen.append("back"))
    model, _ = quantize_model(net)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "back"]
    model.register_forward_hook(lambda m, a, o: seen.append("new"))
    model[0].register_forward_hook(lambda m, a, o: seen.append("new"))
    net(torch.randn(2, 4))
    assert "new" not in seen


def test_lists_of_modules_point_to_the_new_ones() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.steps = [self.a, {"then": self.b}]

        def forward(self, x):
            return self.steps[1]["then"](self.steps[0](x))

    net = Steps()
    model, _ = quantize_model(net)
    assert model.steps[0] is model.a and model.steps[1]["then"] is model.b
    assert net.steps[0] is net.a and isinstance(model.a, QuantLinear)
    quantize_model(net, inplace=True)
    assert net.steps[0] is net.a and isinstance(net.a, QuantLinear)


def test_quantizers_are_on_the_device_of_the_model() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).to("meta")
    model, _ = quantize_model(net)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model(torch.randn(2, 1, 8, 8, device="meta")).shape == (2, 3)


class Holder(nn.Module):
    """A layer within another module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.conv(x)
