"""Statistics of quantized tensors, beside numbers from the tensors themselves."""

import json
import math

import pytest
import torch
from digits import batches, loss, networks, pairs
from torch import nn

from qframework.graph import calibration_mode
from qframework.inspect import collect_statistics, findings
from qframework.layers import QuantIdentity, QuantLinear
from qframework.quantizers import (
    Fp8e4m3OCPActPerTensorFloat,
    Int8ActPerTensorFloat,
    MXFloat4e2m1Weight,
    NF4WeightPerGroupFloat,
    ShiftedUint8ActPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
)


def calibrated(quantizer: type, data: torch.Tensor, **keywords: object) -> QuantIdentity:
    layer = QuantIdentity(act_quant=quantizer, return_quant_tensor=True, **keywords)
    with torch.no_grad(), calibration_mode(layer):
        layer(data)
    return layer.eval()


@pytest.mark.parametrize(
    "quantizer",
    [Int8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat, Fp8e4m3OCPActPerTensorFloat],
)
def test_numbers_are_those_of_the_tensors(quantizer) -> None:
    torch.manual_seed(0)
    layer = calibrated(quantizer, torch.randn(500))
    x = torch.cat([torch.randn(3000) * 2, torch.zeros(50)])
    q = layer(x).detach()
    found = collect_statistics(layer, [x])["(the model).act"]
    error = (x - q.value).double().square()
    assert found.mean_squared_error == pytest.approx(float(error.mean()), rel=1e-4)
    signal = float(x.double().square().sum())
    assert found.sqnr == pytest.approx(10 * math.log10(signal / float(error.sum())), abs=1e-3)
    assert found.zeros == pytest.approx(float((q.value == 0).float().mean()))
    assert found.codes_used == q.value.unique().numel()
    assert found.sampled == 3050 == sum(found.histogram.counts)
    assert found.scale == [pytest.approx(float(q.scale))]
    assert found.highest >= float(q.value.max()) - 1e-5
    assert found.lowest <= float(q.value.min()) + 1e-5
    assert found.clipped_high > 0 and found.clipped_low > 0
    above = float((x > found.highest).float().mean())
    assert 0 < found.clipped_high <= above
    if found.grid is not None:
        grid = torch.tensor(found.grid, dtype=torch.float64)
        off = (q.value.double()[:, None] - grid[None]).abs().min(1).values
        assert float(off.max()) < 1e-4


def test_a_range_that_holds_everything_clips_nothing() -> None:
    layer = QuantIdentity(scaling_impl_type="const", scaling_init=12.8, return_quant_tensor=True)
    found = collect_statistics(layer.eval(), [torch.tensor([-1.0, 1.0, 0.0, 20.0])]).tensors[0]
    assert found.clipped_low == 0 and found.clipped_high == 0.25 == found.saturated


@pytest.mark.parametrize(
    ("quantizer", "codes"),
    [(NF4WeightPerGroupFloat, 16), (MXFloat4e2m1Weight, 15), (SignedBinaryWeightPerTensorConst, 2)],
)
def test_every_format_has_its_codes(quantizer, codes) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(64, 64, weight_quant=quantizer, bias=False).eval()
    found = collect_statistics(layer, [torch.randn(2, 64)])["(the model).weight"]
    assert (found.codes, found.codes_used) == (codes, codes)
    assert found.sqnr > 0 and found.sampled == 4096


def test_the_model_is_as_it_was() -> None:
    _, model = networks()
    model.train()
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    collect_statistics(model, pairs(), loss)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[2].weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_are_gone_after_an_error() -> None:
    _, model = networks()
    with pytest.raises(RuntimeError):
        collect_statistics(model, [torch.randn(2, 3, 8, 8)])
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_of_learned_scales_are_recorded() -> None:
    _, model = networks()
    found = collect_statistics(model, pairs(), loss)
    assert found.batches == 4
    model.zero_grad()
    loss(model, pairs()[0]).backward()
    scale = next(p for n, p in model[1].act_quant.named_parameters() if "scaling_impl" in n)
    gradients = found["1.act"].scale_gradient
    assert gradients[0] == pytest.approx(float(scale.grad.norm()), rel=1e-4) and len(gradients) == 4
    assert found["0.weight"].scale_gradient is None


