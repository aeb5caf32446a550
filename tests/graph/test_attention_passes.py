"""Passes through torch's attention: its function stays, its projections change, and what follows works."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from attention_networks import NETWORKS, SIZE, network, outputs, same, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qframework.graph import Recipe, Rule, ptq, quantize_model
from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.awq import awq
from qframework.graph.calibrate import calibration_mode
from qframework.graph.equalize import (
    EqualizeGraph,
    GraphRotationEqualization,
    LayerNormToRMS,
    LayerwiseActivationRotation,
    MergeLnAffine,
    fuse_parametrizations,
)
from qframework.graph.quantizers_off import quantizers_off

more = pytest.mark.exhaustive
CASES = [(k, first) for k in NETWORKS for first in ((True,) if "cross" in k else (True, False))]
FEW = (("by hand", True), ("of torch", False), ("cross, other features", True))


def networks(quick):
    """All networks, those that aren't among the quick ones in the exhaustive set."""
    cases = [pytest.param(*c, marks=() if c in quick else more) for c in CASES]
    return pytest.mark.parametrize(("kind", "norm_first"), cases)


every_network, some_networks = networks(CASES), networks(FEW)
either_layout = pytest.mark.parametrize("batch_first", (True, pytest.param(False, marks=more)))


def smoothed(net, batch_first, layerwise, **options):
    mode = activation_equalization_mode(net, 0.5, layerwise=layerwise, **options)
    with torch.no_grad(), mode:
        net(tokens(batch_first))
    return mode


def quantizes(net, batch_first) -> bool:
    """Whether a network can be quantized, and computes the same without its quantizers."""
    x = tokens(batch_first)
    quantized, _ = quantize_model(net)
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x)
    with quantizers_off(quantized):
        alike = torch.allclose(quantized(x), net(x), rtol=1e-4, atol=1e-4)
    return (
        alike and bool(torch.isfinite(quantized(x)).all()) and not torch.equal(quantized(x), net(x))
    )


@every_network
@either_layout
def test_equalization_goes_through_attention(kind, norm_first, batch_first) -> None:
    net = network(kind, norm_first, batch_first=batch_first)
    before = outputs(net, batch_first)
    equalized = EqualizeGraph()
    equalized.apply(net)
    assert same(net, before, batch_first, 1e-5)
    names = [n for n in equalized.report.changed if n.endswith("v_proj")]
    assert names and all(n.replace("v_proj", "out_proj") in equalized.report.changed for n in names)
    if "cross" in kind or norm_first:  # else what is read is added to the result too
        assert any("in_proj" in n or "q_proj" in n for n in equalized.report.changed)
    assert quantizes(net, batch_first)


@some_networks
@pytest.mark.parametrize(
    ("layerwise", "fuse"),
    [(True, False), (False, True), pytest.param(True, True, marks=more)],
)
def test_smoothing_goes_through_attention(kind, norm_first, layerwise, fuse) -> None:
    net = network(kind, norm_first, batch_first=True)
    before = outputs(net, True)
    mode = smoothed(net, True, layerwise, fuse_scaling=fuse)
    assert same(net, before, True, 1e-5)
    assert any(n.endswith("out_proj") for n in mode.report.changed)
    if layerwise or "cross" in kind or norm_first:
        assert any("in_proj" in n or "k_proj" in n for n in mode.report.changed)
    if not fuse:
        fuse_parametrizations(net)
        assert same(net, before, True, 1e-5)
    assert quantizes(net, True)


def test_the_ranges_of_attended_values_are_evened_out() -> None:
    net = network("by hand", True, batch_first=True)
    attention = net.blocks[0].attention
    with torch.no_grad():
        attention.in_proj_weight[2 * SIZE + 3] *= 100
        attention.in_proj_bias[2 * SIZE + 3] *= 100
    before = outputs(net, True)
    rows = attention.in_proj_weight[2 * SIZE :].abs().amax(1)
    smoothed(net, True, layerwise=True)
    after = net.blocks[0].attention.layer.in_proj_weight[2 * SIZE :].abs().amax(1)
    assert after.max() / after.min() < rows.max() / rows.min() / 5
    assert same(net, before, True, 1e-5)


