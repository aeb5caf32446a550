"""Passes over float models: they compute the same afterwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qframework.graph.channel_splitting import GraphChannelSplitting
from qframework.graph.equalize import (
    EqualizeGraph,
    GraphRotationEqualization,
    LayerNormToRMS,
    LayerwiseActivationRotation,
    MergeLnAffine,
    activation_equalization_mode,
    extract_trainable_rotation_matrices,
    fuse_parametrizations,
)
from qframework.graph.optim import CaileySGD
from qframework.graph.standardize import MergeBatchNorm


class Random(nn.Module):
    """A network with residual additions and concatenations as a list of letters says."""

    def __init__(self, plan: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan, width = plan, 4
        self.first, layers = nn.Conv2d(2, 4, 3, padding=1), []
        for step in plan:
            out = width if step in "rd" else 4
            groups = width if step == "d" else 1
            layer = nn.Conv2d(width, out, 3, padding=1, groups=groups)
            with torch.no_grad():
                layer.weight.mul_(torch.exp(torch.randn(out)).reshape(-1, 1, 1, 1))
            layers.append(layer)
            width = width + out if step == "c" else out
        self.layers, self.act = nn.ModuleList(layers), nn.ReLU()
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = self.act(self.first(x))
        for step, layer in zip(self.plan, self.layers, strict=True):
            y = layer(x)
            if step == "r":
                x = self.act(x + y)
            elif step == "c":
                x = self.act(torch.cat([x, y], 1))
            elif step == "6":
                x = nn.functional.relu6(y)
            else:
                x = self.act(y)
        return self.last(x.mean((2, 3)))


def unchanged(a: torch.Tensor, b: torch.Tensor, room: float = 1e-5) -> bool:
    return bool((a - b).norm() <= room * b.norm())


X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(st.text("rdcs6", min_size=1, max_size=4), st.integers(0, 99))
def test_equalization_leaves_any_network_s_function(plan, seed) -> None:
    net = Random(plan, seed).eval()
    before = net(X)
    EqualizeGraph().apply(net)
    assert unchanged(net(X), before)


@settings(max_examples=15, deadline=None)
@given(st.text("rdcs6", min_size=1, max_size=4), st.integers(0, 99), st.sampled_from([0.1, 3.0]))
def test_a_sample_tells_where_a_bound_lets_factors_pass(plan, seed, size) -> None:
    net = Random(plan, seed).eval()
    before = net(X * size)
    EqualizeGraph(threshold=None).apply(net, X * size)
    assert unchanged(net(X * size), before)


@pytest.mark.parametrize("kind", [nn.ReLU6, lambda: nn.Hardtanh(0.0, 6.0)])
def test_a_bound_of_6_that_is_reached_is_skipped_and_reported(kind) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), kind(), nn.Conv2d(4, 3, 1)).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([0.1, 1.0, 2.0, 90.0]).reshape(-1, 1, 1, 1))
    weight, before = net[0].weight.detach().clone(), net(X)
    equalize = EqualizeGraph()
    equalize.apply(net)
    assert "no sample tells" in equalize.report.skipped["0"]
    assert torch.equal(net[0].weight, weight)
    equalize.apply(net, X)
    ratio = (net[0].weight / weight).flatten(1).mean(1)
    assert float(ratio[3].detach()) == 1 and float((ratio[:3] - 1).abs().min().detach()) > 0.01
    assert "reaches its bound of 6" in equalize.report.skipped["0"]
    assert unchanged(net(X), before)


@settings(max_examples=15, deadline=None)
@given(st.text("rdcs6", min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_smoothing_leaves_any_network_s_function(plan, seed, layerwise) -> None:
    net = Random(plan, seed).eval()
    before = net(X)
    with activation_equalization_mode(net, 0.5, layerwise=layerwise):
        net(X)
    assert unchanged(net(X), before)


@settings(max_examples=15, deadline=None)
@given(st.text("rcs", min_size=1, max_size=3), st.integers(0, 99), st.booleans())
def test_splitting_leaves_any_network_s_function(plan, seed, split_input) -> None:
    net = Random(plan, seed).eval()
    before = net(X)
    GraphChannelSplitting(0.3, split_input=split_input).apply(net)
    assert unchanged(net(X), before)


def test_what_cannot_be_traced_is_recorded_on_a_sample() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) if x.sum() > -1e9 else x

    net, x = Dynamic().eval(), torch.randn(5, 4)
    before = net(x)
    with pytest.raises(TypeError, match="give arguments of the model as well"):
        EqualizeGraph().apply(net)
    equalize = EqualizeGraph()
    weight = net.a.weight.clone()
    equalize.apply(net, x)
    assert equalize.report.way == "recorded"
    assert unchanged(net(x), before)
    assert not torch.equal(net.a.weight, weight)


def test_bounds_are_those_of_channels_behind_other_axes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([0.1, 0.1, 0.1, 20.0, 0.1, 0.1]).unsqueeze(1))
    x = torch.randn(2, 6, 4)
    before = net(x)
    equalized = EqualizeGraph()
    equalized.apply(net, x)
    assert equalized.report.changed and equalized.report.skipped
    assert unchanged(net(x), before)


def test_batch_norms_fold() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.normal_(net[1].running_mean)
    before = net(X)
    MergeBatchNorm().apply(net)
    assert not any(type(m) is nn.BatchNorm2d for m in net.modules())
    assert unchanged(net(X), before)


class Attention(nn.Module):
    """One norm feeds query, key and value; a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 8)
        self.norm, self.end = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        for norm in (self.norm, self.end):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.embed(x)
        n = self.norm(x)
        scores = torch.softmax(self.q(n) @ self.k(n).transpose(-1, -2), -1)
        x = x + self.out(scores @ self.v(n))
        return self.head(self.end(x))


