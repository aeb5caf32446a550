"""The first layer and tensor that go wrong."""

import pytest
import torch
from digits import batches, loss, networks, pairs
from torch import nn

from qframework.inspect import AnomalyError, detect_anomaly


def test_a_healthy_model_passes_and_keeps_its_results() -> None:
    _, model = networks()
    expected = model(batches()[0])
    with detect_anomaly(model) as watch:
        assert torch.equal(model(batches()[0]), expected)
        loss(model, pairs()[0]).backward()
    assert watch.first is None and not watch.anomalies
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "infinite")])
def test_the_parameter_is_named(value, kind) -> None:
    _, model = networks()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = value
    with pytest.raises(AnomalyError, match="2, weight") as caught, detect_anomaly(model):
        model(batches()[0])
    assert caught.value.anomaly.kind == kind


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.log(self.first(x) * 0 - 1))


def test_what_a_function_between_layers_made_is_the_input_of_the_next() -> None:
    model = Hidden()
    with pytest.raises(AnomalyError, match="second, input"), detect_anomaly(model):
        model(torch.randn(2, 4))


def test_saturation_and_the_loss_of_all_codes_are_told() -> None:
    _, model = networks()
    with detect_anomaly(model, stop=False) as watch:
        model(batches()[0] * 1000)
    assert (watch.first.layer, watch.first.tensor, watch.first.kind) == ("0", "input", "saturated")
    with pytest.raises(AnomalyError, match="one code"), detect_anomaly(model):
        model(batches()[0] / 1e6)
    with pytest.raises(ValueError, match="between 0 and 1"), detect_anomaly(model, saturation=2):
        pass


def test_a_gradient_that_is_nan_is_named() -> None:
    _, model = networks()
    with pytest.raises(AnomalyError, match="gradient of"), detect_anomaly(model):
        (model(batches()[0]).sum() * float("nan")).backward()
