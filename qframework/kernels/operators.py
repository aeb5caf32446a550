"""Operators of compiled graphs on CPUs: there the C++ functions quantize, as in eager mode, with the same bits.

What inductor makes of torch's functions for minifloats takes several times as long, backwards above all, and for large matrices of
integers a little longer. An operator is one node of the graph; a tensor that no C++ function takes it quantizes as eager mode does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qframework.configuration import settings
from qframework.functional import (
    IntegerGrid,
    MinifloatFormat,
    MinifloatGrid,
    ScaleRule,
    add_kernel,
    compute_dtype,
    minifloat_quantize,
    quantize_by_absmax,
)
from qframework.kernels import native
from qframework.kernels.absmax import Grid, absmax_gradient, absmax_values
from qframework.kernels.autograd import Context, may_fuse_in_graph
from qframework.kernels.minifloat import minifloat_gradients
from qframework.kernels.rounding import round_minifloats

#: Inductor may lay tensors out as suits it: those that no C++ function takes are computed all the same.
_TAGS = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)

#: Elements from which on matrices of integers are quantized by operators.
_LARGE = 1 << 20


# ------------------------------------------------------------ where


def _available() -> bool:
    return native.available()


# As torch.compiler.assume_constant_result does, which would import the compiler: it is asked while a graph is traced.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_operate(x: Tensor, *_: object) -> bool:
    """Whether a graph that ``torch.compile`` traces quantizes ``x`` by an operator."""
    return (
        may_fuse_in_graph()
        and settings.kernels == "auto"
        and x.device.type == "cpu"
        and not _is_small(x)
        and _available()
    )


def _is_small(x: Tensor) -> bool:
    """Whether it is known to be; a size that changes isn't asked for, as the graph would hold for its answer alone."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.numel() < native.tensors.SMALLEST)


# ------------------------------------------------------------ what is stated, as operators take it


def numbers_of(grid: Grid) -> list[float]:
    """A grid without its rounding."""
    if isinstance(grid, MinifloatGrid):
        return [*map(float, grid.format), float(grid.clamp_gradient)]
    bounds: Any = (grid.minimum, grid.maximum)
    return [*map(float, bounds), float(grid.clamp_gradient)]


def _grid(numbers: Sequence[float], rounding: str) -> Grid:
    *found, clamps = numbers
    if len(found) == 2:
        return IntegerGrid(found[0], found[1], rounding, bool(clamps))
    mantissa, bias, largest, signed, overflow = found
    form = MinifloatFormat(int(mantissa), int(bias), largest, bool(signed), overflow)
    return MinifloatGrid(form, rounding, bool(clamps))


def words_of(rule: ScaleRule) -> tuple[Any, ...]:
    """A rule of a largest magnitude, as operators take it."""
    minimum = rule.minimum or 0.0
    return (
        [rule.threshold, minimum],
        rule.domain,
        rule.rounding,
        list(rule.shape),
        rule.channel_axis is not None,
        rule.reduced_axis,
    )


