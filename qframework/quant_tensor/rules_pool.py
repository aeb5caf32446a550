"""Pooling, and nearest interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.functional.products import Numbers
from qframework.quant_tensor.algebra import bits_of_codes, bits_of_range, bounds, in_float64
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.record import Record
from qframework.quant_tensor.registry import RULES, rule
from qframework.quant_tensor.source import scale_only


def per_position(q: Record, spatial: int) -> bool:
    """Whether a scale or zero point differs between positions that a window may hold."""
    for t in (q.scale, q.zero_point):
        if t.numel() > 1 and any(n > 1 for n in t.shape[max(t.dim() - spatial, 0) :]):
            return True
    return False


def _max_pool_rule(function: Callable[..., Any], spatial: int) -> None:
    def apply(q: Record, *args: object, **kwargs: object) -> Any:
        if per_position(q, spatial):
            return NotImplemented
        result = function(q.value, *args, **kwargs)
        if isinstance(result, tuple):
            return q.replace(value=result[0]), result[1]
        return q.replace(value=result)

    RULES[function] = apply


# a rule for each, since they differ in whether they return indices: with, without, or when asked to
for _place in (F, torch):
    for _n in (1, 2, 3):
        for _name in (f"max_pool{_n}d", f"adaptive_max_pool{_n}d"):
            for _function in (_name, f"{_name}_with_indices"):
                if hasattr(_place, _function):
                    _max_pool_rule(getattr(_place, _function), _n)


@rule("interpolate", "upsample", method=False)
def _interpolate(
    q: Record,
    size: Numbers | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Nearest neighbours repeat elements; the other modes leave the grid."""
    if mode not in ("nearest", "nearest-exact") or per_position(q, q.value.dim() - 2):
        return NotImplemented
    return q.replace(value=F.interpolate(q.value, size, scale_factor, mode, *args, **kwargs))


def averaged(q: IntQuantTensor, value: Tensor, divisor: int, window: int) -> Any:
    """The sum of a window's integers, on the scale over the divisor.

    Args:
        q: the tensor that was averaged.
        value: the means.
        divisor: of the sums.
        window: how many elements a sum has.
    """
    low, high = bounds(q)
    customary = bits_of_codes(window * (2.0 ** in_float64(q.bit_width) - 1) + 1)
    bits = torch.maximum(customary, bits_of_range(low * window, high * window, q.signed))
    source = None if q.source is None else ("average", scale_only(q.source), divisor)
    return q.replace(
        value=value,
        scale=q.scale / divisor,
        zero_point=q.zero_point if q.symmetric else q.zero_point * window,
        bit_width=bits.to(q.bit_width.dtype),
        source=scale_only(source),
        has_zero=q.symmetric or q.has_zero,
    )


def window_sizes(size: Numbers, spatial: int) -> tuple[int, ...]:
    """A size of each axis, from one for all or a sequence."""
    if isinstance(size, int):
        return (size,) * spatial
    return tuple(size) * (spatial if len(size) == 1 else 1)


def _average_pool_rule(spatial: int) -> None:
    function = getattr(F, f"avg_pool{spatial}d")

    def apply(
        q: IntQuantTensor,
        kernel_size: Numbers,
        stride: Numbers | None = None,
        padding: Numbers = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *divisor: int | None,
        divisor_override: int | None = None,
    ) -> Any:
        """Mean of windows: the sum of integers on a scale divided by the area."""
        if divisor:
            (divisor_override,) = divisor
        more = () if spatial == 1 else (divisor_override,)
        stride = kernel_size if stride is None else stride
        value = function(q.value, kernel_size, stride, padding, ceil_mode, count_include_pad, *more)
        padded = any(window_sizes(padding, spatial))
        uneven = (padded and not count_include_pad) or ceil_mode
        short = padded or ceil_mode  # windows that reach beyond the border sum fewer zero points
        off_grid = short and not (q.symmetric or q.has_zero)
        if off_grid or per_position(q, spatial) or (uneven and divisor_override is None):
            return value
        area = math.prod(window_sizes(kernel_size, spatial))
        return averaged(q, value, divisor_override or area, area)

    rule(f"avg_pool{spatial}d", method=False)(apply)


def _adaptive_average_pool_rule(spatial: int) -> None:
    function = getattr(F, f"adaptive_avg_pool{spatial}d")

    def apply(q: IntQuantTensor, output_size: Numbers) -> Any:
        """As average pooling where all windows are equally large, else a float tensor."""
        value = function(q.value, output_size)
        sizes = q.value.shape[-spatial:], value.shape[-spatial:]
        if per_position(q, spatial) or any(n % m for n, m in zip(*sizes, strict=True)):
            return value
        area = math.prod([n // m for n, m in zip(*sizes, strict=True)])
        return averaged(q, value, area, area)

    rule(f"adaptive_avg_pool{spatial}d", method=False)(apply)


for _spatial in (1, 2, 3):
    _average_pool_rule(_spatial)
    _adaptive_average_pool_rule(_spatial)
