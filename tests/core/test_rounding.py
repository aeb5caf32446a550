import math

import pytest
import torch

from qframework.core.stochastic_round import StochasticRoundSte
from qframework.layers import QuantLinear

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


@pytest.mark.parametrize(("granularity", "shape"), [("tensor", ()), ("channel", (5,))])
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
    assert sigma.shape == shape
    assert sigma.grad.abs().sum() > 0
