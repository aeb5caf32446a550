"""Convolutions and matrix products whose quantized operands are made again in the backward pass instead of being saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from qframework.configuration import settings
from qframework.functional import add_kernel, convolution, linear, transposed_convolution
from qframework.functional.products import Numbers
from qframework.kernels.autograd import Context, is_compiling
from qframework.kernels.recomputation import Origin, origin_of
from qframework.quant_tensor import TensorLike

_Origins = tuple[Origin | None, Origin | None]


#: Weights of fewer elements are saved: to make them again costs more than their memory.
_LARGE = 1 << 16
#: With fewer rows a weight is made and multiplied in parts, which stay in the cache.
_FEW_ROWS = 64


def _save(ctx: Context, x: Tensor | None, weight: Tensor | None, origins: _Origins) -> None:
    """Save both operands, or what they are made of; None for one that no gradient needs."""
    kept, how = [], []
    for t, origin in zip((x, weight), origins, strict=True):
        anew = t is not None and origin is not None
        kept += [*origin[1:3], origin.x] if anew else [None, None, t]  # type: ignore[index, union-attr]
        how.append(origin[3:] if anew else None)  # type: ignore[index]
    ctx.save_for_backward(*kept)
    ctx.how = how


def _operands(ctx: Context) -> _Origins | tuple[Any, Any]:
    """Both operands, or what they are made of."""
    saved = ctx.saved_tensors
    found = []
    for place, how in zip((0, 3), ctx.how[:2], strict=True):
        scale, zero_point, t = saved[place : place + 3]
        found.append(t if how is None else Origin(t, scale, zero_point, *how))
    return tuple(found)


def _made(operand: Any) -> Any:
    if not isinstance(operand, Origin):
        return operand
    return operand.differentiable() if torch.is_grad_enabled() else operand.values()


class _Convolution(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, origins: _Origins, how: Any
    ) -> Tensor:
        _save(ctx, x, weight, origins)
        ctx.how.append(how)
        return torch.convolution(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = map(_made, _operands(ctx))
        needed = ctx.needs_input_grad[:3]
        of_bias = [grad.shape[1]] if needed[2] else None
        grads = torch.ops.aten.convolution_backward(grad, x, weight, of_bias, *ctx.how[2], needed)
        return *grads, None, None


class _Linear(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, origins: _Origins
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        _save(ctx, x if need_weight else None, weight if need_x else None, origins)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = _operands(ctx)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if need_weight:
            x = _made(x)
            grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
        if need_x:
            grad_x = _times(rows, weight).view(*grad.shape[:-1], -1)
        return grad_x, grad_weight, rows.sum(0) if need_bias else None, None, None


def _times(rows: Tensor, weight: Any) -> Tensor:
    """The product of rows and a weight, which is made for it in parts where there are few rows."""
    apart = isinstance(weight, Origin) and not torch.is_grad_enabled()
    if not apart or rows.shape[0] > _FEW_ROWS or not rows.is_cpu:
        return rows.mm(_made(weight))
    out: Tensor | None = None
    for place, part in weight.parts():
        some = rows[:, place]
        out = some.mm(part) if out is None else out.addmm_(some, part)
    assert out is not None
    return out


def _origins(x: TensorLike, weight: TensorLike) -> _Origins | None:
    """What to save instead of both operands, None for one that is saved itself; None where both are."""
    if is_compiling() or type(x) is not Tensor or type(weight) is not Tensor:
        return None
    of_x = origin_of(x) if weight.requires_grad else None
    # Where no gradient needs the weight, that of the weight itself is one that its quantizer may overwrite.
    of_weight = origin_of(weight) if _is_large(weight) else None
    return None if of_x is None and of_weight is None else (of_x, of_weight)


def _is_large(weight: Tensor) -> bool:
    return weight.numel() >= _LARGE or settings.recompute == "always"


def _serves_linear(x: TensorLike, weight: TensorLike, *_: object) -> bool:
    return _origins(x, weight) is not None and x.dim() >= 2 and weight.dim() == 2


@add_kernel(linear, "recomputing", _serves_linear)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    return super(Function, _Linear).apply(x, weight, bias, _origins(x, weight))  # type: ignore[misc]


def _serves_convolution(
    x: TensorLike, weight: TensorLike, bias: object, stride: object, padding: object, *_: object
) -> bool:
    if _origins(x, weight) is None:
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
    origins = _origins(x, weight)
    return super(Function, _Convolution).apply(x, weight, bias, origins, how)  # type: ignore[misc, no-any-return]
