import itertools

import pytest
import torch

from qframework.functional import ROUNDINGS, fake_quantize, fake_quantize_reference

GRANULARITIES = {"tensor": (), "channel": (5, 1), "element": (5, 7)}


def operands(dtype: torch.dtype, granularity: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = GRANULARITIES[granularity]
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.3
    zero_point = torch.randint(0, 4, shape, generator=generator).double()
    bounds = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(7.0, dtype=torch.float64)]
    return [t.to(dtype).requires_grad_() for t in (x, scale, zero_point, *bounds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("granularity", "rounding", "masked"),
    list(itertools.product(GRANULARITIES, ROUNDINGS, [True, False])),
)
def test_fused_equals_composed(granularity, rounding, masked, dtype) -> None:
    fused, composed = operands(dtype, granularity), operands(dtype, granularity)
    y = fake_quantize(*fused, rounding, masked)
    z = fake_quantize_reference(*composed, rounding, masked)
    assert torch.equal(y, z)  # bit for bit
    upstream = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(upstream.to(dtype))
    z.backward(upstream.to(dtype))
    for a, b in zip(fused, composed, strict=True):
        mine = torch.zeros_like(a) if a.grad is None else a.grad
        other = torch.zeros_like(b) if b.grad is None else b.grad
        # The fused scale gradient sums the small differences, the composed one large terms that cancel.
        top = max(other.abs().max().item(), upstream.abs().sum().item())
        assert (mine - other).abs().max().item() <= 1e-6 * top


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("rounding", "masked"), list(itertools.product(ROUNDINGS, [True, False])))
def test_the_fixed_range_equals_the_general_case(rounding, masked, granularity) -> None:
    x, scale, *_ = operands(torch.float64, granularity)
    y_fixed = fake_quantize(x, scale, None, -4.0, 3.0, rounding, masked)
    zero, low, high = (torch.tensor(v, dtype=torch.float64) for v in (0.0, -4.0, 3.0))
    y_general = fake_quantize(x, scale, zero, low, high, rounding, masked)
    assert torch.equal(y_fixed, y_general)
    upstream = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(y_fixed, (x, scale), upstream),
        torch.autograd.grad(y_general, (x, scale), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, scale, None, -4.0, 3.0, rounding, masked), y_fixed)


def test_scale_gradient_is_that_of_lsq() -> None:
    """Inside q - x / s, outside the bound (https://arxiv.org/abs/1902.08153, equation 3)."""
    x = torch.tensor([0.3, 1.6, -9.0, 9.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    zero, low, high = (torch.tensor(v, dtype=torch.float64) for v in (0.0, -4.0, 3.0))
    fake_quantize(x, scale, zero, low, high).sum().backward()
    expected = (1 - 0.6) + (3 - 3.2) - 4 + 3
    assert scale.grad.item() == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_rounded_in_float32() -> None:
    x = torch.linspace(-1, 1, 257).bfloat16()
    scale = torch.tensor(1 / 127)
    y = fake_quantize(x, scale, torch.zeros(()), torch.tensor(-127.0), torch.tensor(127.0))
    assert y.dtype == torch.bfloat16
    expected = (x.float() / scale).round().clamp(-127, 127) * scale
    assert torch.equal(y, expected.bfloat16())


def test_torch_func_transforms_work() -> None:
    x = torch.randn(3, 6)
    zero, low, high = torch.zeros(()), torch.tensor(-8.0), torch.tensor(7.0)

    def loss(v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(v, scale, zero, low, high) ** 2).sum()

    scale = torch.tensor(0.1)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, scale)
    for row in range(3):
        v, s = x[row].clone().requires_grad_(), scale.clone().requires_grad_()
        loss(v, s).backward()
        torch.testing.assert_close(per_sample[0][row], v.grad)
        torch.testing.assert_close(per_sample[1][row], s.grad)
