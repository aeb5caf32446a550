"""Searched scales and zero points, against exhaustive references in float64."""

import copy

import numpy as np
import pytest
import torch

from qframework import quantizers as q
from qframework.layers import QuantIdentity, QuantLinear

BITS = [2, 3, 4, 8]


def weight(seed: int) -> torch.Tensor:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return w * (0.3 + seed) + 0.2 * seed


def layer(quantizer, bits: int, w: torch.Tensor, **keywords) -> QuantLinear:
    out = QuantLinear(
        6, 4, bias=False, weight_quant=quantizer, weight_bit_width=bits, **keywords
    ).eval()
    out.weight.data.copy_(w)
    return out


def least(errors: list[np.ndarray]) -> np.ndarray:
    return np.argmin(np.stack(errors), axis=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_scale_of_least_squared_error_is_the_best_of_the_grid(bits, seed, per_channel) -> None:
    w = weight(seed)
    name = q.Int8WeightPerChannelFloatMSE if per_channel else q.Int8WeightPerTensorFloatMSE
    found = layer(name, bits, w).weight_quant.scale().detach().double().numpy().reshape(-1)
    rows = w.double().numpy() if per_channel else w.double().numpy().reshape(1, -1)
    top = 2 ** (bits - 1) - 1
    grid = [np.abs(rows).max(1, keepdims=True) * (k + 1) / 20 / top for k in range(20)]
    values = [np.clip(np.rint(rows / s), -top, top) * s for s in grid]
    errors = [((v - rows) ** 2).sum(1) for v in values]
    chosen = (
        (np.clip(np.rint(rows / found[:, None]), -top, top) * found[:, None] - rows) ** 2
    ).sum(1)
    np.testing.assert_allclose(chosen, np.min(errors, axis=0), rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_fixed_point_search_gives_a_power_of_two_no_worse_than_the_statistic(bits) -> None:
    w = weight(1)
    searched = layer(q.Int8WeightPerTensorFixedPointMSE, bits, w)
    plain = layer(q.Int8WeightPerTensorFixedPoint, bits, w)
    exponent = torch.log2(searched.weight_quant.scale())
    assert torch.equal(exponent, exponent.round())
    error = [(m.quant_weight().value - w).square().sum() for m in (searched, plain)]
    assert error[0] <= error[1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_searched_zero_point_is_an_integer_and_no_worse(bits, per_channel) -> None:
    w = weight(2)
    end = "PerChannelFloat" if per_channel else "PerTensorFloat"
    searched = layer(getattr(q, f"ShiftedUint8Weight{end}MSE"), bits, w)
    plain = layer(getattr(q, f"ShiftedUint8Weight{end}"), bits, w)
    zero_point = searched.weight_quant.zero_point()
    assert torch.equal(zero_point, zero_point.round())
    error = [(m.quant_weight().value - w).square().sum() for m in (searched, plain)]
    assert error[0] <= error[1] * (1 + 1e-6)


def hqo_zero_point(rows: np.ndarray, bits: int) -> np.ndarray:
    """The offset, by the published steps; in float32, as ties decide when they end."""
    top = np.float32(2**bits - 1)
    low = np.minimum(rows.min(1, keepdims=True), 0)
    scale = (np.maximum(rows.max(1, keepdims=True), 0) - low) / top
    now, best, least_error, beta = low, low, np.inf, 1.0
    for _ in range(1000):
        z = np.abs(now) / scale
        n = np.clip(np.rint(rows / scale + z), 0, top)
        e = rows - (n - z) * scale
        if not np.abs(e).mean() < least_error:
            break
        least_error, best = np.abs(e).mean(), now
        with np.errstate(divide="ignore"):
            rest = np.sign(e) * np.maximum(np.abs(e) - np.abs(e) ** -0.5 / beta, 0)
        now = (rows - rest - n * scale).mean(1, keepdims=True)
        beta *= 1.01
    return np.abs(best) / scale


@pytest.mark.parametrize("seed", range(3))
def test_half_quadratic_zero_point_is_that_of_the_published_steps(seed) -> None:
    w = weight(seed)
    found = layer(q.ShiftedUint8WeightPerTensorFloatHQO, 3, w).weight_quant.zero_point()
    expected = hqo_zero_point(w.numpy().reshape(1, -1), 3)
    assert not torch.equal(found, found.round())
    np.testing.assert_allclose(found.detach().numpy(), expected.item(), rtol=1e-4)


@pytest.mark.parametrize("name", ["Int8WeightPerTensorFloatHQO", "Int8WeightPerChannelFloatHQO"])
@pytest.mark.parametrize("bits", BITS)
def test_half_quadratic_scale_lowers_the_mean_error(name, bits) -> None:
    w = weight(1)
    searched = layer(getattr(q, name), bits, w)
    plain = layer(getattr(q, name.removesuffix("HQO")), bits, w)
    error = [(m.quant_weight().value - w).abs().mean() for m in (searched, plain)]
    assert error[0] <= error[1]


def test_what_was_searched_is_learned_saved_and_follows_the_weight_until_then() -> None:
    first = layer(q.ShiftedUint8WeightPerChannelFloatMSE, 4, weight(0))
    before = first.quant_weight().value
    with torch.no_grad():
        first.weight.mul_(3)
    assert torch.allclose(first.quant_weight().value, before * 3, atol=1e-5)
    second = layer(q.ShiftedUint8WeightPerChannelFloatMSE, 4, weight(1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.quant_weight().value, first.quant_weight().value)
    first.quant_weight().value.square().sum().backward()
    learned = {n for n, p in first.named_parameters() if p.grad is not None}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in learned - {"weight"}} == {
        "scaling_impl",
        "zero_point_impl",
    }
    copied = copy.deepcopy(first)
    with torch.no_grad():
        copied.weight.add_(100)
    assert not torch.equal(copied.weight, first.weight)


def test_a_learned_width_is_one_parameter_in_search_and_quantizer() -> None:
    m = layer(q.Int8WeightPerTensorFloatMSE, 4, weight(0), weight_bit_width_impl_type="parameter")
    names = [n for n, _ in m.named_parameters() if "bit_width" in n]
    assert len(names) == 1
    scale = m.weight_quant.tensor_quant.scaling_impl.scaling_stats_impl
    width = m.weight_quant.tensor_quant.msb_clamp_bit_width_impl
    assert scale.mse_trial.bit_width_impl is width


def test_more_candidates_by_keyword_and_too_few_refused() -> None:
    w = weight(2)
    few, many = (
        layer(q.Int8WeightPerTensorFloatMSE, 3, w, weight_mse_iters=n).quant_weight().value
        for n in (2, 200)
    )
    assert (many - w).square().sum() <= (few - w).square().sum()
    with pytest.raises(ValueError, match="mse_iters"):
        layer(q.Int8WeightPerTensorFloatMSE, 3, w, weight_mse_iters=1)


@pytest.mark.parametrize(
    "name",
    [
        "Int8ActPerTensorFloatMSE",
        "Uint8ActPerTensorFixedPointMSE",
        "ShiftedUint8ActPerTensorFloatMSE",
        "ShiftedUint8ActPerTensorFixedPointMSE",
        "ShiftedUint8ActPerTensorFloatHQO",
    ],
)
def test_activations_collect_what_was_searched(name) -> None:
    m = QuantIdentity(
        getattr(q, name), return_quant_tensor=True, bit_width=4, collect_stats_steps=2
    )
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[0] = 20.0  # an outlier that an absolute maximum would follow
    statistic = QuantIdentity(
        getattr(q, name.removesuffix("MSE").removesuffix("HQO")),
        bit_width=4,
        return_quant_tensor=True,
    )
    if name.endswith("FloatMSE"):  # a power of two is only taken once it is learned
        assert (m(x).value - x).square().sum() <= (statistic(x).value - x).square().sum()
    m(x), m(x), m(x), m.eval()
    assert m(x).is_valid or "HQO" in name
    assert m.act_quant.collectors()[0].is_learned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend", "options"),
    [
        ("ShiftedUint8ActPerTensorFloatHQO", "inductor", {}),
        ("ShiftedUint8ActPerTensorFloatMSE", "aot_eager", {"mse_iters": 4}),
        # a minute: all steps stand in the graph, one after the other
        pytest.param(
            "ShiftedUint8ActPerTensorFloatMSE", "inductor", {}, marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_compiled_search_is_the_eager_one(name, backend, options) -> None:
    eager = QuantIdentity(getattr(q, name), bit_width=4, collect_stats_steps=2, **options)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=backend)
    for seed in range(4):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


MSE_KINDS = [
    "Int8WeightPerTensorFloatMSE",
    "Int8WeightPerChannelFloatMSE",
    "Int8WeightPerGroupFloatMSE",
    "ShiftedUint8WeightPerTensorFloatMSE",
    "ShiftedUint8WeightPerChannelFloatMSE",
    "Fp8e4m3WeightPerTensorFloatMSE",
    "Fp8e4m3WeightPerChannelFloatMSE",
]


@pytest.mark.parametrize("name", MSE_KINDS)
@pytest.mark.parametrize("block", [1, 700, 2**20])
def test_a_search_does_not_depend_on_its_blocks(name, block, monkeypatch) -> None:
    from qframework.core import search

    w = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))

    def scale() -> torch.Tensor:
        made = QuantLinear(128, 6, bias=False, weight_quant=getattr(q, name))
        with torch.no_grad():
            made.weight.copy_(w)
        return made.quant_weight().scale.detach()

    expected = scale()
    monkeypatch.setattr(search, "_BLOCK", block)
    torch.testing.assert_close(scale(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["Fp8e4m3WeightPerTensorFloatMSE", "Fp8e5m2OCPWeightPerTensorFloatMSE"]
)
def test_a_trial_of_minifloats_gives_what_the_quantizer_gives(name) -> None:
    made = QuantLinear(8, 4, weight_quant=getattr(q, name))
    quantizer = made.weight_quant.tensor_quant
    trial = quantizer.scaling_impl.scaling_stats_impl.mse_trial
    x = torch.cat([torch.randn(500), torch.tensor([0.0, -0.0, 1e-9, 1e4, -1e4, 448.0, 3e-5])])
    scales = torch.tensor([0.5, 1e-3, 7.0]).reshape(3, 1)
    found = trial.values()(x, scales, None)
    for scale, values in zip(scales, found, strict=True):
        assert torch.equal(values, quantizer.quantize(x, scale).detach())


def test_fingerprints_tell_exchanged_contents_apart() -> None:
    from qframework.core import following

    t = torch.randn(3 * following._BLOCK + 6)
    first = following.fingerprint([t])
    assert following.fingerprint([t.clone()]) == first
    places = [(0, 1), (0, following._BLOCK), (5, 2 * following._BLOCK + 1), (0, t.numel() - 1)]
    for a, b in places:
        other = t.clone()
        other[a], other[b] = t[b], t[a]
        assert following.fingerprint([other]) != first
    halves = torch.randn(10, 4)
    assert following.fingerprint([halves[:, 1]]) == following.fingerprint([halves[:, 1].clone()])
    assert following.fingerprint([t.half()]) != following.fingerprint([-t.half()])
