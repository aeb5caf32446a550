"""Gradients are written where incoming ones were, but for those that somebody else can see."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

import qframework
from qframework import quantizers as q
from qframework.kernels import autograd
from qframework.layers import QuantIdentity, QuantLinear

SIZE = 128


def learned(x: torch.Tensor) -> torch.Tensor:
    act = QuantIdentity(q.Int8ActPerTensorFloat, scaling_impl_type="parameter", scaling_init=1.0)
    return act(x)


def of_weight(quantizer: object) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantized(x: torch.Tensor) -> torch.Tensor:
        layer = QuantLinear(SIZE, SIZE, bias=False, weight_quant=quantizer)
        return layer.weight_quant(x).value

    return quantized


QUANTIZED = {
    "learned": learned,
    "absmax": of_weight(q.Int8WeightPerTensorFloat),
    "minifloat": of_weight(q.Fp8e4m3Weight),
}


class _Given(torch.autograd.Function):
    """Gives a gradient that is said."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.gradient(), None


def inputs() -> torch.Tensor:
    x = torch.linspace(-3, 3, SIZE * SIZE).reshape(SIZE, SIZE).requires_grad_()
    return x * 1


@pytest.fixture(params=["auto", "fused"], autouse=True)
def kernels(request):
    with qframework.settings.use(kernels=request.param):
        yield request.param


@pytest.mark.parametrize("quantized", QUANTIZED.values(), ids=QUANTIZED)
def test_memory_of_a_gradient_that_a_hook_keeps_is_left_alone(quantized) -> None:
    y, kept = quantized(inputs()), []
    y.register_hook(lambda g: kept.extend((g.untyped_storage(), g.clone())))
    (y * y).sum().backward()
    memory, expected = kept
    assert torch.equal(torch.empty(0).set_(memory, 0, expected.shape), expected)


SHARED = {
    "numpy": lambda t: torch.from_numpy(t.numpy()[:]),
    "dlpack": lambda t: from_dlpack(to_dlpack(t)),
    "bytes": lambda t: torch.frombuffer(memoryview(t.numpy()).cast("B"), dtype=t.dtype).view(SIZE, SIZE),
    "lazy": torch._lazy_clone,
    "detached": torch.detach,
}  # fmt: skip


@pytest.mark.parametrize("quantized", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.filterwarnings("ignore")
def test_a_gradient_in_memory_of_somebody_else_is_left_alone(shared, quantized) -> None:
    held = torch.full((SIZE, SIZE), 2.0)
    x = inputs()
    _Given.apply(quantized(x), lambda: shared(held)).sum().backward()
    assert held.eq(2).all()


def test_one_that_nobody_else_has_is_overwritten(kernels) -> None:
    x, places = inputs(), []
    y = learned(x)
    y.register_hook(lambda g: places.append(g.data_ptr()))
    x.register_hook(lambda g: places.append(g.data_ptr()))
    (y * y).sum().backward()
    assert places[0] == places[1] or kernels == "fused"
    assert x.numel() >= autograd._WORTH