TOKENS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["had", "ort"])
@pytest.mark.parametrize("orphans", [False, True])
def test_norms_fold_and_the_stream_turns(method, orphans) -> None:
    net = Attention().eval()
    before = net(TOKENS)
    MergeLnAffine().apply(net)
    assert unchanged(net(TOKENS), before)
    LayerNormToRMS().apply(net)
    assert not any(isinstance(m, nn.LayerNorm) for m in net.modules())
    weight = net.embed.weight.clone()
    GraphRotationEqualization(full_rotation_method=method, orphan_sink=orphans).apply(net)
    assert not torch.allclose(net.embed.weight, weight)
    assert unchanged(net(TOKENS), before, 1e-4)


def test_learned_rotations_stay_orthogonal_and_fuse() -> None:
    net = Attention().eval()
    MergeLnAffine().apply(net)
    LayerNormToRMS().apply(net)
    before = net(TOKENS).detach()
    GraphRotationEqualization(use_parametrized_rotations=True).apply(net)
    matrices = extract_trainable_rotation_matrices(net)
    optimizer = CaileySGD([{"params": matrices, "stiefel": True}], lr=0.1, momentum=0.5)
    start = matrices[0].detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        net.embed.weight.abs().amax().backward()
        optimizer.step()
    assert not torch.allclose(matrices[0], start)
    torch.testing.assert_close(matrices[0] @ matrices[0].t(), torch.eye(8), atol=1e-5, rtol=0)
    fuse_parametrizations(net)
    assert not extract_trainable_rotation_matrices(net)
    assert unchanged(net(TOKENS), before, 1e-4)


def test_every_linear_layer_s_input_turns() -> None:
    net = Attention().eval()
    before = net(TOKENS)
    rotation = LayerwiseActivationRotation()
    rotation.apply(net)
    assert set(rotation.report.changed) == {"q", "k", "v", "out", "head"}
    assert "embed" in rotation.report.skipped
    assert unchanged(net(TOKENS), before, 1e-4)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.a(x)
        x = x + self.m(x, x, x, need_weights=False)[0]
        return x + self.c(torch.relu(self.b(self.norm(x))))


@pytest.mark.parametrize(
    "made",
    [EqualizeGraph(), GraphRotationEqualization(orphan_sink=True), LayerwiseActivationRotation()],
    ids=lambda made: type(made).__name__,
)
def test_the_projections_of_attention_are_changed_and_its_function_stays(made) -> None:
    torch.manual_seed(0)
    net, x = WithAttention().eval(), torch.randn(3, 5, 8)
    before = net(x)
    net = made.apply(net, x)
    assert unchanged(net(x), before)
    assert [n for n in made.report.changed if n.startswith("m.")]
