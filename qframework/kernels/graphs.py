"""Quantization in graphs of ``torch.compile``, in a form that inductor makes few passes over memory of.

It quantizes in the pass that computes the values, and masks and sums gradients in the passes of the layer before. Nothing else of the
size of the values is kept than they: backwards all starts from them and the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qframework.functional import (
    IntegerGrid,
    MinifloatFormat,
    MinifloatGrid,
    ScaleRule,
    add_kernel,
    apply_step,
    fake_quantize,
    is_recomputing,
    minifloat_quantize,
    quantize_by_absmax,
    repeat_while,
    tensor_clamp_ste,
)
from qframework.functional.straight_through import (
    STEPS,
    StraightThroughClamp,
    StraightThroughStep,
)
from qframework.kernels import operators
from qframework.kernels.absmax import Grid, parts_of_gradient
from qframework.kernels.autograd import (
    Context,
    in_any_graph,
    in_graph,
    is_compiling,
    may_fuse_in_graph,
)
from qframework.kernels.integer import can_fuse_relu, quantize_gradients, sum_to
from qframework.kernels.minifloat import minifloat_gradients
from qframework.kernels.rounding import quantize, round_minifloats
from qframework.kernels.scales import statistic_scale_slope, statistic_scale_values


def own_buffer(t: Tensor, again: bool = False) -> Tensor:
    """``t`` in memory of its own, computed once.

    Inductor would compute a small tensor again for each element of the large one that it is used with, but not what a view
    of any strides is taken of.

    Args:
        t: small tensor.
        again: make a node that isn't taken for that of another call, so that what is computed with it in the backward pass
            is not what was computed in the forward pass, which would then be kept.
    """
    if again:
        return t.unsqueeze(0).as_strided(t.shape, t.stride())
    return t.as_strided(t.shape, t.stride())


# ------------------------------------------------------------ straight through


class _Step(StraightThroughStep):
    """Compilers take no function with forward-mode derivatives."""

    jvp = staticmethod(Function.jvp)  # type: ignore[assignment]


class _Clamp(StraightThroughClamp):
    jvp = staticmethod(Function.jvp)  # type: ignore[assignment]


@add_kernel(apply_step, "in a graph", in_any_graph)
def _apply_step(x: Tensor, step: str) -> Tensor:
    if not is_compiling():
        return _with_gradient_of(x, STEPS[step](x.detach()))
    return _Step.apply(x, step)  # type: ignore[no-any-return, no-untyped-call]


@add_kernel(tensor_clamp_ste, "in a graph", in_any_graph)
def _tensor_clamp_ste(x: Tensor, *bounds: Tensor | float | None) -> Tensor:
    if not is_compiling():
        return _with_gradient_of(x, torch.clamp(x.detach(), *bounds))  # type: ignore[arg-type]
    return _Clamp.apply(x, *bounds)  # type: ignore[no-any-return, no-untyped-call]


def _with_gradient_of(x: Tensor, y: Tensor) -> Tensor:
    """``y``, with the gradient of ``x``, by torch's own operations, which ``torch.jit.trace`` records alike with gradients and without."""
    return y + torch.nan_to_num(x - x.detach(), 0.0, 0.0, 0.0)


# ------------------------------------------------------------ by a scale that is known


class _Range(Function):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: IntegerGrid, relu: bool
    ) -> Tensor:
        x = torch.relu(x) if relu else x
        return quantize(x, own_buffer(scale), zero_point, grid)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero_point, *ctx.how = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, zero_point = ctx.saved_tensors
        grid, relu = ctx.how
        _, need_scale, need_zero, _, _ = ctx.needs_input_grad
        x = torch.relu(x) if relu else x  # as forwards, and so the same tensor
        scale, needed = own_buffer(scale, True), {"need_scale": need_scale, "need_zero": need_zero}
        return *quantize_gradients(grad, x, scale, zero_point, grid, relu, **needed), None, None


def _serves_range(
    x: Tensor, scale: Tensor, zero_point: object, grid: IntegerGrid, relu: bool
) -> bool:
    return may_fuse_in_graph() and not isinstance(grid.minimum, Tensor)


@add_kernel(fake_quantize, "in a graph", _serves_range)
def _range(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: IntegerGrid, relu: bool
) -> Tensor:
    if relu and not can_fuse_relu(zero_point, grid):
        x, relu = torch.relu(x), False
    return _Range.apply(x, scale, zero_point, grid, relu)  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------ by the largest magnitude


def places_in(shape: torch.Size, device: torch.device) -> Tensor:
    """The index of each element in the flat tensor; of 32 bits where they suffice, since more of these fit into a register."""
    count = shape.numel()
    dtype = torch.int32 if count < 2**31 else torch.int64
    return torch.arange(count, dtype=dtype, device=device).view(shape)


