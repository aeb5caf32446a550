import copy

import pytest
import torch
from torch import nn

from qframework.graph import calibration_mode
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatBatchQuant1d,
    Int32Bias,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(return_quant_tensor=True),
        QuantLinear(6, 5, bias_quant=Int32Bias, weight_bit_width=2),
        nn.Dropout(0.5),
        QuantReLU(return_quant_tensor=True),
        QuantLinear(5, 4, weight_bit_width=2),
    ).eval()


def test_statistics_are_plain_means_of_the_float_forward() -> None:
    model = net()
    batches = [torch.randn(8, 6) for _ in range(5)]
    floats = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    for mine, theirs in ((1, 0), (4, 2)):
        floats[theirs].weight, floats[theirs].bias = model[mine].weight, model[mine].bias
    with torch.no_grad(), calibration_mode(model) as inside:
        assert inside is model
        for batch in batches:
            assert torch.equal(model(batch), floats(batch))
        assert not model.training
        assert not model[2].training
    expected = torch.stack([b.abs().max() for b in batches]).mean() / 128
    assert model[0].act_quant.scale().item() == pytest.approx(expected.item())
    hidden = torch.stack([floats[1](floats[0](b)).max() for b in batches]).mean() / 255
    assert model[3].act_quant.scale().item() == pytest.approx(hidden.item())
    assert model[0].return_quant_tensor
    assert not any(m.training for m in model.modules())
    assert model[0].act_quant.tensor_quant.scaling_impl.collect_stats_steps == 300
    assert model[0].act_quant.tensor_quant.scaling_impl.momentum == 0.1
    assert model(batches[0]).shape == (8, 4)
    assert not torch.equal(model(batches[0]), floats(batches[0]))


def test_calibrating_again_starts_anew() -> None:
    model = net()
    for top in (1.0, 8.0):
        with torch.no_grad(), calibration_mode(model):
            model(torch.full((2, 6), top))
        assert model[0].act_quant.scale().item() == pytest.approx(top / 128)


def test_disabled_it_does_nothing() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with calibration_mode(model, enabled=False):
        pass
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_without_data_the_scale_stays_and_a_warning_names_the_quantizers() -> None:
    model = net()
    with torch.no_grad(), calibration_mode(model):
        model(torch.ones(2, 6))
    kept = model[0].act_quant.scale().item()
    with (
        pytest.warns(UserWarning, match=r"no data reached 0\.act_quant, 3\.act_quant"),
        calibration_mode(model),
    ):
        pass
    assert model[0].act_quant.scale().item() == kept


def test_an_exception_leaves_everything_as_it_was() -> None:
    model = net().train()
    model(torch.randn(3, 6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), calibration_mode(model):
        model(torch.ones(2, 6) * 100)
        raise KeyError
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[0].return_quant_tensor
    assert not model[1].weight_quant.disable_quant
    assert not model[0].act_quant.observer_only
    assert all(m.training for m in model.modules())


def test_running_statistics_and_output_quantizers_are_calibrated_too() -> None:
    model = nn.Sequential(
        QuantIdentity(act_quant=Int8ActPerTensorFloatBatchQuant1d),
        QuantLinear(3, 2, output_quant=Int8ActPerTensorFloat, return_quant_tensor=True),
    ).eval()
    with torch.no_grad(), calibration_mode(model):
        model(torch.ones(2, 4, 3))
        model(torch.ones(2, 4, 3) * 3)
    assert model[0].act_quant.scale().item() == pytest.approx(2 / 128)
    assert model(torch.ones(2, 4, 3)).is_valid
