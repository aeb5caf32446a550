"""Recipes from the float model to the report."""

import json

import pytest
import torch
from pydantic import ValidationError

from qframework.graph import Recipe, built_in_recipes, ptq, search_bit_widths, sensitivity
from qframework.graph.awq import awq
from qframework.graph.learned_round import learned_round
from qframework.graph.ptq_report import PTQReport
from qframework.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize
from qframework.graph.svd_quant import LayerwiseLowRankCorrection
from tests.graph.ptq_network import batches, network, quantized, sqnr


@pytest.mark.parametrize("name", ["w8a8", "w4a8-gptq", "w4a8-qronos", "w4a8-awq"])
def test_built_in_recipes_leave_the_float_model_alone(name) -> None:
    net = network()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    state = torch.random.get_rng_state()
    model, report = ptq(net, batches(), name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert report.sqnr == pytest.approx(sqnr(net, model), abs=0.01)
    assert {x.name.removesuffix(".layer") for x in report.layers} == {"a", "b", "t", "d", "f"}
    assert PTQReport.model_validate_json(report.to_json()) == report
    again, _ = ptq(net, batches(), name)
    x = batches()[0]
    assert torch.equal(again(x), model(x))


class Untraceable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward(self, x, scale=None):
        return {"y": self.b(torch.relu(self.a(x))) if x.abs().sum() > 0 else x}


X = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize(
    "data", [X, [(x, None) for x in X], [{"x": x} for x in X], lambda model: [model(x) for x in X]]
)
@pytest.mark.parametrize("name", ["w4a8-qronos", "w4a8-awq", "w8a8-smoothquant"])
def test_models_that_cannot_be_traced_and_batches_of_every_form(data, name) -> None:
    torch.manual_seed(0)
    net = Untraceable().eval()
    model, report = ptq(net, data, name)
    a, b = (m(X[0])["y"] for m in (net, model))
    assert (a - b).norm() < 0.2 * a.norm()
    assert {s.step for s in report.steps if s.changed} > {"quantize", "calibrate"}


def test_recipes_are_data() -> None:
    for recipe in built_in_recipes().values():
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    json.dumps(Recipe.model_json_schema())


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"steps": [{"step": "gptq"}, {"step": "quantize"}]}, "needs quantizers"),
        (
            {"steps": [{"step": "quantize"}, {"step": "gptq"}, {"step": "calibrate"}]},
            "can't come after 'gptq'",
        ),
        ({"steps": [{"step": "quantize"}, {"step": "gptq"}, {"step": "gpfq"}]}, "chosen already"),
        ({"steps": [{"step": "quantize"}, {"step": "equalize"}]}, "before 'quantize'"),
        ({"steps": [{"step": "quantize", "bits": 3}]}, "Extra inputs"),
        ({"steps": []}, "there has to be one 'quantize'"),
        (
            {
                "steps": [{"step": "quantize"}],
                "layers": {"keywords": {"weight_quant": "Int8Weigt"}},
            },
            "no predefined",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused_with_the_reason(recipe, reason) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(recipe)


def test_an_unknown_recipe_names_near_ones() -> None:
    with pytest.raises(ValueError, match="w4a8-gptq"):
        ptq(network(), batches(), "w4a8gptq")


def test_a_step_that_changes_nothing_warns() -> None:
    recipe = Recipe.model_validate(
        {
            "layers": {"keywords": {"act_quant": None}},
            "steps": [{"step": "merge_batch_norm"}, {"step": "quantize"}],
        }
    )
    with pytest.warns(UserWarning, match="merge_batch_norm changed nothing"):
        ptq(network(), batches(), recipe)


def test_interrupted_work_goes_on_with_the_same_bits(tmp_path, monkeypatch) -> None:
    from qframework.graph import solvers

    whole, _ = ptq(network(), batches(), "w4a8-gptq")
    real, calls = solvers.gptq, 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(solvers, "gptq", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ptq(network(), batches(), "w4a8-gptq", resume=tmp_path)
    model, _ = ptq(network(), batches(), "w4a8-gptq", resume=tmp_path)
    assert calls == 6  # two were kept
    x = batches()[0]
    assert torch.equal(model(x), whole(x))
    with pytest.raises(ValueError, match="another recipe or model"):
        ptq(network(), batches(), "w4a8-gpfq", resume=tmp_path)


@pytest.mark.parametrize("method", ["adaround", "autoround"])
def test_learned_rounding_of_strips_of_rows_is_that_of_the_rows_together(
    method, monkeypatch
) -> None:
    from qframework.graph import in_place
    from qframework.graph import learned_round as module

    whole, parts = quantized(network()), quantized(network())
    one = learned_round(whole, batches(), method=method, steps=20)
    monkeypatch.setattr(in_place, "_STRIP", 1)
    monkeypatch.setattr(module, "_ROWS", 3)
    other = learned_round(parts, batches(), method=method, steps=20)
    assert one.updated == other.updated
    for name, (nearest, now) in other.errors.items():
        assert nearest == pytest.approx(one.errors[name][0], rel=0.05)
        assert now <= nearest
        assert now == pytest.approx(one.errors[name][1], rel=0.2)


@pytest.mark.parametrize("method", ["adaround", "autoround"])
@pytest.mark.parametrize("blocks", [None, ["a", "b", "t", "d", "f"]])
@pytest.mark.parametrize("kind", ["Int8WeightPerChannelFloat", "NF4WeightPerChannelFloat"])
def test_learned_rounding_stays_within_a_step_and_never_ends_worse(method, blocks, kind) -> None:
    net = network()
    model = quantized(net, kind)
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "quant_weight")
    }
    scales = {n: model.get_submodule(n).quant_weight().scale.detach().clone() for n in weights}
    done = learned_round(model, batches(), blocks=blocks, method=method, steps=20)
    assert all(after <= before * (1 + 1e-4) for before, after in done.errors.values())
    if kind.startswith("Int8"):
        for name, weight in weights.items():
            value = model.get_submodule(name).quant_weight().value.detach()
            assert float(((value - weight) / scales[name]).abs().max()) <= 1 + 1e-4


