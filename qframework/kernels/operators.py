"""Operators of compiled graphs on CPUs: there the C++ functions quantize, as in eager mode, with the same bits.

What inductor makes of torch's functions for minifloats takes several times as long, backwards above all, and for large matrices of
integers a little longer. An operator is one node of the graph; a tensor that no C++ function takes it quantizes as eager mode does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qframework.configuration import settings
from qframework.functional import (
    IntegerGrid,
    MinifloatFormat,
    MinifloatGrid,
    ScaleRule,
    compute_dtype,
)
from qframework.kernels import native
from qframework.kernels.absmax import Grid, absmax_values
from qframework.kernels.absmax import absmax_gradient as _gradient
from qframework.kernels.autograd import may_fuse_in_graph
from qframework.kernels.minifloat import minifloat_gradients

#: Inductor may lay tensors out as suits it: those that no C++ function takes are computed all the same.
_TAGS = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)

#: Elements from which on an operator quantizes in less time than what inductor makes.
_LARGE = 1 << 20


# ------------------------------------------------------------ where


def _available() -> bool:
    return native.available()


# As torch.compiler.assume_constant_result does, which would import the compiler: it is asked while a graph is traced.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_operate(x: Tensor) -> bool:
    """Whether a graph that ``torch.compile`` traces may have operators for ``x``."""
    return (
        may_fuse_in_graph()
        and settings.kernels == "auto"
        and x.device.type == "cpu"
        and not _is_known(x.numel() < native.tensors.SMALLEST)
        and _available()
    )


def absmax_operates(x: Tensor, grid: Grid) -> bool:
    """Whether values and scale by the largest magnitude come from an operator.

    Smaller tensors, and what convolutions take, inductor quantizes along with what is done before and behind.
    """
    if isinstance(grid, IntegerGrid) and (isinstance(grid.minimum, Tensor) or x.dim() != 2):
        return False
    return may_operate(x) and _is_known(x.numel() >= _LARGE)


def absmax_gradient_operates(x: Tensor, grid: Grid) -> bool:
    """Whether the gradient does: that of minifloats is costly for any size."""
    return may_operate(x) if isinstance(grid, MinifloatGrid) else absmax_operates(x, grid)


def _is_known(answer: bool) -> bool:
    """Whether it is so for all sizes that a graph is for: to ask for one that changes would bind the graph to the answer."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(answer)


# ------------------------------------------------------------ what is stated, as operators take it


def numbers_of(grid: Grid) -> list[float]:
    """A grid without its rounding."""
    if isinstance(grid, MinifloatGrid):
        return [*map(float, grid.format), float(grid.clamp_gradient)]
    numbers: Any = (grid.minimum, grid.maximum, grid.clamp_gradient, grid.clips_first)
    return [*map(float, numbers)]


#: How many numbers describe a grid of integers; those of minifloats are more.
_OF_INTEGERS = 4


def _grid(numbers: Sequence[float], rounding: str) -> Grid:
    if len(numbers) == _OF_INTEGERS:
        minimum, maximum, clamps, clips_first = numbers
        return IntegerGrid(minimum, maximum, rounding, bool(clamps), bool(clips_first))
    mantissa, bias, largest, signed, overflow, clamps = numbers
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
    y, scale, top = absmax_values(x, native.Scheme(_grid(grid, rounding), rule))
    return _laid_out(y, x), scale.contiguous(), scale.new_empty(0) if top is None else top


def absmax(x: Tensor, grid: Grid, rule: ScaleRule) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scale, and the largest magnitude where there is one scale for all."""
    how = (numbers_of(grid), grid.rounding, *words_of(rule))
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.qframework.absmax(x, *how)
    return found


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
    largest, scheme = (
        None if top.dim() else top.to(scale.dtype),
        native.Scheme(_grid(grid, rounding), rule),
    )
    made = _gradient(_as_laid_out(g, x), grad_scale, x, scale, largest, scheme, True)
    if made is not g:
        g.copy_(made)


def absmax_gradient(
    grad: Tensor,
    grad_scale: Tensor,
    x: Tensor,
    scale: Tensor,
    top: Tensor,
    grid: Grid,
    rule: ScaleRule,
) -> Tensor:
    """The gradient of ``x`` for those of values and scale.

    Args:
        grad: of the values.
        grad_scale: of the scale.
        x: what was quantized.
        scale: that was made of it.
        top: the largest magnitude, 0-dim, where there is one scale for all, else anything with a dimension.
        grid: the numbers.
        rule: of the scale.
    """
    how = (numbers_of(grid), grid.rounding, *words_of(rule))
    grad_x = grad.clone()  # which a compiler leaves out where nobody else needs the gradient
    torch.ops.qframework.absmax_gradient_(grad_x, grad_scale, x, scale, top, *how)
    return grad_x


# ------------------------------------------------------------ minifloats by a scale that is known


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


def gradients_of_minifloats(
    grad: Tensor, x: Tensor, scale: Tensor | None, grid: MinifloatGrid, need_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Those of values and scale for that of the minifloats."""
    needs = scale is not None and need_scale
    how = (numbers_of(grid), grid.rounding, needs)
    of_x, of_scale = torch.ops.qframework.minifloat_gradients(grad, x, scale, *how)
    return of_x, of_scale if needs else None