def test_large_tensors_are_sampled_alike_in_each_run() -> None:
    layer = calibrated(Int8ActPerTensorFloat, torch.randn(500))
    x = torch.randn(100, 100)
    first, second = (collect_statistics(layer, [x], sample=500).tensors[0] for _ in range(2))
    assert first == second and first.sampled == 500


def test_exports_and_the_table() -> None:
    _, model = networks()
    found = collect_statistics(model, batches())
    lines = found.to_csv().splitlines()
    assert len(lines) == 1 + len(found.tensors) and lines[0].startswith("layer,tensor,quantizer")
    assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))
    assert "Int8WeightPerChannelFloat" in str(found)


def test_names_that_are_not_there_name_the_nearest() -> None:
    model = nn.Sequential()
    model.add_module("hidden", QuantLinear(4, 4))
    with pytest.raises(ValueError, match="Did you mean 'hidden'"):
        collect_statistics(model, [torch.randn(2, 4)], layers=["hiden"])
    found = collect_statistics(model, [torch.randn(2, 4)])
    with pytest.raises(KeyError, match=r"Did you mean 'hidden\.weight'"):
        found["hidden.wieght"]


def test_what_cannot_be_looked_at_is_refused() -> None:
    _, model = networks()
    with pytest.raises(ValueError, match="quantizes nothing"):
        collect_statistics(nn.Linear(2, 2), [torch.randn(2, 2)])
    with pytest.raises(TypeError, match="give a loss"):
        collect_statistics(model, pairs())
    with pytest.raises(ValueError, match="there are none"):
        collect_statistics(model, [])
    with pytest.raises(TypeError, match=r"give \[batch\]"):
        collect_statistics(model, batches()[0])
    with pytest.raises(TypeError, match="one number"):
        collect_statistics(model, pairs(), lambda m, b: m(b[0]))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: calibrated(Int8ActPerTensorFloat, torch.full((9,), 1e4)), "dead quantizer"),
        (lambda: calibrated(Int8ActPerTensorFloat, torch.full((9,), 0.5)), "saturation"),
        (lambda: calibrated(Int8ActPerTensorFloat, torch.full((9,), 100.0)), "unused codes"),
    ],
)
def test_findings_name_what_is_wrong(make, kind) -> None:
    model = make()
    torch.manual_seed(0)
    found = findings(model, collect_statistics(model, [torch.randn(8000)], sample=8000))
    assert [f.kind for f in found] == [kind] and found[0].remedy


def test_a_good_model_has_no_findings_and_a_float_layer_is_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(8000, 4)
    good = nn.Sequential(calibrated(Int8ActPerTensorFloat, x))
    assert findings(good, collect_statistics(good, [x], sample=8000)) == []
    mixed = nn.Sequential(*good, nn.Linear(4, 4))
    assert [(f.layer, f.kind) for f in findings(mixed, collect_statistics(mixed, [x]))] == [
        ("1", "float layer")
    ]


def test_evaluation_before_calibration_is_found() -> None:
    model = QuantIdentity().eval()
    with pytest.warns(UserWarning, match="has seen no data"):
        found = collect_statistics(model, [torch.randn(4)])
    assert [f.kind for f in findings(model, found)] == ["not calibrated"]


def test_an_input_that_is_read_past_its_quantizer_is_found() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 4)
    quantized = calibrated(Int8ActPerTensorFloat, x)
    good = nn.Sequential(quantized, QuantLinear(4, 4)).eval()
    past = nn.Sequential(quantized, nn.Softmax(-1), QuantLinear(4, 4)).eval()
    assert collect_statistics(good, [x]).float_inputs == []
    found = findings(past, collect_statistics(past, [x]))
    assert [(f.layer, f.kind) for f in found] == [("2", "float input")]
    weights_only = nn.Sequential(QuantLinear(4, 4)).eval()
    assert collect_statistics(weights_only, [x]).float_inputs == []