@every_network
@pytest.mark.parametrize("bias", (True, pytest.param(False, marks=more)))
def test_a_norm_is_folded_into_all_that_attention_projects_of_it(kind, norm_first, bias) -> None:
    net = network(kind, norm_first, batch_first=True, bias=bias)
    before = outputs(net, True)
    folding = MergeLnAffine()
    folding.apply(net)
    assert same(net, before, True, 1e-5)
    folded = [n for n in folding.report.changed if "proj" in n]
    expected = {"cross": 3, "cross, other features": 3}.get(kind, 1 if norm_first else 0)
    assert len(folded) == expected
    for name, module in net.named_modules():
        if isinstance(module, nn.LayerNorm) and name not in folding.report.skipped:
            assert bool((module.weight == 1).all())
    assert quantizes(net, True)


@some_networks
@pytest.mark.parametrize(
    ("method", "learned", "orphans"),
    [
        ("had", True, True),
        ("ort", False, False),
        pytest.param("had", False, True, marks=more),
        pytest.param("ort", True, False, marks=more),
    ],
)
def test_the_residual_stream_turns(kind, norm_first, method, learned, orphans) -> None:
    net = network(kind, norm_first, batch_first=True)
    before = outputs(net, True)
    MergeLnAffine().apply(net)
    LayerNormToRMS().apply(net)
    turning = GraphRotationEqualization(
        orphan_sink=orphans, use_parametrized_rotations=learned, full_rotation_method=method
    )
    turning.apply(net)
    assert same(net, before, True, 1e-4)
    if norm_first and "cross" not in kind:
        turned = [n for n in turning.report.changed if n.endswith(("in_proj", "out_proj"))]
        assert len(turned) == 2
    if orphans:
        assert any("q_proj" in n or "in_proj" in n for n in turning.report.changed)
    if learned:
        fuse_parametrizations(net)
        assert same(net, before, True, 1e-4)
    assert quantizes(net, True)


@some_networks
@either_layout
def test_what_attention_is_given_turns_when_it_is_called(kind, norm_first, batch_first) -> None:
    net = network(kind, norm_first, batch_first=batch_first)
    before = outputs(net, batch_first)
    net = LayerwiseActivationRotation().apply(net)
    assert same(net, before, batch_first, 1e-4)
    assert quantizes(net, batch_first)


def test_a_learned_rotation_is_not_bypassed_by_fused_inference() -> None:
    net = network("of torch", True, batch_first=True)
    MergeLnAffine().apply(net)
    LayerNormToRMS().apply(net)
    turning = GraphRotationEqualization(use_parametrized_rotations=True)
    turning.apply(net)
    x = tokens(True)
    with torch.no_grad():
        before = net(x)
        for module in net.modules():
            if type(module).__name__ == "Rotation":
                module.matrix.mul_(2.0)
        assert not torch.allclose(net(x), before)


@pytest.mark.parametrize("options", ({"add_bias_kv": True}, {"add_zero_attn": True}))
@pytest.mark.parametrize("layerwise", (True, False))
def test_added_keys_and_values_are_heeded(options, layerwise) -> None:
    net = network("by hand", True, batch_first=True, **options)
    if "add_bias_kv" in options:
        nn.init.normal_(net.blocks[0].attention.bias_v)
    before = outputs(net, True)
    equalized = EqualizeGraph()
    equalized.apply(net)
    mode = smoothed(net, True, layerwise)
    assert same(net, before, True, 1e-5)
    for report in (equalized.report, mode.report):
        said = [why for why in report.skipped.values() if "bias_v" in why]
        assert bool(said) == ("add_bias_kv" in options)
        assert any("in_proj" in n for n in report.changed)


class Own(nn.MultiheadAttention):
    """Attention that computes otherwise."""

    def forward(self, query, *args, **options):
        return super().forward(query * 2 + 1, *args, **options)


@pytest.mark.parametrize("kind", ("forward", "hooks", "computed"))
def test_attention_that_cannot_be_seen_into_is_left_alone_and_reported(kind) -> None:
    net = network("by hand", True, batch_first=True)
    attention = net.blocks[0].attention
    if kind == "forward":
        attention.__class__ = Own
    elif kind == "hooks":
        attention.register_forward_hook(lambda m, a, out: (out[0].clamp(-1, 1), out[1]))
    else:
        nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")
    before = outputs(net, True)
    weight = attention.in_proj_weight.detach().clone()
    done = [EqualizeGraph(), MergeLnAffine(), GraphRotationEqualization(orphan_sink=True)]
    for made in done:
        made.apply(net, tokens(True))
        assert same(net, before, True, 1e-4)
        assert any(n.startswith("blocks.0") for n in made.report.skipped)
    assert torch.equal(attention.in_proj_weight, weight)


