"""Activations quantized by a learned scale in one step, against the same written out."""

from collections.abc import Iterator

import pytest
import torch
from kernel_case import assert_as_defined, kept_by, values
from torch import Tensor

import qframework
from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    fake_quantize,
    learned_scale,
    quantize_by_learned_scale,
)
from qframework.kernels import autograd
from qframework.kernels.native import tensors

GRID = IntegerGrid(0.0, 15.0)
LARGE = (9, 37, 1021)


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> Iterator[None]:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param):
        yield


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_learned_scale_quantizes_as_written_out(shape, relu) -> None:
    rule = ScaleRule("learned", 16.0, minimum=1e-10)

    def written_out(x: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        scale = stored.abs() / 16
        x = torch.relu(x) if relu else x
        return fake_quantize(x, scale, None, GRID), scale

    assert_as_defined(
        lambda x, stored: quantize_by_learned_scale(x, stored, GRID, rule, relu),
        values(*shape),
        torch.tensor(4.0),
        expected=written_out,
    )


@pytest.mark.parametrize("domain", ["fp", "log_fp", "power_of_two"])
def test_the_scale_is_that_of_the_stored_number(domain) -> None:
    rule = ScaleRule("learned", 16.0, domain, minimum=0.01)
    x, stored = values(5, 40), torch.tensor(1.3)
    with torch.no_grad():
        y, scale = quantize_by_learned_scale(x, stored, GRID, rule)
        assert torch.equal(scale, learned_scale(stored, rule))
        assert torch.equal(y, fake_quantize(x, scale, None, GRID))


def test_one_tensor_is_kept_for_the_backward_pass() -> None:
    x, stored = torch.randn(64, 64, requires_grad=True) * 1.0, torch.tensor(2.0, requires_grad=True)
    rule = ScaleRule("learned", 255.0)
    grid = IntegerGrid(0.0, 255.0)
    kept = kept_by(lambda: quantize_by_learned_scale(x, stored, grid, rule, True))
    assert sorted(t.numel() for t in kept) == [1, 1, 4096]


def _kept_by_a_hook(y: Tensor, keep: list) -> None:
    y.register_hook(keep.append)
    y.square().sum().backward()


def _kept_by_the_tensor(y: Tensor, keep: list) -> None:
    y.retain_grad()
    y.square().sum().backward()
    keep.append(y.grad)


def _given_by_a_user(y: Tensor, keep: list) -> None:
    keep.append(2 * y.detach())
    y.backward(keep[0])


def _given_twice(y: Tensor, keep: list) -> None:
    keep.append(y.detach().clone())
    y.backward(keep[0], retain_graph=True)
    y.backward(keep[0])
    keep[0] = 2 * keep[0]


def _to_a_sum(y: Tensor, keep: list) -> None:
    other = torch.zeros_like(y, requires_grad=True)
    (y + other).square().sum().backward()
    keep.append(other.grad)


@pytest.mark.parametrize(
    "ask", [_kept_by_a_hook, _kept_by_the_tensor, _given_by_a_user, _given_twice, _to_a_sum]
)
def test_a_gradient_that_somebody_else_has_is_not_written_to(ask, monkeypatch) -> None:
    monkeypatch.setattr(autograd, "_WORTH", 1)
    rule, grid = ScaleRule("learned", 16.0), IntegerGrid(0.0, 15.0)
    x, stored = values(9, 37).requires_grad_(), torch.tensor(4.0, requires_grad=True)
    y, keep = quantize_by_learned_scale(x * 1, stored, grid, rule, True)[0], []
    ask(y, keep)
    assert torch.equal(keep[0], 2 * y.detach())
    z = quantize_by_learned_scale.definition(x, stored, grid, rule, True)[0]
    expected = torch.autograd.grad(z, (x, stored), 2 * z.detach())
    torch.testing.assert_close((x.grad, stored.grad), expected)


def test_a_gradient_that_nobody_else_has_becomes_that_of_the_values(kernels, monkeypatch) -> None:
    if qframework.settings.kernels != "auto":
        pytest.skip("torch's functions write gradients of their own")
    monkeypatch.setattr(autograd, "_WORTH", 1)
    rule, places = ScaleRule("learned", 16.0), []
    x, stored = values(9, 37).requires_grad_(), torch.tensor(4.0, requires_grad=True)
    given = x * 1
    given.register_hook(lambda g: places.append(g.data_ptr()))
    y = quantize_by_learned_scale(given, stored, IntegerGrid(0.0, 15.0), rule)[0]
    y.register_hook(lambda g: places.append(g.data_ptr()))
    y.square().sum().backward()
    assert places[0] == places[1]


@pytest.mark.parametrize("domain", ["fp", "log_fp", "power_of_two"])
def test_a_parameter_of_one_element_stands_for_a_scale_without_dimensions(domain) -> None:
    rule = ScaleRule("learned", 16.0, domain, minimum=0.01)
    x, found = values(9, 37), []
    for shape in ((), (1,)):
        stored = torch.full(shape, 1.3, requires_grad=True)
        leaf = x.clone().requires_grad_()
        y, scale = quantize_by_learned_scale(leaf, stored, GRID, rule)
        assert scale.shape == ()
        (y.square().sum() + scale).backward()
        assert stored.grad.shape == shape
        found.append((y, scale, leaf.grad, stored.grad.reshape(())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
