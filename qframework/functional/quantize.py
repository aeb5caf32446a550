"""Quantize and dequantize: values, and values with the scale that they give or learn.

q = clamp(round(x / scale + zero_point), minimum, maximum),   y = (q - zero_point) * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.functional.minifloat import MinifloatGrid, minifloat_quantize
from qframework.functional.precision import upcast
from qframework.functional.registry import defined
from qframework.functional.rules import IntegerGrid, ScaleRule
from qframework.functional.scales import in_shape, learned_scale, over, statistic_scale
from qframework.functional.statistics import all_finite, kth_smallest
from qframework.functional.straight_through import (
    apply_step,
    scalar_clamp_min_ste,
    tensor_clamp,
    tensor_clamp_ste,
)


def to_integers(steps: Tensor, grid: IntegerGrid) -> Tensor:
    """The integers of a grid for numbers in its steps.

    Args:
        steps: floating-point tensor of any shape.
        grid: the integers.

    Returns:
        Integers in the shape and dtype of ``steps``, with a straight-through gradient.
    """
    if grid.clips_first:
        inner = torch.where(steps <= grid.minimum, grid.minimum, steps)
        return apply_step(torch.where(steps >= grid.maximum, grid.maximum, inner), grid.rounding)
    q = apply_step(steps, grid.rounding)
    clamp = tensor_clamp if grid.clamp_gradient else tensor_clamp_ste
    return clamp(q, grid.minimum, grid.maximum)


@defined
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: IntegerGrid,
    relu: bool = False,
) -> Tensor:
    """Quantize ``x`` to the values ``(q - zero_point) * scale`` of a grid of integers ``q``.

    The gradient passes the rounding straight through, and the clamp as the grid says.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``.
        zero_point: in integer steps, a tensor that broadcasts to ``x``; None for 0.
        grid: the integers.
        relu: quantize ``relu(x)``.

    Returns:
        Dequantized tensor with the shape and dtype of ``x``.
    """
    steps = upcast(torch.relu(x) if relu else x) / scale
    if zero_point is None:
        return (to_integers(steps, grid) * scale).to(x.dtype)
    return ((to_integers(steps + zero_point, grid) - zero_point) * scale).to(x.dtype)


@defined
def quantize_by_learned_scale(
    x: Tensor, stored: Tensor, grid: IntegerGrid, rule: ScaleRule, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize by a learned scale.

    Args:
        x: floating-point tensor.
        stored: the learned number in the domain of the scale, of the shape of the scale, which broadcasts to ``x``; of one element
            where the scale has no dimensions.
        grid: the integers.
        rule: the scale, of source ``'learned'``.
        relu: quantize ``relu(x)``.

    Returns:
        Dequantized values with the shape and dtype of ``x``, and the scale.
    """
    scale = learned_scale(in_shape(stored, rule), rule)
    return fake_quantize(x, scale, None, grid, relu), scale


@defined
def quantize_by_percentile(
    x: Tensor, rank: int, grid: IntegerGrid, rule: ScaleRule, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize by a percentile of the magnitudes of a batch, as quantizers do while they collect it.

    ``scale = max(magnitude, minimum) / threshold``, whatever the domain of the rule. The gradient also passes through the scale,
    to one element of that magnitude.

    Args:
        x: floating-point tensor.
        rank: of the magnitude, 1 for the smallest of all elements.
        grid: the integers.
        rule: the scale.
        relu: quantize ``relu(x)``, and take the percentile of that.

    Returns:
        Dequantized values with the shape and dtype of ``x``, the scale, the magnitude, kept above the minimum and without a
        gradient, and whether all elements are finite.
    """
    x = torch.relu(x) if relu else x
    magnitude = kth_smallest(x, rank, magnitude=True).reshape(rule.shape)
    if rule.minimum:
        magnitude = scalar_clamp_min_ste(magnitude, rule.minimum)
    scale = over(magnitude, rule.threshold)
    return fake_quantize(x, scale, None, grid), scale, magnitude.detach(), all_finite(x)


def rows_of(x: Tensor, channel_axis: int | None) -> Tensor:
    """A row for each channel, ``(C, n)``; all elements ``(n,)`` where there is no axis of channels."""
    if channel_axis is None:
        return x.reshape(-1)
    return x.transpose(0, channel_axis).reshape(x.shape[channel_axis], -1)


def _largest(rows: Tensor) -> Tensor:
    return rows.max() if rows.dim() == 1 else rows.max(dim=1).values


def _smallest(rows: Tensor) -> Tensor:
    return rows.min() if rows.dim() == 1 else rows.min(dim=1).values


@defined
def quantize_by_absmax(
    w: Tensor, grid: IntegerGrid | MinifloatGrid, rule: ScaleRule
) -> tuple[Tensor, Tensor]:
    """Quantize by the largest magnitude, of the tensor, or of each channel, row or group.

    The gradient also passes through the scale, to the elements of the largest magnitude: shared evenly among equals of
    a tensor, else to the first.

    Args:
        w: floating-point tensor, such as a weight.
        grid: the integers, or the minifloats.
        rule: the scale, of source ``'absmax'``.

    Returns:
        Dequantized values with the shape and dtype of ``w``, and the scale.
    """
    magnitudes = upcast(w).abs()
    if rule.reduced_axis is not None:
        largest = magnitudes.max(dim=rule.reduced_axis, keepdim=True).values
    else:
        largest = _largest(rows_of(magnitudes, rule.channel_axis)).reshape(rule.shape)
    scale = statistic_scale(largest, rule)
    if isinstance(grid, MinifloatGrid):
        return minifloat_quantize(w, scale, *grid), scale
    return fake_quantize(w, scale, None, grid), scale


@defined
def quantize_by_minmax(
    w: Tensor, grid: IntegerGrid, rule: ScaleRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize by the range from the smallest to the largest element, 0 included, of the tensor or of each channel.

    ``scale = (max(w, 0) - min(w, 0)) / threshold`` in its domain, ``zero_point = -min(w, 0) / scale + minimum``, an
    integer of the grid.

    Args:
        w: floating-point tensor, such as a weight.
        grid: the integers.
        rule: the scale, of source ``'minmax'``.

    Returns:
        Dequantized values with the shape and dtype of ``w``, scale and zero point.
    """
    rows = rows_of(upcast(w), rule.channel_axis)
    high, low = _largest(rows), _smallest(rows)
    high = torch.where(high < 0, torch.zeros_like(high), high).reshape(rule.shape)
    low = torch.where(low > 0, torch.zeros_like(low), low).reshape(rule.shape)
    scale = statistic_scale(high - low, rule)
    zero_point = to_integers(-low / scale + grid.minimum, grid)
    return fake_quantize(w, scale, zero_point, grid), scale, zero_point