def test_one_attention_in_two_places_is_scaled_once() -> None:
    net = network("by hand", True, batch_first=True, blocks=2)
    net.blocks[1].attention = net.blocks[0].attention
    before = outputs(net, True)
    EqualizeGraph().apply(net)
    MergeLnAffine().apply(net)
    assert same(net, before, True, 1e-5)


def test_after_an_exception_attention_is_as_it_was(monkeypatch) -> None:
    net = network("of torch", True, batch_first=True)
    state = copy.deepcopy(net.state_dict())

    def fails(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr("qframework.graph.graph_pass.call_changed_parts", fails)
    for made in (MergeLnAffine(), EqualizeGraph()):
        with pytest.raises(RuntimeError, match="stop"):
            made.apply(net)
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.state_dict().keys() == state.keys()


@some_networks
def test_awq_goes_through_attention(kind, norm_first) -> None:
    net = network(kind, norm_first, batch_first=True)
    before = outputs(net, True)
    quantized, _ = quantize_model(net, weight_bit_width=3)
    done = awq(quantized, [tokens(True)], grid=4, clip=False)
    with quantizers_off(quantized):
        assert same(quantized, before, True, 1e-5)
    found = {n: e for n, e in done.errors.items() if n.endswith("proj")}
    assert {n.rpartition(".")[2] for n in found} >= {"out_proj"} and len(found) in (2, 4)
    assert sum(now for _, now in found.values()) < sum(was for was, _ in found.values())
    # the values' factors are in the rows that make them, not in front of what reads them
    assert not any(n.endswith("out_proj.change") for n, _ in quantized.named_modules())
    assert same(net, before, True, 0.0)  # whose parameters stay its own


def test_a_learned_and_a_fixed_rotation_compute_the_same() -> None:
    nets = [network("of torch", True, batch_first=True) for _ in range(2)]
    for net, learned in zip(nets, (True, False), strict=True):
        MergeLnAffine().apply(net)
        LayerNormToRMS().apply(net)
        GraphRotationEqualization(use_parametrized_rotations=learned).apply(net)
    fuse_parametrizations(nets[0])
    a, b = (n.state_dict() for n in nets)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.parametrize("norm_first", (True, False))
def test_ptq_passes_through_an_encoder_of_torch(norm_first) -> None:
    net = network("of torch", norm_first, batch_first=True)
    before = outputs(net, True)
    steps = [
        "merge_ln_affine",
        "layer_norm_to_rms",
        "rotate",
        "activation_equalize",
        "quantize",
        "calibrate",
        "gptq",
    ]
    recipe = Recipe.model_validate(
        {
            "layers": {"keywords": {"weight_quant": "Int8WeightPerChannelFloat"}},
            "steps": [{"step": s} for s in steps],
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing.*")
        quantized, _ = ptq(net, [(tokens(True),)], recipe)
    assert same(net, before, True, 0.0)
    with torch.no_grad():
        assert bool((quantized(tokens(True)) - before[0]).norm() < 0.3 * before[0].norm())


class Both(nn.Module):
    """Encoder and decoder of torch."""

    def __init__(self, norm_first) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, SIZE)
        sizes = (SIZE, 4, 1, 1, 2 * SIZE, 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that norm_first has no nested tensors
            self.both = nn.Transformer(*sizes, norm_first=norm_first, batch_first=True)

    def forward(self, tokens):
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return self.both(x, x, tgt_mask=mask)


class Branching(nn.Module):
    """What can't be traced."""

    def __init__(self, norm_first) -> None:
        super().__init__()
        self.one = network("of torch", norm_first, batch_first=True)

    def forward(self, tokens):
        return self.one(tokens) if tokens.sum() > 0 else tokens


@pytest.mark.parametrize(
    ("kind", "norm_first"),
    [(Both, True), (Branching, False), pytest.param(Both, False, marks=more)],
)
def test_transformers_of_torch_traced_and_recorded(kind, norm_first) -> None:
    torch.manual_seed(0)
    net, x = kind(norm_first).eval(), tokens(True)
    before = net(x).detach()
    for made in (EqualizeGraph(), MergeLnAffine(), LayerNormToRMS(), GraphRotationEqualization()):
        made.apply(net, x)
        assert made.report.way == ("traced" if kind is Both else "recorded")
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(net(x).detach(), before, rtol=1e-4, atol=1e-4)
        if isinstance(made, EqualizeGraph):
            assert any("v_proj" in n for n in made.report.changed)
    assert quantizes(net, True)


def test_an_encoder_layer_that_is_the_whole_model_is_seen_into() -> None:
    torch.manual_seed(0)
    options = {"activation": nn.functional.relu6, "norm_first": True, "batch_first": True}
    net, x = nn.TransformerEncoderLayer(SIZE, 4, 24, 0.0, **options).eval(), torch.randn(3, 5, SIZE)
    before = net(x).detach()
    equalized = EqualizeGraph()
    equalized.apply(net, x)
    assert {"self_attn.in_proj", "self_attn.out_proj", "linear2"} <= set(equalized.report.changed)
    with torch.no_grad():
        torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("layer", (nn.Linear(SIZE, SIZE), nn.MultiheadAttention(SIZE, 4)))
def test_in_front_of_the_whole_model_nothing_is_put(layer) -> None:
    x = torch.randn(3, 5, SIZE) * torch.arange(1, SIZE + 1)
    args = (x,) if isinstance(layer, nn.Linear) else (x, x, x)
    with torch.no_grad():
        before = layer(*args)
        with activation_equalization_mode(layer, 0.5) as mode:
            layer(*args)
        torch.testing.assert_close(layer(*args), before)
    assert any("single layer" in why for why in mode.report.skipped.values())


def test_a_quantized_part_of_a_float_encoder_layer_is_called() -> None:
    net = network("of torch", False, batch_first=True)
    name = "encoder.layers.0"
    rules = [Rule(name, keep_float=True), Rule(f"{name}.linear1", weight_bit_width=2)]
    quantized, _ = quantize_model(net, rules=rules)
    layer = quantized.get_submodule(name)
    assert type(layer) is nn.TransformerEncoderLayer
    calls = []
    layer.linear1.weight_quant.register_forward_hook(lambda *a: calls.append(a))
    with torch.no_grad():
        quantized(tokens(True))
    assert len(calls) == 1
    assert net.get_submodule(name).activation_relu_or_gelu and net.encoder.use_nested_tensor


@settings(max_examples=4)
@given(
    kind=st.sampled_from(list(NETWORKS)),
    norm_first=st.booleans(),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
    alpha=st.floats(0.2, 0.8),
)
def test_any_network_s_function_stays(kind, norm_first, seed, bias, alpha) -> None:
    net = network(kind, norm_first, seed, batch_first=True, bias=bias)
    before = outputs(net, True)
    EqualizeGraph().apply(net)
    with torch.no_grad(), activation_equalization_mode(net, alpha, layerwise=False):
        net(tokens(True))
    MergeLnAffine().apply(net)
    assert same(net, before, True, 1e-5)
    LayerNormToRMS().apply(net)
    GraphRotationEqualization(orphan_sink=True, seed=seed).apply(net)
    assert same(net, before, True, 1e-4)


class Twice(nn.Module):
    """One attention that is given a norm's result in different places."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.a, self.norm, self.both = nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), both
        self.m = nn.MultiheadAttention(SIZE, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(self.a(x))
        first = self.m(x, y, y)[0]
        return first + (self.m(y, x, y) if self.both else self.m(x, y, y))[0]


@pytest.mark.parametrize("both", (True, False))
def test_a_norm_is_folded_only_into_what_reads_it_in_every_call(both) -> None:
    torch.manual_seed(0)
    net, x = Twice(both).eval(), torch.randn(2, 5, SIZE)
    with torch.no_grad():
        net.norm.weight.mul_(torch.rand(SIZE) + 0.5)
        net.norm.bias.add_(torch.randn(SIZE))
    before = net(x)
    folding = MergeLnAffine()
    folding.apply(net)
    torch.testing.assert_close(net(x), before)
    assert bool(folding.report.changed) != both and bool(folding.report.skipped) == both


def test_a_norm_is_folded_into_quantized_attention() -> None:
    net = network("by hand", True, batch_first=True)
    before = outputs(net, True)
    quantized, _ = quantize_model(copy.deepcopy(net))
    folding = MergeLnAffine()
    folding.apply(quantized)
    assert "blocks.0.attention.in_proj" in folding.report.changed
    with quantizers_off(quantized):
        assert same(quantized, before, True, 1e-5)
