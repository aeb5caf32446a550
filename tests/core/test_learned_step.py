"""LSQ, LSQ+, PACT and DoReFa: values and gradients of the papers' own formulas, in float64."""

import copy
import math

import pytest
import torch

from qframework import quantizers as q
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU

LAYERS = {"step": "scaling_impl.value", "offset": "zero_point_impl.value"}


def number(proxy, which: str) -> torch.nn.Parameter:
    return proxy.tensor_quant.get_parameter(LAYERS[which])


def lsq(x: float, s: float, low: int, high: int) -> tuple[float, float, float]:
    """Value, d value / d x and d value / d s: equations 1 to 5 of the paper."""
    v = x / s
    if v <= low:
        return low * s, 0.0, float(low)
    if v >= high:
        return high * s, 0.0, float(high)
    return round(v) * s, 1.0, -v + round(v)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_lsq_weights(bits) -> None:
    layer = QuantLinear(
        12, 4, bias=False, weight_quant=q.Int8WeightPerTensorLSQ, weight_bit_width=bits
    )
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = number(layer.weight_quant, "step")
    start = 2 * layer.weight.detach().double().abs().mean() / math.sqrt(high)
    assert math.isclose(float(step.detach()), float(start), rel_tol=1e-6)
    with torch.no_grad():
        step.mul_(0.6)
    probe = torch.randn(4, 12)
    out = layer.quant_weight()
    (out.value * probe).sum().backward()
    rows = [lsq(float(w), float(step.detach()), low, high) for w in layer.weight.detach().flatten()]
    values, dx, ds = (torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True))
    flat = probe.flatten().double()
    torch.testing.assert_close(out.value.flatten().double(), values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.flatten().double(), flat * dx)
    expected = (flat * ds).sum() / math.sqrt(48 * high)
    torch.testing.assert_close(step.grad.double().reshape(()), expected, rtol=1e-4, atol=1e-6)


def test_lsq_per_channel_counts_the_weights_of_a_channel() -> None:
    layer = QuantLinear(
        10, 3, bias=False, weight_quant=q.Int8WeightPerChannelLSQ, weight_bit_width=4
    )
    step = number(layer.weight_quant, "step")
    assert step.shape == (3, 1)
    layer.quant_weight().value.sum().backward()
    for row in range(3):
        s = float(step[row].detach())
        terms = [lsq(float(w), s, -8, 7)[2] for w in layer.weight.detach()[row]]
        assert math.isclose(
            float(step.grad[row]), sum(terms) / math.sqrt(10 * 7), rel_tol=1e-3, abs_tol=1e-5
        )


@pytest.mark.parametrize("name", ["Int8ActPerTensorLSQ", "Uint8ActPerTensorLSQ"])
def test_lsq_activations_start_from_the_first_batch_and_count_features(name) -> None:
    layer = QuantIdentity(getattr(q, name), bit_width=4)
    low, high = (-8, 7) if name[0] == "I" else (0, 15)
    first = torch.randn(5, 6)
    layer(first)
    step = number(layer.act_quant, "step")
    x = torch.randn(5, 6, requires_grad=True)
    out = layer(x)
    start = 2 * first.double().abs().mean() / math.sqrt(high)
    assert math.isclose(float(step.detach()), float(start), rel_tol=1e-6)
    out.sum().backward()
    rows = [lsq(float(v), float(step.detach()), low, high) for v in x.detach().flatten()]
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([r[1] for r in rows]))
    expected = sum(r[2] for r in rows) / math.sqrt(6 * high)
    assert math.isclose(float(step.grad), expected, rel_tol=1e-3, abs_tol=1e-5)


def test_lsq_plus_weights_start_three_deviations_out() -> None:
    layer = QuantLinear(
        64, 8, bias=False, weight_quant=q.Int8WeightPerTensorLSQPlus, weight_bit_width=4
    )
    w = layer.weight.detach().double()
    mean, sigma = w.mean(), w.std(correction=0)
    expected = max(abs(float(mean - 3 * sigma)), abs(float(mean + 3 * sigma))) / 8
    step = number(layer.weight_quant, "step")
    assert math.isclose(float(step.detach()), expected, rel_tol=1e-5)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 2.0])
