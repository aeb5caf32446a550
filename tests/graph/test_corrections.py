import pytest
import torch
from torch import nn

from qframework.graph import bias_correction_mode, norm_correction_mode
from qframework.layers import QuantLinear
from tests.graph.ptq_network import batches, network, quantized


@pytest.mark.parametrize("shape", [(16, 6), (4, 5, 6), (2, 3, 5, 6)])
def test_channel_means_are_the_float_layer_s(shape) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(6, 4, weight_bit_width=3).eval()
    floating = nn.Linear(6, 4)
    floating.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")}
    )
    data = [torch.randn(shape) + 1, torch.randn(3, *shape[1:])]
    with torch.no_grad(), bias_correction_mode(layer):
        layer(input=data[0])
        layer(data[1])
    a, b = (torch.cat([m(x).flatten(0, -2) for x in data]).mean(0) for m in (layer, floating))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_raising_body_corrects_nothing() -> None:
    model = quantized(network())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), torch.no_grad(), bias_correction_mode(model):
        model(batches()[0])
        raise ZeroDivisionError
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in (model.a, model.f))


def test_a_missing_bias_is_made_or_left() -> None:
    for skip in (False, True):
        layer = QuantLinear(6, 4, bias=False, weight_bit_width=3).eval()
        with torch.no_grad(), bias_correction_mode(layer, skip_if_no_bias=skip):
            layer(torch.randn(9, 6))
        assert (layer.bias is None) == skip


def test_norms_are_estimated_anew_and_keep_their_settings() -> None:
    net = nn.Sequential(QuantLinear(4, 3, weight_bit_width=2), nn.BatchNorm1d(3)).eval()
    norm = net[1]
    with torch.no_grad(), norm_correction_mode(net):
        for _ in range(3):
            net(torch.randn(50, 4))
    assert not norm.training
    assert norm.momentum == 0.1
    assert int(norm.num_batches_tracked) == 0
    assert not torch.equal(norm.running_var, torch.ones(3))


def test_batches_with_nan_correct_nothing() -> None:
    layer = QuantLinear(4, 3, weight_bit_width=2).eval()
    other, x = QuantLinear(4, 3, weight_bit_width=2).eval(), torch.randn(16, 4)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad(), bias_correction_mode(other):
        other(x)
    net = nn.Sequential(layer, nn.BatchNorm1d(3)).eval()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="NaN or infinity were left out of 0"),
        bias_correction_mode(net),
    ):
        net(x)
        net(torch.full_like(x, float("nan")))
    assert torch.equal(layer.bias, other.bias)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="reached 1; they keep"),
        norm_correction_mode(net),
    ):
        net(torch.full_like(x, float("inf")))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
