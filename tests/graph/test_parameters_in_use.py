"""Parameters that layers share, that are computed and that code reads: the model computes what it did, or says why it is as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.equalize import (
    EqualizeGraph,
    GraphRotationEqualization,
    LayerNormToRMS,
    LayerwiseActivationRotation,
    MergeLnAffine,
)

SIZE = 16


class Net(nn.Module):
    """Linear layers around a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)
        self.c, self.other = nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE)

    def forward(self, x):
        return self.c(torch.relu(self.b(self.norm(self.a(self.other(x))))))


class Attending(nn.Module):
    """Attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.norm, self.out = (
            nn.Linear(SIZE, SIZE),
            nn.LayerNorm(SIZE),
            nn.Linear(SIZE, SIZE),
        )
        self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)
        self.other, self.wide = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3 * SIZE)

    def forward(self, x):
        y = self.norm(self.pre(x))
        return self.wide(self.other(self.out(self.attention(y, y, y)[0])))


class Reading(Net):
    """Reads parameters of its layers past them."""

    def forward(self, x):
        return super().forward(x) + self.b.weight.sum() + self.norm.weight.mean()


class ReadingAttention(Attending):
    """Reads parameters of attention past it."""

    def forward(self, x):
        return super().forward(x) * self.attention.in_proj_weight.std()


def tied(kind: str) -> nn.Module:
    net = Attending() if "attention" in kind else Net()
    if kind == "weights":
        net.c.weight = net.b.weight
    elif kind == "biases":
        net.c.bias = net.b.bias
    elif kind == "norms":
        net.other.weight = net.norm.weight
    elif kind == "what attention reads":
        net.wide.weight = net.attention.in_proj_weight
    else:
        net.other.weight = net.attention.out_proj.weight
    return net


TIED = ("weights", "biases", "norms", "what attention reads", "what attention projects")


def wild(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(torch.exp(torch.randn(len(parameter), *[1] * (parameter.dim() - 1))))
    return net.eval()


def equalized(net, x):
    EqualizeGraph().apply(net, x)


def smoothed(layerwise):
    def run(net, x):
        with torch.no_grad(), activation_equalization_mode(net, 0.5, layerwise=layerwise):
            net(x)

    return run


def rotated(net, x):
    for made in (MergeLnAffine(), LayerNormToRMS(), GraphRotationEqualization(orphan_sink=True)):
        made.apply(net, x)


def rotated_each(net, x):
    LayerwiseActivationRotation().apply(net)


PASSES = {
    "equalized": equalized,
    "smoothed by graph": smoothed(False),
    "smoothed alone": smoothed(True),
    "rotated": rotated,
    "rotated each": rotated_each,
}
every_pass = pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)


def stays(net: nn.Module, run) -> None:
    x = torch.randn(3, 5, SIZE) * torch.arange(1, SIZE + 1)
    before = net(x).detach()
    run(net, x)
    torch.testing.assert_close(net(x).detach(), before, rtol=1e-4, atol=1e-4 * float(before.norm()))


@every_pass
@pytest.mark.parametrize("kind", TIED)
def test_parameters_that_layers_share_are_parted(kind, run) -> None:
    stays(wild(tied(kind)), run)


def test_what_no_pass_changes_stays_shared() -> None:
    net = wild(tied("weights"))
    net.b.register_forward_hook(lambda *_: None)
    net.c.register_forward_hook(lambda *_: None)
    EqualizeGraph().apply(net)
    assert net.c.weight is net.b.weight


WAYS = {
    "spectral": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


@every_pass
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_computed_weights_stay(way, run) -> None:
    net = wild(Net())
    net.a, net.b = way(net.a), way(net.b)
    stays(net.eval(), run)


def test_why_a_computed_weight_stays_is_told() -> None:
    net = wild(Net())
    net.b = parametrizations.spectral_norm(net.b)
    net.eval()
    for made in (EqualizeGraph(), MergeLnAffine()):
        made.apply(net)
        assert any("its weight is computed" in why for why in made.report.skipped.values())


@pytest.mark.parametrize("kind", (Reading, ReadingAttention))
@pytest.mark.parametrize("run", [equalized, smoothed(False), rotated])
def test_parameters_that_code_reads_stay(kind, run) -> None:
    net = wild(kind())
    state = copy.deepcopy(net.state_dict())
    stays(net, run)
    read = [k for k in state if k in ("b.weight", "norm.weight", "attention.in_proj_weight")]
    assert read and all(torch.equal(net.state_dict()[k], state[k]) for k in read)
