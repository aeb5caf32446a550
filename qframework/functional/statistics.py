"""Statistics of large tensors in few passes over memory, differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.autograd import apply, keep, kept

#: Length of the blocks among which extreme elements are looked for.
_BLOCK = 1024


class _AbsMax(Function):
    """The largest magnitude in all of the tensors; elements that share it share the gradient."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        ends = [x.aminmax() for x in tensors]
        tops = [torch.maximum(high, -low) for low, high in ends]
        return tops[0] if len(tops) == 1 else torch.stack(tops).amax()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        keep(ctx, *inputs)
        ctx.top = output.detach().clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        tensors = kept(ctx)
        largest = [x.abs() for x in tensors]
        largest = [x.eq_(ctx.top) for x in largest]  # 1 and 0, without a boolean tensor
        counts = [x.sum(dtype=ctx.top.dtype) for x in largest]
        count = counts[0] if len(counts) == 1 else torch.stack(counts).sum()
        share = torch.where(ctx.top > 0, grad / (count * ctx.top), 0.0)
        found = tuple(at.mul_(x) * share for at, x in zip(largest, tensors, strict=True))
        return found if len(found) > 1 else found[0]


def _rows(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    x = x if order is None else x.permute(order)
    return x.reshape(x.shape[0], -1)


class _AbsMaxOfChannels(Function):
    """The largest magnitude of each channel; the gradient goes to the element that was found."""

    @staticmethod
    def forward(x: Tensor, order: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        top = _rows(x, order).abs().max(dim=1)
        return top.values, top.indices

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        keep(ctx, inputs[0])
        ctx.order, ctx.where = inputs[1], output[1].detach().clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:  # type: ignore[override]
        (x,) = kept(ctx)
        rows, where = _rows(x, ctx.order), ctx.where.unsqueeze(1)
        values = grad.to(x.dtype).unsqueeze(1) * rows.gather(1, where).sign()
        # Made of the gradient, so that it is as many as that is.
        flat = values.new_zeros(rows.shape).scatter_(1, where, values)
        if ctx.order is None:
            return flat.view(x.shape), None
        back = [ctx.order.index(axis) for axis in range(x.dim())]
        return flat.view([x.shape[axis] for axis in ctx.order]).permute(back), None


class _OrderStatistic(Function):
    """The ``rank``-th largest or smallest element, or magnitude; the gradient goes to that element."""

    @staticmethod
    def forward(x: Tensor, rank: int, largest: bool, magnitude: bool) -> tuple[Tensor, Tensor]:
        flat = x.detach().reshape(-1)
        flat = flat.abs() if magnitude else flat
        whole = flat.numel() // _BLOCK
        blocks, rest = flat[: whole * _BLOCK].view(whole, _BLOCK), flat[whole * _BLOCK :]
        # The first elements lie in the blocks whose own first elements are the first, or in the rest.
        first = blocks.amax(1) if largest else blocks.amin(1)
        chosen = first.topk(rank, largest=largest, sorted=False).indices
        candidates = torch.cat([blocks[chosen].reshape(-1), rest])
        top = candidates.topk(rank, largest=largest, sorted=True)
        place = top.indices[-1:]  # one element: a 0-dim index would be read back
        block = chosen.gather(0, (place // _BLOCK).clamp_max(rank - 1))
        in_rest = place + (whole - rank) * _BLOCK
        where = torch.where(place < rank * _BLOCK, block * _BLOCK + place % _BLOCK, in_rest)
        return top.values[-1], where

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, _, _, magnitude = inputs
        where = output[1].detach().clone()
        ctx.mark_non_differentiable(output[1])
        ctx.where, ctx.shape = where, x.shape
        ctx.slope = x.detach().reshape(-1).gather(0, where).sign() if magnitude else None

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:  # type: ignore[override]
        grad = grad.reshape(1) if ctx.slope is None else grad.reshape(1) * ctx.slope
        flat = grad.new_zeros(ctx.shape.numel())
        return flat.scatter_(0, ctx.where, grad).view(ctx.shape), None, None, None


def abs_max(*tensors: Tensor) -> Tensor:
    """``max |x|`` of all tensors, 0-dim; its gradient is shared evenly by all elements of that magnitude."""
    return apply(_AbsMax, *tensors)  # type: ignore[no-any-return]


def abs_max_of_channels(x: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """``max |x|`` of each channel, shape ``(C,)``.

    Args:
        x: tensor with its channels first.
        order: of the axes that brings the channels first, None where they are.
    """
    return apply(_AbsMaxOfChannels, x, order)[0]  # type: ignore[no-any-return]


def high_rank(q: float, n: int) -> int:
    """The rank among ``n`` numbers, from the smallest, of a high percentile: ``floor(q n / 100 + 1 / 2)``."""
    return min(max(math.floor(0.01 * q * n + 0.5), 1), n)


def low_rank(q: float, n: int) -> int:
    """The rank of a low percentile: ``ceil(q n / 100)``."""
    return min(max(math.ceil(0.01 * q * n), 1), n)


def can_order(x: Tensor, rank: int) -> bool:
    """Whether :func:`order_statistic` serves: a large tensor, and a rank near the end."""
    return x.numel() // _BLOCK >= 4 * rank


def order_statistic(x: Tensor, rank: int, largest: bool = True, magnitude: bool = False) -> Tensor:
    """The ``rank``-th largest or smallest element of all, exactly, 0-dim.

    One pass finds the extreme of each block; only the blocks that can hold the element are looked at again.

    Args:
        x: tensor for which :func:`can_order` holds.
        rank: 1 for the extreme itself.
        largest: count from the top, or from the bottom.
        magnitude: of ``|x|`` rather than of ``x``.
    """
    return apply(_OrderStatistic, x, rank, largest, magnitude)[0]  # type: ignore[no-any-return]