def test_awq_never_raises_a_layer_s_error() -> None:
    done = awq(quantized(network()), batches())
    assert done.errors
    assert all(after <= before * (1 + 1e-5) for before, after in done.errors.values())


def test_a_low_rank_correction_s_error_falls_with_its_rank() -> None:
    errors = []
    for rank in (1, 2, 4):
        layer = torch.nn.Sequential(quantized(network()).f)
        _, error = LayerwiseLowRankCorrection(layer).apply(rank, iters=3)
        errors.append(float(error[0]))
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < 1e-5  # of full rank


def test_a_graph_is_quantized_with_shared_scales() -> None:
    net = network()
    model = quantize(preprocess_for_quantize(net))
    from qframework.graph import calibration_mode

    with torch.no_grad(), calibration_mode(model):
        for x in batches():
            model(x)
    assert sqnr(net, model) > 15
    assert type(net.a) is torch.nn.Conv2d


def test_an_unknown_name_is_refused_and_a_derived_class_is_told() -> None:
    class Own(torch.nn.Linear):
        pass

    net = torch.nn.Sequential(Own(4, 4), torch.nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"0 \(Own\)"):
        model = layerwise_quantize(net)
    assert hasattr(model[1], "weight_quant")
    with pytest.raises(ValueError, match="'2', which the model doesn't have"):
        layerwise_quantize(net, name_blacklist=["2"])


def test_quantizers_are_measured_alone_and_bits_meet_budgets(tmp_path) -> None:
    model = quantized(network(), "Int8WeightPerChannelFloatMSE")
    x = batches()[0]
    before = model(x).detach()
    report = sensitivity(model, batches())
    assert {(e.layer, e.tensor) for e in report.entries} >= {("a", "weight"), ("a", "input")}
    file = tmp_path / "found.json"
    budgets = [{"mean_bits": 4.0}, {"metric": 25.0}]
    found = search_bit_widths(
        model, batches(), budget=budgets, share=[["a", "b"]], keep_float=["f"], resume=file
    )
    assert torch.equal(model(x), before)
    assert found[0].cost <= 4
    assert found[1].value >= 25
    for one in found:
        assert one.bits["a"] == one.bits["b"]
        assert one.bits["f"] is None
    again = search_bit_widths(
        model, batches(), budget=budgets, share=[["a", "b"]], keep_float=["f"], resume=file
    )
    assert again == found
    with pytest.raises(ValueError, match="the least is"):
        search_bit_widths(model, batches(), budget={"mean_bits": 1})
