"""Statistics of large tensors in few passes over memory, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    abs_max,
    add_kernel,
    compute_dtype,
    kth_smallest,
    upcast,
)
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, apply, may_fuse

#: Length of the blocks among which extreme elements are looked for.
_BLOCK = 1024
#: Up to how many of the largest or smallest elements blocks are worth it.
_FEW = 64


# ------------------------------------------------------------ the largest magnitude


def abs_max_values(x: Tensor) -> Tensor:
    """``max |x|`` in the dtype of ``x``, without a tensor of magnitudes."""
    low, high = x.aminmax()
    return torch.maximum(high, -low)


class _AbsMax(Fused):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:  # type: ignore[override]
        top = abs_max_values(x)
        ctx.save_for_backward(x, top)
        return top.to(compute_dtype(x.dtype))

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Tensor:  # type: ignore[override]
        return abs_max.definition(x)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, top = ctx.saved_tensors
        wide = top.to(grad.dtype)
        layout = native.serves(x, (), "round", wide, incoming=(grad,))
        if layout is not None:
            return native.absmax_share(layout, x, wide, grad)
        largest = x.abs().eq_(top)  # 1 and 0, without a boolean tensor
        count = largest.sum(dtype=grad.dtype)
        share = torch.where(top > 0, grad / (count * top), 0.0)
        return largest.mul_(x).mul_(share)


@add_kernel(abs_max, "fused", lambda x, dim, keepdim: dim is None and may_fuse())
def _fused_abs_max(x: Tensor, *_: object) -> Tensor:
    return apply(_AbsMax, x)  # type: ignore[no-any-return]


class _RowAbsMax(Fused):
    @staticmethod
    def forward(ctx: Context, x: Tensor, keepdim: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.how = keepdim
        shape = native.row_shape(x)
        layout = native.serves(x, shape, "round")
        if layout is not None:
            top = native.row_tops(layout, x, shape)
        else:
            top = x.abs().amax(-1, keepdim=True).to(compute_dtype(x.dtype))
        return top if keepdim else top.squeeze(-1)

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Tensor:  # type: ignore[override]
        return abs_max.definition(x, -1, ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        layout = native.serves(x, native.row_shape(x), "round", incoming=(grad,))
        if layout is not None:
            return native.absmax_share(layout, x, None, grad), None
        where = x.abs().max(-1, keepdim=True).indices
        shares = (grad if ctx.how else grad.unsqueeze(-1)) * x.gather(-1, where).sign()
        return torch.zeros_like(x).scatter_(-1, where, shares.to(x.dtype)), None


def _serves_rows(x: Tensor, dim: int | None, keepdim: bool) -> bool:
    return x.dim() > 1 and x.numel() > 0 and dim in (-1, x.dim() - 1) and may_fuse()


@add_kernel(abs_max, "rows", _serves_rows)
def _row_abs_max(x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    return apply(_RowAbsMax, x, keepdim)  # type: ignore[no-any-return]


# ------------------------------------------------------------ elements by their rank


def from_end(rank: int, n: int) -> tuple[int, bool]:
    """A rank from the smallest of ``n``, counted from the nearer end; whether that is the top."""
    from_top = n - rank + 1
    return (from_top, True) if from_top <= rank else (rank, False)


def can_search_blocks(n: int, near: int) -> bool:
    """Whether :func:`search_blocks` serves: a large tensor, and a rank near the end."""
    return near <= _FEW and n // _BLOCK >= 4 * near


def search_blocks(
    x: Tensor, near: int, largest: bool, magnitude: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The element ``near`` the end, its index in the flat tensor, of shape ``(1,)``, and the end itself.

    Both are NaN where one of the elements is.

    One pass finds the extreme of each block; only the blocks that can hold the element are looked at again.

    Args:
        x: tensor for which :func:`can_search_blocks` holds.
        near: rank from the end, 1 for the extreme itself.
        largest: count from the top, or from the bottom.
        magnitude: of ``|x|`` rather than of ``x``.
    """
    flat = x.detach().reshape(-1)
    flat = flat.abs() if magnitude else flat
    whole = flat.numel() // _BLOCK
    blocks, rest = flat[: whole * _BLOCK].view(whole, _BLOCK), flat[whole * _BLOCK :]
    # The first elements lie in the blocks whose own first elements are the first, or in the rest.
    first = blocks.amax(1) if largest else blocks.amin(1)
    chosen = first.topk(near, largest=largest, sorted=False).indices
    candidates = torch.cat([blocks[chosen].reshape(-1), rest])
    top = candidates.topk(near, largest=largest, sorted=True)
    place = top.indices[-1:]  # one element: a 0-dim index would be read back
    block = chosen.gather(0, (place // _BLOCK).clamp_max(near - 1))
    in_rest = place + (whole - near) * _BLOCK
    where = torch.where(place < near * _BLOCK, block * _BLOCK + place % _BLOCK, in_rest)
    end = top.values[0]
    if not largest:  # where NaN doesn't come first
        end = torch.where(first.isnan().any() | rest.isnan().any(), torch.nan, end)
    return torch.where(end.isnan(), torch.nan, top.values[-1]), where, end


class _KthSmallest(Fused):
    @staticmethod
    def forward(ctx: Context, x: Tensor, rank: int, magnitude: bool) -> Tensor:  # type: ignore[override]
        value, where, _ = search_blocks(x, *from_end(rank, x.numel()), magnitude)
        ctx.save_for_backward(x, where)
        ctx.how = (rank, magnitude)
        return value.to(compute_dtype(x.dtype))

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Tensor:  # type: ignore[override]
        return kth_smallest.definition(x, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, where = ctx.saved_tensors
        grad = grad.reshape(1)
        if ctx.how[1]:
            grad = grad * x.reshape(-1).gather(0, where).sign()
        flat = x.new_zeros(x.numel()).scatter_(0, where, grad.to(x.dtype))
        return flat.view(x.shape), None, None


def _searches(x: Tensor, rank: int, magnitude: bool, dim: int | None, keepdim: bool) -> bool:
    n = x.numel()
    return may_fuse() and dim is None and can_search_blocks(n, from_end(rank, n)[0])


@add_kernel(kth_smallest, "blocks", _searches)
def _by_blocks(x: Tensor, rank: int, magnitude: bool, *_: object) -> Tensor:
    return apply(_KthSmallest, x, rank, magnitude)  # type: ignore[no-any-return]


def _selects(x: Tensor, rank: int, magnitude: bool, dim: int | None, keepdim: bool) -> bool:
    if not may_fuse() or (dim is None and x.numel() <= _BLOCK):
        return False  # of few elements that tie, the one that torch takes gets the gradient
    n = x.numel() if dim is None else x.shape[dim]
    return from_end(rank, n)[0] <= _FEW


@add_kernel(kth_smallest, "selection", _selects)
def _by_selection(x: Tensor, rank: int, magnitude: bool, dim: int | None, keepdim: bool) -> Tensor:
    x = upcast(x).abs() if magnitude else upcast(x)
    if dim is None:
        x, dim, keepdim = x.reshape(-1), 0, False
    near, largest = from_end(rank, x.shape[dim])
    if near > 1 and not largest:  # NaN is no smallest element
        near_ones = x.topk(near, dim, largest=False, sorted=False).values
        found = near_ones.max(dim, keepdim).values
        return torch.where(x.detach().amin(dim, keepdim).isnan(), torch.nan, found)
    if near > 1:
        x, largest = x.topk(near, dim, sorted=False).values, False
    return x.max(dim, keepdim).values if largest else x.min(dim, keepdim).values
