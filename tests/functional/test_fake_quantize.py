"""What quantization to integers means: by the definition, and by what runs."""

import pytest
import torch

from qframework.functional import IntegerGrid, fake_quantize

FUNCTIONS = {"definition": fake_quantize.definition, "what runs": fake_quantize}


@pytest.fixture(params=FUNCTIONS)
def quantize(request):
    return FUNCTIONS[request.param]


def test_values_are_on_the_grid_and_inside_the_range(quantize) -> None:
    x = torch.tensor([-9.0, -1.1, -0.25, 0.25, 0.75, 0.8, 9.0], dtype=torch.float64)
    y = quantize(x, torch.tensor(0.5, dtype=torch.float64), None, IntegerGrid(-2.0, 3.0))
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 1.5]


def test_a_zero_point_moves_the_range(quantize) -> None:
    x = torch.tensor([-9.0, -1.1, 0.0, 0.9, 9.0])
    y = quantize(x, torch.tensor(0.5), torch.tensor(3.0), IntegerGrid(0.0, 7.0))
    assert y.tolist() == [-1.5, -1.0, 0.0, 1.0, 2.0]


def test_a_relu_in_front_has_its_own_gradient(quantize) -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 9.0], requires_grad=True)
    for minimum, clamp_gradient in ((0.0, True), (-8.0, True), (0.0, False)):
        grid = IntegerGrid(minimum, 3.0, "round", clamp_gradient)
        y = quantize(x, torch.tensor(0.5), None, grid, True)
        assert y.tolist() == [0.0, 0.0, 0.5, 1.5]
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.tolist() == [0.0, 0.0, 1.0, 0.0 if clamp_gradient else 1.0]


def test_scale_gradient_is_that_of_lsq(quantize) -> None:
    """Inside q - x / s, outside the bound (https://arxiv.org/abs/1902.08153, equation 3)."""
    x = torch.tensor([0.3, 1.6, -9.0, 9.0], dtype=torch.float64)
    zero, low, high = (torch.tensor(v, dtype=torch.float64) for v in (0.0, -4.0, 3.0))
    for grid in (IntegerGrid(low, high), IntegerGrid(-4.0, 3.0)):
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        quantize(x, scale, zero, grid).sum().backward()
        expected = (1 - 0.6) + (3 - 3.2) - 4 + 3
        assert scale.grad.item() == pytest.approx(expected, rel=1e-12)


def test_a_clamp_that_is_differentiated_gives_the_gradient_outside_to_the_bound(quantize) -> None:
    x = torch.tensor([-9.0, 0.3, 9.0, 8.0], requires_grad=True)
    low, high = torch.tensor(-4.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    for clamp_gradient, expected in ((True, (-0.5, 1.0)), (False, (0.0, 0.0))):
        grid = IntegerGrid(low, high, "round", clamp_gradient)
        y = quantize(x, torch.tensor(0.5), None, grid)
        upstream = torch.tensor([-1.0, 5.0, 1.0, 1.0])
        found = torch.autograd.grad(y, (x, low, high), upstream, materialize_grads=True)
        passed = [0.0, 5.0, 0.0, 0.0] if clamp_gradient else upstream.tolist()
        assert found[0].tolist() == passed
        assert tuple(g.item() for g in found[1:]) == expected


def test_half_precision_is_rounded_in_float32(quantize) -> None:
    x = torch.linspace(-1, 1, 257).bfloat16()
    scale = torch.tensor(1 / 127)
    bounds = torch.tensor(-127.0), torch.tensor(127.0)
    expected = (x.float() / scale).round().clamp(-127, 127) * scale
    for zero_point, grid in (
        (torch.zeros(()), IntegerGrid(*bounds)),
        (None, IntegerGrid(-127.0, 127.0)),
    ):
        y = quantize(x, scale, zero_point, grid)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected.bfloat16())


def test_torch_func_transforms_work(quantize) -> None:
    x = torch.randn(3, 6)
    zero, low, high = torch.zeros(()), torch.tensor(-8.0), torch.tensor(7.0)

    def loss(v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (quantize(v, scale, zero, IntegerGrid(low, high)) ** 2).sum()

    scale = torch.tensor(0.1)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, scale)
    for row in range(3):
        v, s = x[row].clone().requires_grad_(), scale.clone().requires_grad_()
        loss(v, s).backward()
        torch.testing.assert_close(per_sample[0][row], v.grad)
        torch.testing.assert_close(per_sample[1][row], s.grad)