def _rule(
    numbers: Sequence[float],
    domain: str,
    rounding: str,
    shape: Sequence[int],
    by_channel: bool,
    reduced_axis: int | None,
) -> ScaleRule:
    channel_axis = 0 if by_channel else None
    how: Any = (tuple(shape), channel_axis, reduced_axis)
    return ScaleRule("absmax", numbers[0], domain, rounding, numbers[1], *how)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` as a graph expects it: in the memory format that :func:`torch.empty_like` gives."""
    if t.stride() == like.stride() and t.data_ptr() != like.data_ptr():
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def _as_laid_out(g: Tensor, x: Tensor) -> Tensor:
    """A gradient in the memory format of that whose gradient it is."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


# ------------------------------------------------------------ by the largest magnitude


@torch.library.custom_op("qframework::absmax", mutates_args=(), tags=_TAGS)
def _absmax(
    x: Tensor,
    grid: Sequence[float],
    rounding: str,
    numbers: Sequence[float],
    domain: str,
    exponents: str,
    shape: Sequence[int],
    by_channel: bool,
    reduced_axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scale, and the largest magnitude where there is one, else nothing."""
    rule = _rule(numbers, domain, exponents, shape, by_channel, reduced_axis)
    y, scale, top = absmax_values(x, _grid(grid, rounding), rule)
    return _laid_out(y, x), scale.contiguous(), scale.new_empty(0) if top is None else top


@_absmax.register_fake
def _(
    x: Tensor,
    grid: Sequence[float],
    rounding: str,
    numbers: Sequence[float],
    domain: str,
    exponents: str,
    shape: Sequence[int],
    by_channel: bool,
    reduced_axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, lengths = compute_dtype(x.dtype), list(shape)
    if reduced_axis is not None:
        lengths = list(x.shape)
        lengths[reduced_axis] = 1
    whole = reduced_axis is None and not by_channel
    top = x.new_empty(() if whole else (0,), dtype=dtype)
    return torch.empty_like(x), x.new_empty(lengths, dtype=dtype), top


@torch.library.custom_op("qframework::absmax_gradient_", mutates_args=("g",), tags=_TAGS)
def _absmax_gradient(
    g: Tensor,
    grad_scale: Tensor,
    x: Tensor,
    scale: Tensor,
    top: Tensor,
    grid: Sequence[float],
    rounding: str,
    numbers: Sequence[float],
    domain: str,
    exponents: str,
    shape: Sequence[int],
    by_channel: bool,
    reduced_axis: int | None,
) -> None:
    """From the gradient of the values that :func:`_absmax` gives to that of what it was given, in place."""
    rule = _rule(numbers, domain, exponents, shape, by_channel, reduced_axis)
    largest, how = None if top.dim() else top, _grid(grid, rounding)
    made = absmax_gradient(_as_laid_out(g, x), grad_scale, x, scale, largest, how, rule, True)
    if made is not g:
        g.copy_(made)


# ------------------------------------------------------------ minifloats by a scale that is known


@torch.library.custom_op("qframework::minifloats", mutates_args=(), tags=_TAGS)
def _minifloats(x: Tensor, scale: Tensor | None, grid: Sequence[float], rounding: str) -> Tensor:
    """The nearest minifloats."""
    found: Any = _grid(grid, rounding)
    return _laid_out(round_minifloats(x, scale, found), x)


@_minifloats.register_fake
def _(x: Tensor, scale: Tensor | None, grid: Sequence[float], rounding: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qframework::minifloat_gradients", mutates_args=(), tags=_TAGS)
def _minifloat_gradients(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    grid: Sequence[float],
    rounding: str,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of values and scale for that of the minifloats; nothing for a scale that needs none."""
    how: Any = _grid(grid, rounding)
    of_x, of_scale = minifloat_gradients(_as_laid_out(g, x), x, scale, how, need_scale)
    if of_scale is None or not need_scale:
        of_scale = x.new_empty(0)
    return _laid_out(of_x, x), of_scale


@_minifloat_gradients.register_fake
def _(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    grid: Sequence[float],
    rounding: str,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    of_scale = x.new_empty(0) if scale is None or not need_scale else torch.empty_like(scale)
    return torch.empty_like(x), of_scale


# ------------------------------------------------------------ the functions


class _Absmax(Function):
    @staticmethod
    def forward(x: Tensor, grid: Grid, rule: ScaleRule) -> tuple[Tensor, Tensor, Tensor]:
        how = (numbers_of(grid), grid.rounding, *words_of(rule))
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.qframework.absmax(x, *how)
        return found

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
        how = (numbers_of(grid), grid.rounding, *words_of(rule))
        grad_x = grad.clone()  # which a compiler leaves out where nobody else needs the gradient
        torch.ops.qframework.absmax_gradient_(grad_x, grad_scale, x, scale, top, *how)
        return grad_x, None, None


def _serves_absmax(w: Tensor, grid: Grid, rule: ScaleRule) -> bool:
    if rule.channel_axis not in (None, 0) or not may_operate(w):
        return False
    if isinstance(grid, MinifloatGrid):
        return True
    return not isinstance(grid.minimum, Tensor) and _is_large_matrix(w)


def _is_large_matrix(w: Tensor) -> bool:
    """Whether integers of ``w`` are quicker by an operator, too.

    Smaller ones, and what convolutions take, inductor quantizes along with what is done before and behind.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return w.dim() == 2 and statically_known_true(w.numel() >= _LARGE)


@add_kernel(quantize_by_absmax, "operator in a graph", _serves_absmax)
def _by_absmax(w: Tensor, grid: Grid, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    found = _Absmax.apply(w, grid, rule)  # type: ignore[no-untyped-call]
    return found[0], found[1]


class _Minifloats(Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor | None, grid: MinifloatGrid) -> Tensor:
        found: Tensor = torch.ops.qframework.minifloats(x, scale, numbers_of(grid), grid.rounding)
        return found

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, ctx.how = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        needs = scale is not None and ctx.needs_input_grad[1]
        how = (numbers_of(ctx.how), ctx.how.rounding, needs)
        found = torch.ops.qframework.minifloat_gradients(grad, x, scale, *how)
        return found[0], found[1] if needs else None, None


@add_kernel(minifloat_quantize, "operator in a graph", may_operate)
def _to_minifloats(
    x: Tensor, scale: Tensor | None, format: MinifloatFormat, rounding: str, clamp_gradient: bool
) -> Tensor:
    return _Minifloats.apply(x, scale, MinifloatGrid(format, rounding, clamp_gradient))  # type: ignore[no-any-return, no-untyped-call]
