import pytest
import torch

from qframework.functional import (
    abs_binary_sign_grad,
    binary_sign_ste,
    ceil_ste,
    dpu_round_ste,
    floor_ste,
    round_ste,
    round_to_zero_ste,
    scalar_clamp_min_ste,
    scalar_clamp_ste,
    tensor_clamp,
    tensor_clamp_ste,
    ternary_sign_ste,
)

HALVES = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (round_ste, [0, 2, 2, 0, -2, -2]),
        (floor_ste, [0, 1, 2, -1, -2, -3]),
        (ceil_ste, [1, 2, 3, 0, -1, -2]),
        (round_to_zero_ste, [0, 1, 2, 0, -1, -2]),
        (dpu_round_ste, [0, 2, 2, 0, -1, -2]),
        (binary_sign_ste, [1, 1, 1, -1, -1, -1]),
        (ternary_sign_ste, [1, 1, 1, -1, -1, -1]),
    ],
)
def test_steps_go_forward_and_gradients_pass_unchanged(function, expected) -> None:
    x = HALVES.clone().requires_grad_()
    y = function(x)
    assert y.tolist() == expected
    upstream = torch.arange(6.0)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_dpu_rounding_differs_from_half_to_even_only_at_negative_halves() -> None:
    x = torch.linspace(-4, 4, 1601)
    differ = x[dpu_round_ste(x) != round_ste(x)]
    assert differ.tolist() == [-3.5, -1.5]


def test_binary_sign_of_zero_is_one() -> None:
    assert binary_sign_ste(torch.tensor([0.0, -0.0])).tolist() == [1, 1]


def test_absolute_value_has_gradient_one_at_zero() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y = abs_binary_sign_grad(x)
    assert y.tolist() == [2, 0, 3]
    y.sum().backward()
    assert x.grad.tolist() == [-1, 1, 1]


def test_straight_through_clamps_pass_the_gradient_outside_too() -> None:
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    for clamp in (
        lambda x: scalar_clamp_ste(x, -1.0, 1.0),
        lambda x: scalar_clamp_min_ste(x, -1.0).clamp(max=1e9),
        lambda x: tensor_clamp_ste(x, low, high),
    ):
        x = torch.tensor([-3.0, 0.5, 0.9], requires_grad=True)
        clamp(x).sum().backward()
        assert x.grad.tolist() == [1, 1, 1]
    assert low.grad is None
    assert high.grad is None


def test_true_clamp_gives_the_gradient_outside_to_the_bound() -> None:
    x = torch.tensor([-3.0, -1.0, 0.5, 1.0, 2.0, 5.0], requires_grad=True)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = tensor_clamp(x, low, high)
    assert y.tolist() == [-1, -1, 0.5, 1, 1, 1]
    y.backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 0, 0]
    assert (low.grad.item(), high.grad.item()) == (1, 11)


def test_nan_stays_nan() -> None:
    nan = torch.tensor(float("nan"))
    for function in (round_ste, floor_ste, ceil_ste, dpu_round_ste, round_to_zero_ste):
        assert function(nan).isnan()
    assert tensor_clamp(nan, torch.tensor(0.0), torch.tensor(1.0)).isnan()


def test_torch_func_transforms_work() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(torch.func.vmap(round_ste)(x), x.round())
    gradient = torch.func.vmap(torch.func.grad(lambda v: (round_ste(v) * v.detach()).sum()))(x)
    assert torch.equal(gradient, x)
