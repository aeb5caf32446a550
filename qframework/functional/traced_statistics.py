"""Percentiles for compiled graphs that need them in some calls only.

As an operator of its own the search is skipped while it isn't wanted, without a branch in the graph; it takes its input
in whatever memory format the compiler has chosen, and finds the rank itself, so that graphs hold for any batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.statistics import _OrderStatistic, can_order, high_rank, low_rank

_Found = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "qframework::percentile_if",
    mutates_args=(),
    tags=(torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe),
)
def _percentile_if(x: Tensor, wanted: Tensor, q: float, low: bool, magnitude: bool) -> _Found:
    """The element, its index in the flat tensor and the sign that ``magnitude`` took off; zeros when not wanted.

    ``wanted`` is a flag on the CPU, so that looking at it waits for nothing.
    """
    if not bool(wanted):
        return x.new_zeros(()), x.new_zeros(1, dtype=torch.int64), x.new_ones(())
    n = x.numel()
    rank = low_rank(q, n) if low else high_rank(q, n)
    largest = n - rank + 1 <= rank
    near = n - rank + 1 if largest else rank
    flat = x.reshape(-1)
    if can_order(x, near):
        value, where = _OrderStatistic.forward(x, near, largest, magnitude)
    else:
        value, at = (flat.abs() if magnitude else flat).kthvalue(rank)
        where = at.reshape(1)
    slope = flat.gather(0, where).sign().reshape(())
    return value.clone(), where, slope if magnitude else torch.ones_like(slope)


@_percentile_if.register_fake
def _(x: Tensor, wanted: Tensor, q: float, low: bool, magnitude: bool) -> _Found:
    return x.new_empty(()), x.new_empty(1, dtype=torch.int64), x.new_empty(())


class _PercentileIf(Function):
    @staticmethod
    def forward(x: Tensor, wanted: Tensor, q: float, low: bool, magnitude: bool) -> _Found:
        found: _Found = torch.ops.qframework.percentile_if(x, wanted, q, low, magnitude)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, where, slope = output
        ctx.mark_non_differentiable(where, slope)
        ctx.save_for_backward(where, slope)
        ctx.shape = inputs[0].shape

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        where, slope = ctx.saved_tensors
        # A comparison with the position is done in the pass that computes the rest of the gradient.
        places = places_in(ctx.shape, grad.device)
        return torch.where(places == where, grad * slope, 0.0), None, None, None, None


def places_in(shape: torch.Size, device: torch.device) -> Tensor:
    """The index of each element in the flat tensor; of 32 bits where they suffice, since more of these fit into a register."""
    count = shape.numel()
    dtype = torch.int32 if count < 2**31 else torch.int64
    return torch.arange(count, dtype=dtype, device=device).view(shape)


def percentile_if(
    x: Tensor, wanted: Tensor, q: float, low: bool = False, magnitude: bool = False
) -> Tensor:
    """A percentile of all elements where ``wanted``, else 0; 0-dim.

    Args:
        x: tensor of any shape.
        wanted: 0-dim bool tensor on the CPU.
        q: in percent, 0 to 100.
        low: round the rank as for a low percentile, see :func:`~qframework.functional.statistics.low_rank`.
        magnitude: of ``|x|`` rather than of ``x``.
    """
    return _PercentileIf.apply(x, wanted, q, low, magnitude)[0]  # type: ignore[no-any-return, no-untyped-call]
