"""Convolutions and matrix products whose quantized input is made again in the backward pass instead of being saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from qframework.functional import add_kernel, convolution, linear, transposed_convolution
from qframework.functional.products import Numbers
from qframework.kernels.autograd import Context, is_compiling
from qframework.kernels.recomputation import Origin, origin_of
from qframework.quant_tensor import TensorLike


def _save(ctx: Context, weight: Tensor, origin: Origin, *how: Any) -> None:
    ctx.how = (origin[3:], *how)
    ctx.save_for_backward(weight, *origin[:3])


def _operands(ctx: Context) -> tuple[Tensor, Tensor]:
    """Weight and quantized input."""
    weight, *before = ctx.saved_tensors
    origin = Origin(*before, *ctx.how[0])
    return weight, origin.differentiable() if torch.is_grad_enabled() else origin.values()


class _Convolution(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin, how: Any
    ) -> Tensor:
        _save(ctx, weight, origin, *how)
        return torch.convolution(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        weight, x = _operands(ctx)
        needed = ctx.needs_input_grad[:3]
        of_bias = [grad.shape[1]] if needed[2] else None
        grads = torch.ops.aten.convolution_backward(grad, x, weight, of_bias, *ctx.how[1:], needed)
        return *grads, None, None


class _Linear(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin
    ) -> Tensor:
        _save(ctx, weight, origin)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        weight, x = _operands(ctx)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return rows.mm(weight).view(x.shape), grad_weight, grad_bias, None, None


def _origin(x: TensorLike, weight: TensorLike) -> Origin | None:
    """What to save instead of ``x``; None where that is ``x`` itself."""
    if is_compiling() or type(x) is not Tensor or x.grad_fn is None or not weight.requires_grad:
        return None
    return origin_of(x)


def _serves_linear(x: TensorLike, weight: TensorLike, *_: object) -> bool:
    return _origin(x, weight) is not None and x.dim() >= 2 and weight.dim() == 2


@add_kernel(linear, "recomputing", _serves_linear)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    return super(Function, _Linear).apply(x, weight, bias, _origin(x, weight))  # type: ignore[misc]


def _serves_convolution(
    x: TensorLike, weight: TensorLike, bias: object, stride: object, padding: object, *_: object
) -> bool:
    if _origin(x, weight) is None:
        return False
    return bool(x.dim() == weight.dim()) and not isinstance(padding, str)


@add_kernel(convolution, "recomputing", _serves_convolution)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    dilation: Numbers,
    groups: int,
) -> Tensor:
    return _call(x, weight, bias, stride, padding, dilation, False, 0, groups)


@add_kernel(transposed_convolution, "recomputing", _serves_convolution)
def _transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Tensor:
    return _call(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    dilation: Numbers,
    transposed: bool,
    output_padding: Numbers,
    groups: int,
) -> Tensor:
    axes = weight.dim() - 2
    steps, pads, gaps, output_pads = (
        [n] * axes if isinstance(n, int) else list(n)
        for n in (stride, padding, dilation, output_padding)
    )
    how = (steps, pads, gaps, transposed, output_pads, groups)
    origin = _origin(x, weight)
    return super(Function, _Convolution).apply(x, weight, bias, origin, how)  # type: ignore[misc, no-any-return]
