"""Values on a grid by a scale that is known, in few passes over memory, outside of autograd.

q = clamp(round(x / scale + zero_point), minimum, maximum);   y = (q - zero_point) * scale
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qframework.functional import (
    EXPONENTS,
    ROUNDINGS,
    IntegerGrid,
    MinifloatFormat,
    MinifloatGrid,
    compute_dtype,
)
from qframework.kernels import native

# ------------------------------------------------------------ integers


def quantize_as(
    scheme: native.Scheme, x: Tensor, scale: Tensor | None, zero_point: Tensor | None
) -> Tensor:
    """The values of a scheme for a scale that is known; None for 1."""
    grid = scheme.grid
    if scale is not None and zero_point is None and not scheme.is_whole:
        axis = native.axis_to_move(x, tuple(scale.shape), scheme.rounding)
        if axis is not None:
            x, scale = native.axis_last(x, axis), native.axis_last(scale, axis)
            return native.axis_back(quantize_as(scheme.along_last(), x, scale, None), axis)
    if isinstance(grid, MinifloatGrid):
        return round_minifloats(x, scale, grid, scheme)
    assert scale is not None
    return quantize(x, scale, zero_point, grid, scheme.relu, scheme)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    relu: bool = False,
    scheme: native.Scheme | None = None,
) -> Tensor:
    """The values of :func:`~qframework.functional.fake_quantize`; ``relu`` where :func:`can_fuse_relu` allows it.

    ``scheme`` is that of the grid and ``relu``, where there is one already.
    """
    layout = integer_layout(x, scale, zero_point, grid)
    if layout is not None:
        scheme = native.Scheme(grid, relu=relu) if scheme is None else scheme
        return native.quantize(layout, x, scale, zero_point, scheme)
    q = x.to(compute_dtype(x.dtype)) / scale
    if zero_point is not None:
        q += zero_point
    q = q.round_() if grid.rounding == "round" else ROUNDINGS[grid.rounding](q)
    q = q.clamp_(grid.minimum, grid.maximum)  # type: ignore[arg-type]
    if zero_point is not None:
        q -= zero_point
    return q.mul_(scale).to(x.dtype)


def integer_layout(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    g: Tensor | None = None,
) -> native.Layout | None:
    """How C++ functions take the operands; None where they don't."""
    if zero_point is not None and zero_point.shape != scale.shape:
        return None
    if isinstance(grid.minimum, Tensor):
        return None
    if grid.clips_first and grid.rounding != "round" and g is not None:
        return None
    return native.serves(x, scale.shape, grid.rounding, scale, zero_point, g=g)


# ------------------------------------------------------------ minifloats


def _power_below(x: Tensor) -> Tensor:
    """``2^floor(log2|x|)`` exactly; 0 for 0 and subnormal numbers, infinity for infinity, NaN."""
    integers, mask = EXPONENTS[x.dtype]
    return (x.view(integers) & mask).view(x.dtype)


class Placed(NamedTuple):
    """Values on the unbounded grid.

    Attributes:
        q: the numbers.
        slope: how far they move with the values: 1 but for normal numbers.
        normal: whether they are.
    """

    q: Tensor
    slope: Callable[[], Tensor]
    normal: Callable[[], Tensor]


def placed(v: Tensor, fmt: MinifloatFormat, rounding: str) -> Placed:
    """Values on the grid of a format, before they are bounded."""
    power = _power_below(v)
    smallest = 2.0 ** (1 - fmt.exponent_bias)
    unit = power.clamp_min(smallest) * 2.0**-fmt.mantissa_bits
    steps = v / unit
    whole = ROUNDINGS[rounding](steps)
    q = whole * unit
    q = q if fmt.saturates else torch.where(v.isinf(), v, q)

    def normal() -> Tensor:
        return (power >= smallest) & ~v.isnan()

    return Placed(q, lambda: torch.where(normal(), whole / steps, 1.0), normal)


def bounded(q: Tensor, fmt: MinifloatFormat) -> Tensor:
    """What a format has of numbers on its grid."""
    bounded = q.clamp(-fmt.largest if fmt.signed else 0.0, fmt.largest)
    if fmt.saturates:
        return bounded
    if fmt.signed:
        bounded = torch.where(q < -fmt.largest, -fmt.overflow, bounded)
    return torch.where(q > fmt.largest, fmt.overflow, bounded)


def outside(q: Tensor, fmt: MinifloatFormat, clamp_gradient: bool) -> Tensor:
    """Where what is bounded no longer moves with the value."""
    above = q > fmt.largest if clamp_gradient or not fmt.saturates else q > math.inf
    if not clamp_gradient and (fmt.saturates or not fmt.signed):
        return above
    return above | (q < (-fmt.largest if fmt.signed else 0.0))


def round_minifloats(
    x: Tensor, scale: Tensor | None, grid: MinifloatGrid, scheme: native.Scheme | None = None
) -> Tensor:
    """The values of :func:`~qframework.functional.minifloat_quantize`; ``scheme`` is that of the grid, where there is one already."""
    layout = minifloat_layout(x, scale, grid)
    if layout is not None:
        return native.quantize(
            layout, x, scale, None, native.Scheme(grid) if scheme is None else scheme
        )
    v = x.to(compute_dtype(x.dtype))
    v = v if scale is None else v / scale
    q = bounded(placed(v, grid.format, grid.rounding).q, grid.format)
    return (q if scale is None else q * scale).to(x.dtype)


def minifloat_layout(
    x: Tensor, scale: Tensor | None, grid: MinifloatGrid, g: Tensor | None = None
) -> native.Layout | None:
    """How C++ functions take the operands; None where they don't."""
    shape = () if scale is None else tuple(scale.shape)
    return native.serves(x, shape, native.rounding_of(grid), scale, g=g)
