"""Order statistics for compiled graphs that need them in some calls only.

As an operator of its own the search is skipped while it isn't wanted, without a branch in the graph, and it takes its input
in whatever memory format the compiler has chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.statistics import _OrderStatistic

_Found = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "qframework::order_statistic_if",
    mutates_args=(),
    tags=(torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe),
)
def _order_statistic_if(
    x: Tensor, wanted: Tensor, rank: int, largest: bool, magnitude: bool
) -> _Found:
    """The element, its index in the flat tensor and the sign that ``magnitude`` took off; zeros when not wanted.

    ``wanted`` is a flag on the CPU, so that looking at it waits for nothing.
    """
    if not bool(wanted):
        return x.new_zeros(()), x.new_zeros(1, dtype=torch.int64), x.new_ones(())
    value, where = _OrderStatistic.forward(x, rank, largest, magnitude)
    slope = x.reshape(-1).gather(0, where).sign().reshape(())
    return value.clone(), where, slope if magnitude else torch.ones_like(slope)


@_order_statistic_if.register_fake
def _(x: Tensor, wanted: Tensor, rank: int, largest: bool, magnitude: bool) -> _Found:
    return x.new_empty(()), x.new_empty(1, dtype=torch.int64), x.new_empty(())


class _OrderStatisticIf(Function):
    @staticmethod
    def forward(x: Tensor, wanted: Tensor, rank: int, largest: bool, magnitude: bool) -> _Found:
        found: _Found = torch.ops.qframework.order_statistic_if(x, wanted, rank, largest, magnitude)
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
        places = torch.arange(ctx.shape.numel(), device=grad.device).view(ctx.shape)
        return torch.where(places == where, grad * slope, 0.0), None, None, None, None


def order_statistic_if(
    x: Tensor, wanted: Tensor, rank: int, largest: bool = True, magnitude: bool = False
) -> Tensor:
    """:func:`~qframework.functional.order_statistic` where ``wanted``, else 0.

    Args:
        x: tensor for which :func:`~qframework.functional.can_order` holds.
        wanted: 0-dim bool tensor on the CPU.
        rank: 1 for the extreme itself.
        largest: count from the top, or from the bottom.
        magnitude: of ``|x|`` rather than of ``x``.
    """
    found = _OrderStatisticIf.apply(x, wanted, rank, largest, magnitude)  # type: ignore[no-untyped-call]
    return found[0]  # type: ignore[no-any-return]