def test_lsq_plus_activations(shift) -> None:
    layer = QuantIdentity(q.ShiftedUint8ActPerTensorLSQPlus, bit_width=3, return_quant_tensor=True)
    first = torch.randn(4, 9) + shift
    layer(first)
    x = (2 * torch.randn(4, 9) + shift).requires_grad_()
    out = layer(x)
    step, offset = number(layer.act_quant, "step"), number(layer.act_quant, "offset")
    s, beta = float(step.detach()), float(offset.detach())
    assert math.isclose(s, float(first.max() - first.min()) / 7, rel_tol=1e-6)
    assert math.isclose(beta, float(first.min()), rel_tol=1e-6)
    rows = [lsq(float(v) - beta, s, 0, 7) for v in x.detach().flatten()]
    values = torch.tensor([r[0] + beta for r in rows])
    torch.testing.assert_close(out.value.flatten(), values, rtol=1e-5, atol=1e-5)
    out.value.sum().backward()
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([r[1] for r in rows]))
    slowed = math.sqrt(9 * 7)
    assert math.isclose(
        float(step.grad), sum(r[2] for r in rows) / slowed, rel_tol=1e-3, abs_tol=1e-4
    )
    assert math.isclose(
        float(offset.grad), sum(1 - r[1] for r in rows) / slowed, rel_tol=1e-3, abs_tol=1e-4
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_pact(bits) -> None:
    layer = QuantReLU(q.Uint8ActPerTensorPACT, bit_width=bits, max_val=1.5)
    alpha = number(layer.act_quant, "step")
    assert float(alpha.detach()) == 1.5
    x = torch.linspace(-1, 3, 41, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    steps = 2**bits - 1
    expected = (x.detach().clamp(0, 1.5) * steps / 1.5).round() * 1.5 / steps
    torch.testing.assert_close(out.detach(), expected)
    assert torch.equal(x.grad, ((x > 0) & (x < 1.5)).float())
    assert math.isclose(float(alpha.grad), float((x >= 1.5).sum()), rel_tol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dorefa_weights(bits) -> None:
    layer = QuantLinear(
        8, 4, bias=False, weight_quant=q.Uint8WeightPerTensorDoReFa, weight_bit_width=bits
    )
    out = layer.quant_weight()
    w = layer.weight.detach().double().requires_grad_()
    steps = 2**bits - 1
    r = torch.tanh(w) / (2 * torch.tanh(w).abs().max()) + 0.5
    expected = 2 * (r * steps).round() / steps - 1
    torch.testing.assert_close(out.value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert out.value.abs().max() == 1 and out.is_valid and not out.signed
    probe = torch.randn(4, 8)
    (out.value * probe).sum().backward()
    (2 * r * probe.double()).sum().backward()  # rounding straight through
    torch.testing.assert_close(layer.weight.grad.double(), w.grad, rtol=1e-3, atol=1e-5)


def test_dorefa_of_one_bit_and_of_activations() -> None:
    layer = QuantLinear(8, 4, bias=False, weight_quant=q.BinaryWeightPerTensorDoReFa)
    w = layer.weight.detach()
    torch.testing.assert_close(layer.quant_weight().value, w.sign() * w.abs().mean())
    act = QuantIdentity(q.Uint8ActPerTensorDoReFa, bit_width=2)
    x = torch.linspace(-1, 2, 31, requires_grad=True)
    out = act(x)
    torch.testing.assert_close(out.detach(), (x.detach().clamp(0, 1) * 3).round() / 3)
    out.sum().backward()
    assert torch.equal(x.grad, ((x > 0) & (x < 1)).float())
    assert not list(act.parameters())


NAMES = [
    "Int8ActPerTensorLSQ",
    "Uint8ActPerTensorLSQ",
    "ShiftedUint8ActPerTensorLSQPlus",
    "Uint8ActPerTensorPACT",
]


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_error_of_a_bad_range(name) -> None:
    layer = QuantIdentity(getattr(q, name), bit_width=3)
    x = torch.rand(64, 16)
    layer(20 * x)  # a first batch unlike the rest
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        target = x if name != "Uint8ActPerTensorPACT" else 0.7 * torch.ones_like(x)
        loss = (layer(12 * x) / 12 - target).square().mean() * 100
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_state_and_copies(name) -> None:
    layer, other = (QuantIdentity(getattr(q, name), bit_width=3) for _ in range(2))
    x = torch.rand(4, 8)
    layer(x), layer(x), layer.eval(), other.eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.slow
def test_learned_steps_compile() -> None:
    for name in ("ShiftedUint8ActPerTensorLSQPlus", "Uint8ActPerTensorPACT"):
        eager = QuantIdentity(getattr(q, name), bit_width=3)
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
        for seed in range(3):
            x = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed)) * 5
            torch.testing.assert_close(compiled(x), eager(x))
