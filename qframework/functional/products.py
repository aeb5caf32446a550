"""Convolutions and matrix products whose quantized input is made anew in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qframework.functional.fixed_range import _FixedRange
from qframework.functional.origin import Origin, origin_of

Numbers = int | Sequence[int]


def _keep(ctx: Any, weight: Tensor, origin: Origin) -> None:
    ctx.quantized_by = origin.how
    ctx.save_for_backward(weight, *origin[:3])


def _operands(ctx: Any) -> tuple[Tensor, Tensor]:
    """Weight and quantized input."""
    weight, *before = ctx.saved_tensors
    return weight, _FixedRange.forward(*before, *ctx.quantized_by)  # type: ignore[call-arg]


class _Convolution(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin, how: Any
    ) -> Tensor:
        _keep(ctx, weight, origin)
        ctx.how = how
        return torch.convolution(x, weight, bias, *how)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight, x = _operands(ctx)
        needed = ctx.needs_input_grad[:3]
        of_bias = [grad.shape[1]] if needed[2] else None
        grads = torch.ops.aten.convolution_backward(grad, x, weight, of_bias, *ctx.how, needed)
        return *grads, None, None


class _Linear(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin
    ) -> Tensor:
        _keep(ctx, weight, origin)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight, x = _operands(ctx)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return rows.mm(weight).view(x.shape), grad_weight, grad_bias, None, None


def _origin(x: Any, weight: Any) -> Origin | None:
    """What to keep instead of ``x``; None where that is ``x`` itself.

    A weight that is a parameter is multiplied as ever, because its gradient may be wanted twice.
    """
    if type(x) is not Tensor or not weight.requires_grad:
        return None
    return None if torch.compiler.is_compiling() or weight.is_leaf else origin_of(x)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``torch.nn.functional.linear``; of a quantized ``x`` what it was quantized from is kept for the backward pass.

    Gradients can be taken once then.

    Args:
        x: floating-point values, shape ``(..., in)``, or a quantized tensor, whose own rules then hold.
        weight: shape ``(out, in)``.
        bias: shape ``(out,)``, or None.

    Returns:
        Values of shape ``(..., out)``; quantized ones where the rules of ``x`` say so.

    Raises:
        RuntimeError: shapes or dtypes don't fit, or, in the backward pass, the input of the quantizer was written to.
    """
    origin = _origin(x, weight)
    if origin is None or x.dim() < 2 or weight.dim() != 2:
        return F.linear(x, weight, bias)
    return super(Function, _Linear).apply(x, weight, bias, origin)  # type: ignore[misc]


def convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Numbers = 1,
    padding: str | Numbers = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Any:
    """``torch.nn.functional.conv1d``, ``conv2d`` or ``conv3d``, by the axes of the weight; else as :func:`linear`.

    Args:
        x: shape ``(N, in, *spatial)`` or ``(in, *spatial)``, else as there.
        weight: shape ``(out, in / groups, *kernel)``.
        bias: shape ``(out,)``, or None.
        stride: steps between windows, in elements, one number or one for each spatial axis.
        padding: zeros on both sides, likewise; or ``"valid"`` or ``"same"``.
        dilation: steps between the elements of a window, likewise.
        groups: number of groups of channels that see each other alone.

    Returns:
        Values of shape ``(N, out, *spatial)`` or ``(out, *spatial)``.

    Raises:
        RuntimeError: as :func:`linear`.
    """
    origin = _origin(x, weight)
    if origin is None or x.dim() != weight.dim() or isinstance(padding, str):
        function: Any = getattr(F, f"conv{weight.dim() - 2}d")
        return function(x, weight, bias, stride, padding, dilation, groups)
    return _convolution(x, weight, bias, origin, stride, padding, dilation, False, 0, groups)


def transposed_convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Any:
    """``torch.nn.functional.conv_transpose1d``, ``2d`` or ``3d``, by the axes of the weight; else as :func:`linear`.

    Args:
        x: as for :func:`convolution`.
        weight: shape ``(in, out / groups, *kernel)``.
        bias: shape ``(out,)``, or None.
        stride: as for :func:`convolution`, of the result.
        padding: elements that are left out on both sides of the result.
        output_padding: elements that are added on one side of the result.
        groups: as for :func:`convolution`.
        dilation: as for :func:`convolution`.

    Returns:
        As :func:`convolution`.

    Raises:
        RuntimeError: as :func:`linear`.
    """
    origin = _origin(x, weight)
    if origin is None or x.dim() != weight.dim():
        function: Any = getattr(F, f"conv_transpose{weight.dim() - 2}d")
        return function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolution(
        x, weight, bias, origin, stride, padding, dilation, True, output_padding, groups
    )


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin, *options: Any
) -> Tensor:
    axes = weight.dim() - 2
    stride, padding, dilation, output_padding = (
        [n] * axes if isinstance(n, int) else list(n) for n in (*options[:3], options[4])
    )
    how = (stride, padding, dilation, options[3], output_padding, options[5])
    return super(Function, _Convolution).apply(x, weight, bias, origin, how)  # type: ignore[misc, no-any-return]
