"""Collected and learned numbers in graphs of compilers: the phase is chosen in the graph, so that its change compiles nothing anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.core.base import NotStated
from qframework.core.collector import (
    LEARNED,
    MANY,
    CollectThenLearn,
    collect_or_learned,
    is_many,
    is_shared,
    running_update,
)
from qframework.core.following import FollowsParameters, follow
from qframework.core.stats import at_least_zero, at_most_zero
from qframework.functional import add_kernel, high_rank, low_rank, upcast
from qframework.kernels.autograd import Context, in_graph, is_exporting
from qframework.kernels.graphs import places_in
from qframework.kernels.plan import Reader
from qframework.kernels.statistics import (
    abs_max_values,
    can_search_blocks,
    from_end,
    search_blocks,
)

_Found = tuple[Tensor, Tensor, Tensor, Tensor]


#: What decides on the phase; one who overrides it has the last word on it.
_PHASE = ("is_collecting", "record", "finish_collection")


# ------------------------------------------------------------ collection


@add_kernel(collect_or_learned, "in a graph", in_graph)
def _traced(collector: CollectThenLearn, x: Tensor, *context: Tensor) -> Tensor:
    kind, own = type(collector), vars(collector)
    for name in _PHASE:
        if name in own or getattr(kind, name) is not getattr(CollectThenLearn, name):
            return collect_or_learned.definition(collector, x, *context)
    if collector.switched or not collector.training:
        return collector.from_stored(collector.to_evaluate(), *context)
    if is_shared():
        return _outside_of_graphs(collector, x, *context)
    if x.numel() == 0:
        return collector.from_stored(collector.stored(), *context)
    steps, used = collector.collected_steps, collector.used_batches
    with torch.no_grad():
        steps.masked_fill_((steps >= collector.collect_stats_steps) | is_many(used), LEARNED)
        used.masked_fill_(steps < 0, MANY)
    collecting = steps >= 0
    # A copy, because a shared quantizer writes to ``value`` again before the backward pass.
    value = collector.stored().clone()
    found = _statistic_if(collector, x, collecting)
    if found is None:
        result, statistic, finite = _branch(collector, collecting, x, value, *context)
    else:
        statistic, finite = found
        batch = collector.from_statistic(statistic, *context)
        result = torch.where(collecting, batch, collector.from_stored(value, *context))
        statistic = statistic.detach()
    with torch.no_grad():
        before = collector.running_stats
        finite = finite & torch.isfinite(statistic).all()
        after = running_update(before, statistic, used, collector.momentum, finite)
        now = torch.where(collecting, after, before)
        stored = torch.where(collecting, collector.to_stored(now), value)
        before.copy_(now)
        collector.value.copy_(stored.reshape(collector.value.shape))
        used.add_(collecting & finite)
        collector.left_out.add_(collecting & ~finite)
        steps.add_(collecting.to(torch.int64))
    return result


@_disable_dynamo  # as torch.compiler.disable, which would import the compiler
def _outside_of_graphs(collector: CollectThenLearn, x: Tensor, *context: Tensor) -> Tensor:
    """While several processes collect together; once the number is learned, graphs are whole again."""
    return collect_or_learned.definition(collector, x, *context)


def _branch(
    collector: CollectThenLearn, collecting: Tensor, *operands: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, statistic and whether all elements are finite, by a branch in the graph."""
    x, *others = operands
    sizes = [x.shape[i] for i in range(x.dim())]  # a branch takes no torch.Size of symbols

    # Along one axis, the gradients of both branches have the same strides.
    def collect(flat: Tensor, value: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = flat.view(sizes)
        statistic = collector.statistic(x, *context)
        result = collector.from_statistic(statistic, *context)
        now = statistic.detach().clone()
        return result, now, collector.counts(x.detach(), now).to(now.dtype)  # a branch gives floats

    def use_learned(flat: Tensor, value: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = collector.from_stored(value, *context).clone()
        return result, torch.zeros_like(value), value.new_ones(())

    found: Any = torch.cond(collecting, collect, use_learned, (x.reshape(-1), *others))  # type: ignore[arg-type]
    return found[0], found[1], found[2].detach() != 0


def _statistic_if(
    collector: CollectThenLearn, x: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The statistic of a batch and whether all elements are finite, where it is ``wanted``, else anything.

    None where a branch is needed for that.
    """
    try:
        rule = Reader().read(collector, "statistic_rule")
    except NotStated:
        return None
    if rule.kind == "percentile":
        found, finite = percentile_if(x, wanted, rule.high, magnitude=True)
    elif rule.kind == "negative_percentile":
        least, finite = percentile_if(x, wanted, rule.low, low=True)
        found = at_most_zero(least)
    elif rule.kind == "percentile_interval":
        high, finite = percentile_if(x, wanted, rule.high)
        low, _ = percentile_if(x, wanted, rule.low, low=True)
        found = at_least_zero(high) - at_most_zero(low)
    else:
        return None
    return collector.shaped(upcast(found)), finite


# ------------------------------------------------------------ percentiles that are needed in some calls only


@torch.library.custom_op(
    "qframework::percentile_if",
    mutates_args=(),
    tags=(torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe),
)
def _percentile_if(x: Tensor, wanted: Tensor, q: float, low: bool, magnitude: bool) -> _Found:
    """The element, its index in the flat tensor, the sign that ``magnitude`` took off, and whether all elements are finite.

    Zeros and True when not wanted.

    An operator of its own is skipped without a branch in the graph; it takes its input in whatever memory format the compiler
    has chosen, and finds the rank itself, so that graphs hold for any batch.
    """
    if not bool(wanted):
        yes = x.new_ones((), dtype=torch.bool)
        return x.new_zeros(()), x.new_zeros(1, dtype=torch.int64), x.new_ones(()), yes
    n = x.numel()
    rank = low_rank(q, n) if low else high_rank(q, n)
    near, largest = from_end(rank, n)
    flat = x.reshape(-1)
    if can_search_blocks(n, near):
        value, where, _ = search_blocks(x, near, largest, magnitude)
    else:
        value, at = (flat.abs() if magnitude else flat).kthvalue(rank)
        where, value = at.reshape(1), torch.where(flat.isnan().any(), torch.nan, value)
    slope = flat.gather(0, where).sign().reshape(())
    finite = torch.isfinite(abs_max_values(x))
    return value.clone(), where, slope if magnitude else torch.ones_like(slope), finite


@_percentile_if.register_fake
def _(x: Tensor, wanted: Tensor, q: float, low: bool, magnitude: bool) -> _Found:
    yes = x.new_empty((), dtype=torch.bool)
    return x.new_empty(()), x.new_empty(1, dtype=torch.int64), x.new_empty(()), yes


class _PercentileIf(Function):
    @staticmethod
    def forward(x: Tensor, wanted: Tensor, q: float, low: bool, magnitude: bool) -> _Found:
        found: _Found = torch.ops.qframework.percentile_if(x, wanted, q, low, magnitude)
        return found

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        _, where, slope, finite = output
        ctx.mark_non_differentiable(where, slope, finite)
        ctx.save_for_backward(where, slope)
        ctx.how = (inputs[0].shape,)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Context, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        where, slope = ctx.saved_tensors
        # A comparison with the position is done in the pass that computes the rest of the gradient.
        places = places_in(ctx.how[0], grad.device)
        return torch.where(places == where, grad * slope, 0.0), None, None, None, None


def percentile_if(
    x: Tensor, wanted: Tensor, q: float, low: bool = False, magnitude: bool = False
) -> tuple[Tensor, Tensor]:
    """A percentile of all elements where ``wanted``, else 0, and whether all are finite; 0-dim.

    Args:
        x: tensor of any shape.
        wanted: 0-dim bool tensor.
        q: in percent, 0 to 100.
        low: round the rank as for a low percentile, see :func:`~qframework.functional.low_rank`.
        magnitude: of ``|x|`` rather than of ``x``.
    """
    found = _PercentileIf.apply(x, wanted, q, low, magnitude)  # type: ignore[no-untyped-call]
    return found[0], found[3]


# ------------------------------------------------------------ numbers that follow parameters


@add_kernel(follow, "in a graph", in_graph)
def _follow_in_graph(number: FollowsParameters) -> None:
    """The number is compared and started anew in the graph, but for those that are searched for, and in exports."""
    value = number.value
    if not number.follows or number.is_costly or is_exporting():
        return
    if not isinstance(value, torch.nn.Parameter) or not value.requires_grad:
        return
    with torch.no_grad():
        untouched = (value == number.initial).all()
        start = torch.where(untouched, number.computed().reshape(value.shape), value)
        number.initial.copy_(torch.where(untouched, start, number.initial))
        value.copy_(start)
