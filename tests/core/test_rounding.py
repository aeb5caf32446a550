import math

import numpy as np
import pytest
import torch

from qframework.core.stochastic_round import StochasticRoundSte
from qframework.layers import QuantIdentity, QuantLinear
from qframework.quantizers import Int8ActPerTensorFloat

RULES = ["round", "ceil", "floor", "round_to_zero", "dpu", "learned_round", "stochastic_round"]


def test_stochastic_rounding_is_unbiased() -> None:
    rounding = StochasticRoundSte(seed=0)
    x = torch.linspace(-2, 2, 41)
    n = 20_000
    mean = torch.stack([rounding(x) for _ in range(n)]).mean(0)
    fraction = x - x.floor()
    deviation = (fraction * (1 - fraction) / n).sqrt()
    assert ((mean - x).abs() <= 5 * deviation + 1e-6).all()


def test_stochastic_rounding_follows_its_seed_and_is_exact_in_evaluation() -> None:
    x = torch.rand(100) * 10
    first, second, other = (StochasticRoundSte(seed=s) for s in (1, 1, 2))
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))
    assert torch.equal(first.eval()(x), x.round())
    assert not torch.equal(
        StochasticRoundSte(deterministic_inference=False, seed=1).eval()(x), x.round()
    )


def test_stochastic_rounding_passes_the_gradient() -> None:
    x = torch.rand(9, requires_grad=True)
    StochasticRoundSte(seed=0)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(9))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_integers_in_evaluation(rule) -> None:
    layer = QuantLinear(6, 5, weight_float_to_int_impl_type=rule, weight_bit_width=3).eval()
    q = layer.quant_weight()
    assert q.is_valid
    assert ((q.value - layer.weight).abs() <= 1.001 * q.scale).all()


def test_learned_rounding_is_one_number_a_weight_and_saved() -> None:
    layer = QuantLinear(6, 5, weight_float_to_int_impl_type="learned_round")
    key = "weight_quant.tensor_quant.int_quant.float_to_int_impl.value"
    assert layer.state_dict()[key].shape == (5, 6)
    with pytest.raises(ValueError, match="can't be shared"):
        QuantLinear(6, 5, weight_quant=layer.weight_quant)


def test_he_scaling_starts_from_the_fan_in() -> None:
    layer = QuantLinear(6, 5, weight_scaling_impl_type="he")
    assert (layer.weight_quant.scale() * 127).item() == pytest.approx(math.sqrt(2 / 6))


@pytest.mark.parametrize(("granularity", "shape"), [("tensor", (1,)), ("channel", (5,))])
def test_a_learned_sigma_has_the_shape_of_its_scales(granularity, shape) -> None:
    layer = QuantLinear(
        6,
        5,
        weight_scaling_stats_op="mean_learn_sigma_std",
        weight_sigma=3.0,
        weight_scaling_per_output_type=granularity,
    )
    layer(torch.randn(2, 6)).sum().backward()
    sigma = layer.weight_quant.tensor_quant.scaling_impl.scaling_stats_impl.value
    assert sigma.shape == (shape or (1,))
    assert sigma.grad.abs().sum() > 0


TIES = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -2.3, -1.7, 1.2, 1.9, 3.0, -3.0])
EXACT = {
    "round": np.rint,
    "ceil": np.ceil,
    "floor": np.floor,
    "round_to_zero": np.trunc,
    # halves of negative numbers go up
    "dpu": lambda v: np.where((v < 0) & (v - np.floor(v) == 0.5), np.ceil(v), np.rint(v)),
}


@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("zero_point", [False, True])
def test_activations_are_rounded_by_the_rule(rule, zero_point) -> None:
    layer = QuantIdentity(
        Int8ActPerTensorFloat,
        bit_width=4,
        scaling_impl_type="const",
        min_val=-8.0,
        max_val=8.0,
        float_to_int_impl_type=rule,
        **({"zero_point_impl": Three} if zero_point else {}),
        return_quant_tensor=True,
    )
    x = TIES.clone().requires_grad_()
    out = layer(x)
    expected = EXACT[rule](TIES.numpy() + 3 * zero_point).clip(-8, 7) - 3 * zero_point
    assert np.array_equal(out.value.detach().numpy(), expected)
    out.value.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # straight through, nothing is clipped


class Three(torch.nn.Module):
    """A zero point of 3."""

    symmetric, quantize_zero_point = False, True

    def forward(self, x, scale, bit_width):
        return 3 * torch.ones_like(scale)


@pytest.mark.parametrize("rule", EXACT)
def test_weights_are_rounded_by_the_rule(rule) -> None:
    layer = QuantLinear(
        6,
        2,
        bias=False,
        weight_bit_width=4,
        weight_scaling_impl_type="const",
        weight_scaling_const=7.0,
        weight_float_to_int_impl_type=rule,
    )
    layer.weight.data.copy_(TIES.reshape(2, 6))
    got = layer.quant_weight().value.detach().numpy().reshape(-1)
    assert np.array_equal(got, EXACT[rule](TIES.numpy()))


def test_stochastic_activations_are_unbiased_in_training_and_nearest_in_evaluation() -> None:
    layer = QuantIdentity(
        bit_width=4,
        scaling_impl_type="const",
        min_val=-8.0,
        max_val=8.0,
        float_to_int_impl_type="stochastic_round",
        seed=3,
    )
    x = torch.linspace(-3, 3, 25)
    n = 4000
    mean = torch.stack([layer(x) for _ in range(n)]).mean(0)
    fraction = x - x.floor()
    deviation = (fraction * (1 - fraction) / n).sqrt()
    assert ((mean - x).abs() <= 5 * deviation + 1e-6).all()
    assert torch.equal(layer.eval()(x), x.round())


def test_stochastic_weights_are_unbiased() -> None:
    layer = QuantLinear(
        8,
        4,
        bias=False,
        weight_bit_width=3,
        weight_float_to_int_impl_type="stochastic_round",
        weight_seed=1,
    )
    n = 3000
    with torch.no_grad():
        mean = torch.stack([layer.quant_weight().value for _ in range(n)]).mean(0)
    scale = layer.weight_quant.scale()
    assert ((mean - layer.weight).abs() <= 5 * 0.5 * scale / n**0.5 + 1e-6).all()


@pytest.mark.parametrize("kind", ["hard_sigmoid", "sigmoid", "identity"])
def test_learned_rounding_learns_which_way(kind) -> None:
    layer = QuantLinear(
        6,
        2,
        bias=False,
        weight_bit_width=4,
        weight_scaling_impl_type="const",
        weight_scaling_const=7.0,
        weight_float_to_int_impl_type="learned_round",
        weight_learned_round_impl_type=kind,
    )
    layer.weight.data.copy_(torch.arange(12.0).reshape(2, 6) / 2 - 2.8)
    number = layer.weight_quant.tensor_quant.int_quant.float_to_int_impl.value
    up = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    target = torch.where(up, layer.weight.detach().ceil(), layer.weight.detach().floor())
    optimizer = torch.optim.Adam([number], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (layer.quant_weight().value - target).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.eval().quant_weight().value, target)


def test_learned_rounding_is_not_for_activations() -> None:
    with pytest.raises(ValueError, match="no fixed elements"):
        QuantIdentity(float_to_int_impl_type="learned_round")
