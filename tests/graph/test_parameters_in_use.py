"""Parameters that layers share, that are computed and that code reads: the model computes what it did, or says why it is as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qframework.graph import quantize_model
from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.awq import awq
from qframework.graph.equalize import (
    EqualizeGraph,
    GraphRotationEqualization,
    LayerNormToRMS,
    LayerwiseActivationRotation,
    MergeLnAffine,
)
from qframework.graph.layer_wrappers import InputChanged
from qframework.graph.quantizers_off import quantizers_off
from qframework.graph.rotation import RotatedInput
from qframework.graph.svd_quant import LayerwiseLowRankCorrection

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
@every_pass
def test_parameters_that_code_reads_stay(kind, run) -> None:
    net = wild(kind())
    state = copy.deepcopy(net.state_dict())
    stays(net, run)
    read = [k for k in state if k in ("b.weight", "norm.weight", "attention.in_proj_weight")]
    assert read and all(torch.equal(net.state_dict()[k], state[k]) for k in read)


class Branching(Net):
    """Can't be traced; the source tells what it reads."""

    def forward(self, x):
        return super().forward(x) @ self.b.weight.T if len(x) > 1 and x.sum() < 1e9 else x


class Hiding(Net):
    """Neither a trace nor the source tells what it reads."""

    def forward(self, x):
        y = super().forward(x) if x.sum() < 1e9 else x
        return sum(y @ layer.weight.T for layer in (self.b,))


class Tied(Net):
    """Reads a parameter by the one of its names that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return super().forward(x) @ self.b.weight


def smoothed_alone(net, x):
    with torch.no_grad(), activation_equalization_mode(net, 0.5) as mode:
        net(x)
    return mode.report.skipped


def rotated_alone(net, x):
    made = LayerwiseActivationRotation()
    made.apply(net, x)
    return made.report.skipped


def weighted_by_activations(net, x):
    return awq(net, [x], grid=2, clip=False).report.skipped


def with_low_rank(net, x):
    made = LayerwiseLowRankCorrection(net)
    made.apply(1)
    return made.skipped


@pytest.mark.parametrize("kind", (Reading, Branching, Hiding, Tied))
@pytest.mark.parametrize("run", (smoothed_alone, rotated_alone, weighted_by_activations))
def test_layer_by_layer_they_stay_too_and_are_reported(kind, run) -> None:
    net = wild(kind())
    if run is weighted_by_activations:
        net = quantize_model(net)[0]
    weight, x = net.b._parameters["weight"], torch.randn(3, 5, SIZE)
    numbers = weight.detach().clone()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that the float weight is read
        with quantizers_off(net):
            before = net(x)
        skipped = run(net, x)
        with quantizers_off(net):
            atol = 1e-4 * float(before.norm())
            torch.testing.assert_close(net(x), before, rtol=1e-4, atol=atol)
    assert "code reads" in skipped["b"]
    assert net.b._parameters["weight"] is weight and torch.equal(weight, numbers)
    others = [m for m in net.modules() if isinstance(m, (InputChanged, RotatedInput))]
    assert others or run is weighted_by_activations


@pytest.mark.parametrize("kind", (Reading, Branching))
def test_no_product_is_put_beside_what_code_reads(kind) -> None:
    net = quantize_model(wild(kind()))[0]
    assert with_low_rank(net, None) == {"b": "code reads its parameters past it"}
    assert type(net.a).__name__ == "LowRankCorrected"
    net(torch.randn(3, 5, SIZE))


def test_quantized_layers_with_a_computed_weight_are_reported_by_awq() -> None:
    net = quantize_model(wild(Net()))[0]
    parametrizations.weight_norm(net.b)
    x = torch.randn(3, 5, SIZE)
    assert weighted_by_activations(net, x) == {"b": "its weight is computed at each call"}
    assert with_low_rank(net, x) == {"b": "its weight is computed at each call"}


class Shifted(nn.Linear):
    """Linear in neither its input nor its weight."""

    def forward(self, x):
        return nn.functional.linear(x + 1, self.weight, self.bias) + 0.25


class Noted(nn.Linear):
    """Computes what its base does."""

    def forward(self, x):
        self.calls = 1
        return super().forward(x)


@pytest.mark.parametrize("run", (smoothed_alone, rotated_alone, weighted_by_activations))
def test_layers_that_compute_otherwise_stay_and_are_reported(run) -> None:
    net = Net()
    net.b, net.c, net.norm = Shifted(SIZE, SIZE), Noted(SIZE, SIZE), nn.Identity()
    net = wild(net)
    if run is weighted_by_activations:
        net = quantize_model(net, weight_bit_width=3)[0]
    x = torch.randn(3, 5, SIZE) * torch.arange(1, SIZE + 1)
    with torch.no_grad():
        with quantizers_off(net):
            before = net(x)
        skipped = run(net, x)
        with quantizers_off(net):
            atol = 1e-4 * float(before.norm())
            torch.testing.assert_close(net(x), before, rtol=1e-4, atol=atol)
    assert "forward of its own" in skipped["b"] and "forward" not in skipped.get("c", "")


def test_a_recorded_graph_shows_reads_of_what_is_transposed() -> None:
    net = wild(Hiding())
    state = copy.deepcopy(net.state_dict())
    stays(net, equalized)
    assert torch.equal(net.b.weight, state["b.weight"])


def test_code_that_reads_one_of_two_tied_layers_keeps_both() -> None:
    net = wild(Tied())
    made = EqualizeGraph()
    made.apply(net)
    assert {"a", "b"} <= set(made.report.skipped) and net.a.weight is net.b.weight