class _Absmax(Function):
    """Channels come first, rows and groups are along one axis, or there is one scale.

    Sums are by channel first, as :func:`sum_to` does in graphs.
    """

    @staticmethod
    def forward(x: Tensor, grid: Grid, rule: ScaleRule) -> tuple[Tensor, Tensor, Tensor]:
        if operators.absmax_operates(x, grid):
            return operators.absmax(x, grid, rule)
        magnitudes, axes = x.abs(), _reduced(x, rule)
        top = magnitudes.amax() if axes is None else magnitudes.amax(axes, keepdim=True)
        upcast = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = statistic_scale_values(top.to(upcast), rule)
        scale = own_buffer(scale if rule.reduced_axis is not None else scale.reshape(rule.shape))
        if isinstance(grid, MinifloatGrid):
            return round_minifloats(x, scale, grid), scale, top
        return quantize(x, scale, None, grid), scale, top

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        x, *ctx.how = inputs
        _, scale, top = output
        ctx.mark_non_differentiable(top)
        ctx.save_for_backward(x, scale, top)

    @staticmethod
    def backward(ctx: Context, grad: Tensor, grad_scale: Tensor, _: Any) -> Any:  # type: ignore[override]
        x, scale, top = ctx.saved_tensors
        grid, rule = ctx.how
        if operators.absmax_gradient_operates(x, grid):
            found = operators.absmax_gradient(grad, grad_scale, x, scale, top, grid, rule)
            return found, None, None
        grad_x, of_scale = parts_of_gradient(grad, x, scale, grid)
        hit, axes = x.abs() == top, _reduced(x, rule)
        slope = statistic_scale_slope(top.to(scale.dtype), rule)
        share = (of_scale + grad_scale).reshape(top.shape) * slope
        if axes is not None:
            places, length = _places(x, axes)
            first = torch.where(hit, places, length).amin(axes, keepdim=True)
            hit = places == first
        else:
            share = share / sum_to(hit.to(scale.dtype), top)
        moved = torch.where(top > 0, share, 0.0).to(x.dtype) * x.sign()
        return torch.where(hit, grad_x + moved, grad_x), None, None


def _reduced(x: Tensor, rule: ScaleRule) -> list[int] | None:
    """The axes whose elements share a scale; None for all."""
    if rule.reduced_axis is not None:
        return [rule.reduced_axis % x.dim()]
    return None if rule.channel_axis is None else list(range(1, x.dim()))


def _places(x: Tensor, axes: list[int]) -> tuple[Tensor, int]:
    """Where elements are among those that share a scale, and how many these are."""
    if len(axes) == x.dim() - 1:
        return places_in(x.shape[1:], x.device), x[0].numel()
    length = x.shape[axes[0]]
    shape = [length if i == axes[0] else 1 for i in range(x.dim())]
    return places_in(torch.Size([length]), x.device).view(shape), length


def _serves_absmax(w: Tensor, grid: Grid, rule: ScaleRule) -> bool:
    return may_fuse_in_graph() and rule.channel_axis in (None, 0)


@add_kernel(quantize_by_absmax, "in a graph", _serves_absmax)
def _absmax(w: Tensor, grid: Grid, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    found = _Absmax.apply(w, grid, rule)  # type: ignore[no-untyped-call]
    return found[0], found[1]


# ------------------------------------------------------------ minifloats by a scale that is known


class _Minifloats(Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor | None, grid: MinifloatGrid) -> Tensor:
        return round_minifloats(x, scale, grid)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, ctx.how = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        operates = operators.may_operate(x)
        gradients = operators.gradients_of_minifloats if operates else minifloat_gradients
        found = gradients(grad, x, scale, ctx.how, ctx.needs_input_grad[1])
        return found[0], found[1] if ctx.needs_input_grad[1] else None, None


@add_kernel(minifloat_quantize, "in a graph", may_fuse_in_graph)
def _minifloats(
    x: Tensor, scale: Tensor | None, format: MinifloatFormat, rounding: str, clamp_gradient: bool
) -> Tensor:
    return _Minifloats.apply(x, scale, MinifloatGrid(format, rounding, clamp_gradient))  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------ what definitions ask


@add_kernel(is_recomputing, "in a graph", in_graph)
def _never() -> bool:
    """A compiler makes the pass that recomputes itself, and what is counted it counts once."""
    return False


@add_kernel(repeat_while, "in a graph", in_graph)
def _loop(
    going: Callable[..., Tensor],
    advance: Callable[..., tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    limit: int,
    look_every: int,
) -> tuple[Tensor, ...]:
    count = torch.zeros((), dtype=torch.int64, device=state[0].device)

    def goes_on(count: Tensor, *now: Tensor) -> Tensor:
        return going(*now) & (count < limit)

    def step(count: Tensor, *now: Tensor) -> tuple[Tensor, ...]:
        return count + 1, *advance(*now)

    loop = torch._higher_order_ops.while_loop
    return loop(goes_on, step, (count, *state))[1:]  # type: ignore[no-any-return]
