"""Batch norms folded into the layers in front of them: exact where they are, left alone where they wouldn't be."""

import pytest
import torch
from float_network import X, network
from torch import nn

from qframework.graph import Rule, quantize_model

OFF = {"weight_quant": None, "act_quant": None}


def test_folding_is_exact_and_leaves_the_float_model_alone() -> None:
    net = network()
    before, state = net(X), {k: v.clone() for k, v in net.state_dict().items()}
    model, report = quantize_model(net, weight_quant=None, act_quant=None, fold_batch_norm=True)
    assert isinstance(model[1], nn.Identity) and isinstance(model[3].norm, nn.Identity)
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(X), before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert sum("folded" in e.reason for e in report.entries) == 2


def test_a_model_that_cannot_be_traced_folds_within_its_sequences() -> None:
    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    net = Untraceable(*network())
    model, _ = quantize_model(net, weight_quant=None, act_quant=None, fold_batch_norm=True)
    assert isinstance(model[1], nn.Identity)
    assert isinstance(model[3].norm, nn.BatchNorm2d)  # not in a sequence
    torch.testing.assert_close(model(X), net(X), rtol=1e-5, atol=1e-6)


def test_a_norm_that_others_read_too_is_not_folded() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    net = Two().eval()
    model, _ = quantize_model(net, weight_quant=None, fold_batch_norm=True)
    assert isinstance(model.norm, nn.BatchNorm2d)
    torch.testing.assert_close(model(X), net(X))


def with_statistics(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return net.eval()


class Named(nn.Module):
    """A convolution and a norm that is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.calls = nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3), 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.count = self.count + 1
        return self.norm(self.conv(x))


def test_the_order_of_registration_does_not_matter_and_tracing_leaves_no_traces() -> None:
    net = with_statistics(Named())
    model, _ = quantize_model(net, fold_batch_norm=True, **OFF)
    assert net.calls == model.calls == 0 and type(net.count) is torch.Tensor and net.count == 0
    assert isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model(X), net(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_fold(transposed) -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2) if transposed else nn.Conv2d(4, 6, 3, groups=2)
    net = with_statistics(nn.Sequential(conv, nn.BatchNorm2d(6)))
    model, _ = quantize_model(net, fold_batch_norm=True, **OFF)
    assert isinstance(model[1], nn.Identity)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-6)


def kept_by_rule(net: nn.Module) -> dict:
    return {"rules": [Rule("1", keep_float=True)]}


def layer_kept_by_rule(net: nn.Module) -> dict:
    return {"rules": [Rule("0", keep_float=True)]}


def hook_on_layer(net: nn.Module) -> dict:
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    return {}


def hook_on_norm(net: nn.Module) -> dict:
    net[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return {}


def norm_of_its_own_class(net: nn.Module) -> dict:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    net[1].__class__ = Doubled
    return {}


@pytest.mark.parametrize(
    "change", [kept_by_rule, layer_kept_by_rule, hook_on_layer, hook_on_norm, norm_of_its_own_class]
)
def test_what_would_not_compute_the_same_is_not_folded(change) -> None:
    net = with_statistics(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    model, _ = quantize_model(net, fold_batch_norm=True, **change(net), **OFF)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert torch.equal(model(X), net(X))


def test_weights_that_are_read_elsewhere_are_not_folded_into() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x):
            return nn.functional.conv2d(self.norm(self.conv(x)), self.conv.weight)

    net = with_statistics(Reads())
    model, _ = quantize_model(net, fold_batch_norm=True, **OFF)
    assert isinstance(model.norm, nn.BatchNorm2d) and torch.equal(model(X), net(X))


def test_a_weight_that_another_layer_shares_is_folded_in_a_copy() -> None:
    a, b = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    b.weight = a.weight
    net = with_statistics(nn.Sequential(a, nn.BatchNorm2d(1), b))
    model, _ = quantize_model(net, fold_batch_norm=True, **OFF)
    assert model[2].weight is a.weight and model[0].weight is not a.weight
    torch.testing.assert_close(model(X), net(X), rtol=1e-5, atol=1e-6)


def test_behind_a_linear_layer_two_axes_are_exact_and_three_are_refused() -> None:
    net = with_statistics(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    model, _ = quantize_model(net, fold_batch_norm=True, **OFF)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"folded into it.*fold_batch_norm"):
        model(torch.randn(2, 5, 4))
    along_axis_1 = with_statistics(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)))
    model, _ = quantize_model(along_axis_1, fold_batch_norm=True, **OFF)
    x = torch.randn(2, 5, 4)
    assert torch.equal(model(x), along_axis_1(x))


def test_frozen_layers_stay_frozen() -> None:
    net = with_statistics(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    model, _ = quantize_model(net.requires_grad_(False), fold_batch_norm=True)
    assert isinstance(model[1], nn.Identity)
    assert not model[0].weight.requires_grad and not model[0].bias.requires_grad


def test_in_place_the_float_weights_stay_what_they_were() -> None:
    net = with_statistics(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    weight, before = net[0].weight, net[0].weight.detach().clone()
    quantize_model(net, fold_batch_norm=True, inplace=True)
    assert isinstance(net[1], nn.Identity) and torch.equal(weight, before)
