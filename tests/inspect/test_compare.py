"""Comparison with the float model, and layers quantized one at a time."""

import pytest
import torch
from digits import batches, loss, networks, pairs
from torch import nn

from qframework.graph import quantize_model
from qframework.inspect import compare, sensitivity
from qframework.layers import QuantLinear


def test_errors_are_those_of_the_outputs() -> None:
    model, quantized = networks()
    found = compare(model, quantized, batches())
    with torch.no_grad():
        f = torch.cat([model(x) for x in batches()]).double().flatten()
        q = torch.cat([quantized(x) for x in batches()]).double().flatten()
    sqnr = 10 * torch.log10(f.square().sum() / (f - q).square().sum())
    assert found.output.sqnr == pytest.approx(float(sqnr), abs=1e-6)
    assert found.output.cosine == pytest.approx(float(nn.functional.cosine_similarity(f, q, 0)))
    assert [x.layer for x in found.layers] == ["0", "1", "2", "3", "4", "5"]
    assert found["5"].sqnr == found.output.sqnr and found["4"].sqnr == found["3"].sqnr
    assert found["4"].added_noise == 0


def test_the_layer_that_loses_most_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    layers = [QuantLinear(8, 8, weight_bit_width=b) for b in (8, 2, 8)]
    for mine, theirs in zip(layers, model, strict=True):
        mine.load_state_dict(theirs.state_dict())
    found = compare(model, nn.Sequential(*layers), [torch.randn(50, 8)])
    assert found.worst.layer == "1"
    assert "loses most" in str(found).splitlines()[3]


def test_equal_models_have_no_noise_and_names_must_match() -> None:
    model, quantized = networks()
    same = compare(model, model, batches()[:1])
    assert same.output.sqnr == float("inf") and same.output.cosine == pytest.approx(1)
    with pytest.raises(ValueError, match="no layer of the same name"):
        compare(nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"a": nn.Linear(2, 2)}), [])
    with pytest.raises(KeyError, match="no layer '9'"):
        compare(model, quantized, batches()[:1])["9"]
    assert not any(m._forward_hooks for n in (model, quantized) for m in n.modules())


def test_each_layer_alone_changes_the_loss_as_by_hand() -> None:
    model, quantized = networks()
    found = sensitivity(quantized, pairs(), loss)
    with torch.no_grad():
        exact = sum(float(loss(model, p)) for p in pairs()) / 4
        every = sum(float(loss(quantized, p)) for p in pairs()) / 4
        relu = nn.Sequential(model[0], quantized[1], *model[2:])
        alone = sum(float(loss(relu, p)) for p in pairs()) / 4
    assert found.float_loss == pytest.approx(exact, rel=1e-6)
    assert found.quantized_loss == pytest.approx(every, rel=1e-6)
    by_name = {x.layer: x for x in found.layers}
    assert by_name["1"].loss == pytest.approx(alone, rel=1e-6)
    assert by_name["1"].change == pytest.approx(alone - exact, abs=1e-7)
    assert set(by_name) == {"0", "1", "2", "3", "5"}
    changes = [x.change for x in found.layers]
    assert changes == sorted(changes, reverse=True)
    assert not any(p.disable_quant for p in quantized.modules() if hasattr(p, "disable_quant"))


def test_without_a_loss_it_is_the_noise_of_the_output_and_two_bits_make_most() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(QuantLinear(8, 8, weight_bit_width=b) for b in (8, 2, 8))).eval()
    found = sensitivity(model, (torch.randn(20, 8) for _ in range(2)))
    assert found.float_loss == 0 and found.layers[0].layer == "1"
    assert found.to_csv().splitlines()[0] == "layer,tensors,loss,change"


def test_quantizers_are_on_again_after_an_error() -> None:
    _, model = networks()
    with pytest.raises(TypeError, match="one number"):
        sensitivity(model, pairs(), lambda m, b: m(b[0]))
    assert not any(p.disable_quant for p in model.modules() if hasattr(p, "disable_quant"))


def test_bars_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    model, quantized = networks()
    axes = compare(model, quantized, batches()[:1]).plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2", "3", "4", "5"]
    assert len(sensitivity(quantized, batches()[:1]).plot().patches) == 5


def test_a_folded_batch_norm_is_part_of_the_layer_in_front() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model[1].running_mean.fill_(5)
    model[1].weight.data.fill_(20)
    quantized, _ = quantize_model(model.eval(), act_quant=None, fold_batch_norm=True)
    found = compare(model, quantized, batches()[:2])
    assert [x.layer for x in found.layers] == ["0", "2", "3"]
    assert found.only_float == []
    assert found["0"].type == "QuantConv2d" and found["0"].sqnr > 30
    assert found["0"].sqnr == pytest.approx(found["2"].input_sqnr)
