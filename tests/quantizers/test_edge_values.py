"""Every predefined quantizer at the edges of what tensors hold: one table, a row a quantizer, by each setting of the kernels."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_contract import contract, predefined
from torch import Tensor, nn

import qframework
from qframework.layers import QuantIdentity
from qframework.quant_tensor import IntQuantTensor, QuantTensor
from qframework.testing import QuantizerContract

CONTRACTS: dict[str, QuantizerContract] = {name: contract(name)() for name in predefined()}
ROLES = {name: c.role() for name, c in CONTRACTS.items()}
WEIGHTS = [n for n, role in ROLES.items() if role == "weight"]
ACTIVATIONS = [n for n, role in ROLES.items() if role == "activation"]
COLLECTING = [n for n in ACTIVATIONS if CONTRACTS[n].layer().act_quant.collectors()]
#: Quantizers without 0 among their values: of one bit, with half of the codes on either side, with a zero point between codes.
WITHOUT_ZERO = ("Binary", "WeightPerTensorDoReFa", "HQO")
#: One of each kind of statistic, with a zero point and without.
COMPILED = (
    "Int8ActPerTensorFloat",
    "Int8ActPerTensorFloatBatchQuant1d",
    "ShiftedUint8ActPerTensorFloat",
    "ShiftedUint8ActPerTensorLSQPlus",
    "Uint8ActPerTensorLSQ",
)
WAYS = ("auto", "fused", "reference", "compiled")


@contextmanager
def settings(way: str) -> Iterator[None]:
    """One of the ways in which quantizers run."""
    torch.compiler.reset()
    with qframework.settings.use(kernels="auto" if way == "compiled" else way):
        yield


def running(layer: Any, way: str) -> Any:
    """The layer, or what a compiler makes of it."""
    return torch.compile(layer, backend="eager") if way == "compiled" else layer


def value(out: Any) -> Tensor:
    """Of a quantized tensor."""
    return out.value if isinstance(out, QuantTensor) else out


def weight_of(layer: Any, x: Tensor) -> Any:
    """The quantized weight."""
    return layer.quant_weight(layer.input_quant(x))


def random(name: str, batch: int, seed: int) -> Tensor:
    """Activations that a quantizer takes."""
    shape = (batch, *CONTRACTS[name].shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collecting(name: str, steps: int) -> Any:
    """A layer that collects over some calls, where that can be said."""
    try:
        return CONTRACTS[name].layer(collect_stats_steps=steps)
    except TypeError:
        return CONTRACTS[name].layer()


# ------------------------------------------------------------ integers


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers_are_computed_as_floats(name, dtype) -> None:
    x = random(name, 4, 0).mul(3).abs().to(dtype)
    for layer in (CONTRACTS[name].layer(), CONTRACTS[name].ready()):
        expected = value(copy.deepcopy(layer)(x.float()))
        found = value(layer(x))
        assert found.dtype == torch.get_default_dtype() and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("x", "got"),
    [(torch.ones(4) * 1j, "a tensor of torch.complex64"), ([1.0], "a list"), (None, "a NoneType")],
)
def test_what_is_no_tensor_of_real_numbers_is_refused_by_the_layers_name(x, got) -> None:
    net = nn.Sequential(nn.Identity(), QuantIdentity())
    with pytest.raises(TypeError, match=rf"1 \(QuantIdentity\): what act_quant .* got {got}"):
        net(x)


# ------------------------------------------------------------ NaN and infinity


@pytest.mark.table(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COLLECTING)
def test_a_batch_with_nan_or_infinity_is_left_out_of_statistics_with_one_warning(name, way) -> None:
    if way == "compiled" and name not in COMPILED:
        pytest.skip("one quantizer of each kind of statistic is compiled")
    clean = random(name, 8, 0)
    with settings(way):
        scales, reports = [], []
        for bad in (None, math.nan, math.inf, -math.inf):
            dirty = random(name, 8, 1)
            if bad is not None:
                dirty.view(-1)[5] = bad
            layer = collecting(name, 3)
            run = running(layer, way)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                for x in (clean, clean if bad is None else dirty, clean if bad is None else dirty):
                    run(x)
                run(clean)
                layer.eval()
                scales.append((layer.act_quant.scale(), layer.act_quant.zero_point()))
            reports.append([str(w.message) for w in found if "left out" in str(w.message)])
    for scale, zero_point in scales[1:]:
        assert torch.equal(scale, scales[0][0]) and torch.equal(zero_point, scales[0][1])
    assert not reports[0]
    for report in reports[1:]:
        assert len(report) == 1 and "QuantIdentity.act_quant" in report[0]


@pytest.mark.parametrize("name", COLLECTING)
def test_one_bad_element_of_many_is_seen(name) -> None:
    clean, dirty = random(name, 2048, 0), random(name, 2048, 1)
    dirty.view(-1)[-7] = math.inf
    scales = []
    for second in (clean, dirty):
        layer = collecting(name, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x in (clean, second, clean):
                layer(x)
        layer.eval()
        scales.append((layer.act_quant.scale(), layer.act_quant.zero_point()))
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


@pytest.mark.parametrize("way", ["auto", "reference"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan_and_changes_no_other(name, way) -> None:
    with settings(way):
        layer = CONTRACTS[name].ready()
        x = random(name, 4, 0)
        dirty = x.clone()
        dirty.view(-1)[5] = math.nan
        before, after = value(layer(x)).reshape(-1), value(layer(dirty)).reshape(-1)
    assert after[5].isnan()
    if not getattr(layer.act_quant, "is_dynamic", False):
        others = torch.arange(x.numel()) != 5
        assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("way", ["auto", "reference"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_nan_in_a_weight_stays_nan_and_makes_no_other_0(name, way) -> None:
    with settings(way):
        layer, x = CONTRACTS[name].layer(), CONTRACTS[name].sample()
        before = weight_of(layer, x).value.detach()
        with torch.no_grad():
            layer.weight[0, 0] = math.nan
        after = weight_of(layer, x).value.detach()
    assert after[0, 0].isnan()
    others = torch.ones_like(after, dtype=torch.bool)
    others[0, 0] = False
    # a statistic that holds the NaN makes all that it is for NaN; a learned or fixed one doesn't
    assert (after.isnan() | ((after - before).abs() < 0.05))[others].all()


# ------------------------------------------------------------ zeros, and nothing


@pytest.mark.parametrize("way", ["auto", "reference"])
@pytest.mark.parametrize("zeros", ["all", "one channel"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros_give_0_and_a_positive_scale(name, zeros, way) -> None:
    with settings(way):
        layer, x = CONTRACTS[name].layer(), CONTRACTS[name].sample()
        chosen = slice(None) if zeros == "all" else slice(1, 2)
        with torch.no_grad():
            layer.weight[chosen] = 0.0
        q = weight_of(layer, x)
        q.value.sum().backward()
    assert (q.scale > 0).all() and q.scale.isfinite().all() and q.value.isfinite().all()
    if any(part in name for part in WITHOUT_ZERO):
        assert (q.value[chosen].abs() <= q.scale.max() * 1.001).all()
    else:
        assert not q.value[chosen].any()
    for which, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), which


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_elements_give_none(name, way) -> None:
    with settings(way):
        nothing = random(name, 0, 0)
        for layer in (CONTRACTS[name].layer(), CONTRACTS[name].ready()):
            out = layer(nothing)
            assert out.shape == nothing.shape
            assert (out.scale > 0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_number_without_axes_is_quantized_as_with_one_or_refused_by_shape(name) -> None:
    x = torch.tensor(0.5)
    try:
        found = value(CONTRACTS[name].layer()(x))
    except ValueError as error:
        assert "axes" in str(error) or "axis" in str(error)
        return
    assert found.shape == () and torch.equal(found, value(CONTRACTS[name].layer()(x[None]))[0])


# ------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("name", WEIGHTS + ACTIVATIONS)
def test_codes_in_bfloat16_are_those_of_the_quantizer(name) -> None:
    layer = CONTRACTS[name].ready().bfloat16()
    wide = copy.deepcopy(layer).float()
    x = random(name, 4, 0).mul(1.7).bfloat16()
    if ROLES[name] == "weight":
        found, expected = weight_of(layer, x), weight_of(wide, x.float())
    else:
        found, expected = layer(x), wide(x.float())
    assert found.value.dtype == torch.bfloat16
    if not hasattr(found, "int"):
        return
    assert torch.equal(found.int(), expected.int())
    if isinstance(found, IntQuantTensor):
        assert found.is_valid
        steps = found.int(float_datatype=True).float() - found.zero_point
        assert torch.equal((steps * found.scale).bfloat16(), found.value)
        assert torch.equal(found.flatten().int(), expected.int().flatten())


# ------------------------------------------------------------ derivatives of derivatives


@pytest.mark.parametrize("name", [n for n, role in ROLES.items() if role != "truncation"])
def test_second_derivatives_are_those_of_the_composed_definition(name) -> None:
    expected, found = second(name, "reference"), second(name, "auto")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.norm()) + 1e-6)


def second(name: str, kernels: str) -> list[Tensor]:
    """First and second derivatives of a function of what a layer gives."""
    with qframework.settings.use(kernels=kernels):
        torch.manual_seed(0)
        layer = (
            CONTRACTS[name].layer().double()
        )  # gradients of scales are small sums of large numbers
        layer(random(name, 4, 1).double())
        if ROLES[name] == "activation":
            layer.eval()
        x = random(name, 4, 0).double().requires_grad_()
        out = value(layer(x))
        leaves = [x, *layer.parameters()]
        up = torch.linspace(0.5, 1.5, out.numel()).to(out).reshape(out.shape)
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad((out.sin() * up).sum(), leaves, create_graph=True, **options)
        penalty = sum(g.square().sum() for g in first)
        again = torch.autograd.grad(penalty, leaves, **options) if penalty.requires_grad else ()
    return [t.detach() for t in (*first, *again)]
