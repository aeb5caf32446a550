"""Convolutions and matrix products whose quantized operands are made again in the backward pass instead of being saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from qframework.functional import add_kernel, convolution, linear, transposed_convolution
from qframework.functional.products import Numbers
from qframework.kernels import native
from qframework.kernels.absmax import note_sums, takes_sums
from qframework.kernels.autograd import Context, is_compiling, is_grad_enabled, transforms_active
from qframework.kernels.recomputation import Origin, is_large, origin_of
from qframework.quant_tensor import TensorLike

_Origins = tuple[Origin | None, Origin | None]


#: Bytes of a weight that are made at a time, to be multiplied while they are in a cache.
_AT_ONCE = 1 << 22


def _save(ctx: Context, x: Tensor | None, weight: Tensor | None, origins: _Origins) -> None:
    """Save both operands, or what they are made of; None for one that no gradient needs."""
    kept, how = [], []
    for t, origin in zip((x, weight), origins, strict=True):
        kept += [None, None, t] if origin is None else [*origin[1:3], origin.x]
        how.append(None if origin is None else origin[3:])
    ctx.save_for_backward(*kept)
    ctx.how = how


def _operands(ctx: Context) -> tuple[Any, Any]:
    """Both operands, or what they are made of."""
    saved = ctx.saved_tensors

    def operand(place: int, how: Any) -> Any:
        scale, zero_point, t = saved[place : place + 3]
        return t if how is None else Origin(t, scale, zero_point, *how)

    return operand(0, ctx.how[0]), operand(3, ctx.how[1])


def _made(operand: Any) -> Any:
    if not isinstance(operand, Origin):
        return operand
    return operand.differentiable() if is_grad_enabled() else operand.values()


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
        grad_bias = rows.sum(0) if need_bias else None
        x = _made(x) if need_weight else None
        x = None if x is None else x.reshape(-1, x.shape[-1])
        alone = rows.is_cpu and not is_grad_enabled() and not transforms_active(rows)
        if isinstance(weight, Origin) and alone:
            grad_x, grad_weight = _in_parts(rows, x, weight, need_x)
        else:
            grad_weight = None if x is None else rows.t().mm(x)
            grad_x = rows.mm(_made(weight)) if need_x else None
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        return grad_x, grad_weight, grad_bias, None, None


def _in_parts(
    rows: Tensor, x: Tensor | None, weight: Origin, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of rows and weight, part by part of the weight, which is made for it.

    Args:
        rows: the gradient of the product.
        x: the other operand, where the weight has a gradient.
        weight: what it was made of.
        need_x: whether the other operand has one.
    """
    grad_x: Tensor | None = None
    grad_weight = None if x is None else _room_for(weight)
    in_one = (
        grad_weight is not None
        and not weight.gradient_is_seen()
        and takes_sums(weight.node, weight.x, weight.scale)
    )
    sums: list[tuple[Tensor, Tensor]] = []
    room: Tensor | None = None
    for part in weight.parts(_AT_ONCE):
        some = rows[:, part.place]
        made: Tensor | None = None
        if grad_weight is not None and x is not None:
            of_part = torch.mm(some.t(), x, out=grad_weight[part.place])
            if in_one:
                if room is None and need_x:
                    room = torch.empty_like(part.x)
                made = None if room is None else room[: part.x.shape[0]]
                sums.append(part.sums(of_part, made))
        if need_x:
            made = part.values() if made is None else made
            grad_x = some.mm(made) if grad_x is None else grad_x.addmm_(some, made)
    if sums and grad_weight is not None:
        note_sums(grad_weight, *map(torch.cat, zip(*sums, strict=True)))
    return grad_x, grad_weight


def _room_for(weight: Origin) -> Tensor:
    like = weight.x.detach()
    plain = like.shape == weight.shape and like.is_contiguous() and native.available()
    return native.empty_like(like) if plain else like.new_empty(weight.shape)


def _origins(x: TensorLike, weight: TensorLike) -> _Origins | None:
    """What to save instead of both operands, None for one that is saved itself; None where both are."""
    if type(x) is not Tensor or type(weight) is not Tensor:
        return None
    of_x = origin_of(x) if weight.requires_grad else None
    # Where no gradient needs the weight, that of the weight itself is one that its quantizer may overwrite.
    of_weight = origin_of(weight) if is_large(weight) else None
    return None if of_x is None and of_weight is None else (of_x, of_weight)


def _may_serve(x: TensorLike, weight: TensorLike, *_: object) -> bool:
    """Whether operands may know what they were made of; only to look at them tells."""
    return not is_compiling() and is_grad_enabled()


@add_kernel(linear, "recomputing", _may_serve)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    origins = _origins(x, weight)
    if origins is None or x.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    return super(Function, _Linear).apply(x, weight, bias, origins)  # type: ignore[misc]


@add_kernel(convolution, "recomputing", _may_serve)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: str | Numbers,
    dilation: Numbers,
    groups: int,
) -> Any:
    return _call(x, weight, bias, stride, padding, dilation, False, 0, groups)


@add_kernel(transposed_convolution, "recomputing", _may_serve)
def _transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Any:
    return _call(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: str | Numbers,
    dilation: Numbers,
    transposed: bool,
    output_padding: Numbers,
    groups: int,
) -> Any:
    origins = _origins(x, weight)
    if origins is None or isinstance(padding, str) or x.dim() != weight.dim():
        return NotImplemented
    axes = weight.dim() - 2
    steps, pads, gaps, output_pads = (
        [n] * axes if isinstance(n, int) else list(n)
        for n in (stride, padding, dilation, output_padding)
    )
    how = (steps, pads, gaps, transposed, output_pads, groups)
    return super(Function, _Convolution).apply(x, weight, bias, origins, how)  # type: ignore[misc]
