"""Weights quantized by their largest magnitude in one step, against the same written out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_case import assert_as_defined, gradients, kept_by, values
from torch import Tensor

import qframework
from qframework.functional import (
    IntegerGrid,
    MinifloatFormat,
    MinifloatGrid,
    ScaleRule,
    fake_quantize,
    quantize_by_absmax,
    round_ste,
    scalar_clamp_min_ste,
)
from qframework.kernels import native
from qframework.kernels.native import tensors
from qframework.kernels.recomputation import origin_of

GRID = IntegerGrid(-128.0, 127.0, "round", False)
E4M3 = MinifloatFormat(3, 7, 448.0)


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> Iterator[None]:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param):
        yield


def written_out(rule: ScaleRule) -> Callable[[Tensor], Any]:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        top = x.abs().max()
        if rule.channel_axis is not None:
            top = x.abs().transpose(0, rule.channel_axis).flatten(1).max(1).values
        top = scalar_clamp_min_ste(top.reshape(rule.shape), rule.minimum)
        if rule.domain == "power_of_two":
            top = torch.exp2(round_ste(torch.log2(top)))
        scale = top / rule.threshold
        return fake_quantize(x, scale, None, GRID), scale

    return quantize


@pytest.mark.parametrize("shape", [(6, 5), (64, 5003)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("domain", ["fp", "power_of_two"])
def test_a_weight_is_quantized_as_written_out(shape, per_channel, domain) -> None:
    scale_shape, axis = ((shape[0], 1), 0) if per_channel else ((), None)
    rule = ScaleRule("absmax", 128.0, domain, "round", 1e-10, scale_shape, axis)
    x = values(*shape, step=1 / 1024)
    x.view(-1)[3] = 16.0  # per tensor the scale is a power of two: float32 and float64 round alike
    if per_channel:
        x[:, 2] = 16.0
    x = x.clamp(-16, 16)
    assert_as_defined(lambda x: quantize_by_absmax(x, GRID, rule), x, expected=written_out(rule))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_may_be_along_any_axis(axis) -> None:
    sizes = [3, 4, 5]
    shape = tuple(n if i == axis else 1 for i, n in enumerate(sizes))
    rule = ScaleRule("absmax", 7.0, shape=shape, channel_axis=axis)
    grid = IntegerGrid(-7.0, 7.0, "round", False)
    x = torch.randn(*sizes, requires_grad=True)
    y, scale = quantize_by_absmax(x, grid, rule)
    others = tuple(i for i in range(3) if i != axis)
    torch.testing.assert_close(scale, x.detach().abs().amax(others, keepdim=True) / 7)
    assert (y / scale).abs().max() <= 7.001
    (grad,) = torch.autograd.grad(scale.sum(), x, retain_graph=True)
    assert grad.count_nonzero() == sizes[axis]
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equals_share_the_gradient_of_a_tensor_and_the_first_gets_that_of_a_channel(axis) -> None:
    x = torch.tensor([[4.0, 1.0, -4.0], [2.0, 4.0, -4.0]], requires_grad=True)
    shape = () if axis is None else ((2, 1), (1, 3))[axis]
    rule = ScaleRule("absmax", 4.0, shape=shape, channel_axis=axis)
    _, scale = quantize_by_absmax(x, GRID, rule)
    (grad,) = torch.autograd.grad(scale.sum(), x)
    expected = {
        None: [[1 / 16, 0, -1 / 16], [0, 1 / 16, -1 / 16]],
        0: [[0.25, 0, 0], [0, 0.25, 0]],
        1: [[0.25, 0, -0.25], [0, 0.25, 0]],
    }
    assert grad.tolist() == expected[axis]


@pytest.mark.parametrize("axis", [None, 0])
def test_layouts_of_memory_give_the_same(axis) -> None:
    x = values(6, 4, 5, 7, step=1 / 32)
    shape = () if axis is None else (6, 1, 1, 1)
    rule = ScaleRule("absmax", 128.0, minimum=0.01, shape=shape, channel_axis=axis)
    found = []
    for laid_out in (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        leaf = laid_out.clone(memory_format=torch.preserve_format).requires_grad_()
        y, scale = quantize_by_absmax(leaf, GRID, rule)
        grads = gradients([y, scale], [leaf], [y.detach().cos(), scale.detach().sin()])
        found.append((y, scale, *grads))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_nothing_of_the_size_of_a_weight_is_kept_but_the_weight() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    for rule in (
        ScaleRule("absmax", 127.0),
        ScaleRule("absmax", 127.0, shape=(64, 1), channel_axis=0),
    ):
        kept = kept_by(lambda rule=rule: quantize_by_absmax(weight, GRID, rule))
        assert {t.data_ptr() for t in kept if t.numel() > 64} == {weight.data_ptr()}


def test_a_clamp_that_is_differentiated_is_that_of_the_definition() -> None:
    x, grid = values(6, 5), IntegerGrid(-100.0, 100.0)
    rule = ScaleRule("absmax", 128.0, minimum=0.01)
    assert any(kernel.serves(x, grid, rule) for kernel in quantize_by_absmax.kernels)
    found = []
    for kernels in (qframework.settings.kernels, "reference"):
        leaf = x.clone().requires_grad_()
        with qframework.settings.use(kernels=kernels):
            y, scale = quantize_by_absmax(leaf, grid, rule)
        found.append((y, scale, torch.autograd.grad(y.sum(), leaf)[0]))
    (y, scale, grad), (z, expected, other) = found
    assert torch.equal(y, z) and torch.equal(scale, expected)
    torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("grid", [GRID, MinifloatGrid(E4M3)])
def test_groups_along_any_axis_are_those_of_the_last_one(axis, grid, kernels, monkeypatch) -> None:
    """As groups of channels are in images, which C++ functions take once they are moved."""
    called: list[str] = []
    for name in ("row_absmax", "row_tops", "absmax_gradients", "quantize"):
        function = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, f=function, n=name: (called.append(n), f(*a))[1]
        )
    x = values(8, 16, 24).to(torch.float32)
    found = []
    for reduced, moved in ((axis, x), (-1, x.movedim(axis, -1).contiguous())):
        rule = ScaleRule("absmax", 128.0, minimum=2.0**-30, reduced_axis=reduced)
        leaf = moved.clone().requires_grad_()
        y, scale = quantize_by_absmax(leaf, grid, rule)
        assert y.is_contiguous()
        (grad,) = gradients([y, scale], [leaf], [y.detach().cos(), scale.detach().sin()])
        again = origin_of(y)
        found.append((y, scale, grad) if again is None else (y, scale, grad, again.values()))
        if qframework.settings.kernels == "auto" and native.available():
            assert {"row_absmax", "absmax_gradients"} <= set(called) and again is not None
    for one, other in zip(*found, strict=True):
        back = one.movedim(axis, -1)
        torch.testing.assert_close(back, other, rtol=1e-6, atol=1e-6)
