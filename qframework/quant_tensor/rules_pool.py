"""Pooling, and nearest interpolation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.functional import max_int, min_int
from qframework.quant_tensor.algebra import bits_of, bits_of_range
from qframework.quant_tensor.registry import rule


def _per_position(q: Any, spatial: int) -> bool:
    """Whether a scale or zero point differs between positions that a window may hold."""
    for t in (q.scale, q.zero_point):
        if t.numel() > 1 and any(n > 1 for n in t.shape[max(t.dim() - spatial, 0) :]):
            return True
    return False


def _max_pool_rule(name: str, spatial: int) -> None:
    function = getattr(F, name)

    def apply(q: Any, *args: Any, **kwargs: Any) -> Any:
        if _per_position(q, spatial):
            return NotImplemented
        result = function(q.value, *args, **kwargs)
        if isinstance(result, tuple):
            return q.set(value=result[0]), result[1]
        return q.set(value=result)

    rule(name, f"{name}_with_indices", method=False)(apply)


for _n in (1, 2, 3):
    _max_pool_rule(f"max_pool{_n}d", _n)
    _max_pool_rule(f"adaptive_max_pool{_n}d", _n)


@rule("interpolate", "upsample", method=False)
def _interpolate(
    q: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *a: Any, **k: Any
) -> Any:
    """Nearest neighbours repeat elements; the other modes leave the grid."""
    if mode not in ("nearest", "nearest-exact") or _per_position(q, q.value.dim() - 2):
        return NotImplemented
    return q.set(value=F.interpolate(q.value, size, scale_factor, mode, *a, **k))


def _averaged(q: Any, value: Tensor, divisor: int, window: int) -> Any:
    """The sum of a window's integers, on the scale over the divisor."""
    low, high = min_int(q.signed, False, q.bit_width), max_int(q.signed, False, q.bit_width)
    customary = bits_of(window * (2.0**q.bit_width - 1))
    return q.set(
        value=value,
        scale=q.scale / divisor,
        zero_point=q.zero_point if q.symmetric else q.zero_point * window,
        bit_width=torch.maximum(customary, bits_of_range(low * window, high * window, q.signed)),
        source=None if q.source is None else ("average", q.source, divisor),
    )


@rule("avg_pool2d", method=False)
def _avg_pool2d(
    q: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Mean of windows: the sum of integers on a scale divided by the area."""
    value = F.avg_pool2d(
        q.value, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    padded = padding not in (0, (0, 0))
    uneven = (padded and not count_include_pad) or ceil_mode
    off_grid = padded and not q.has_zero
    if off_grid or _per_position(q, 2) or (uneven and divisor_override is None):
        return value
    area = math.prod((kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size)
    return _averaged(q, value, divisor_override or area, area)


@rule("adaptive_avg_pool2d", method=False)
def _adaptive_avg_pool2d(q: Any, output_size: Any) -> Any:
    """As average pooling where all windows are equally large, else a float tensor."""
    value = F.adaptive_avg_pool2d(q.value, output_size)
    sizes = q.value.shape[-2:], value.shape[-2:]
    if _per_position(q, 2) or any(n % m for n, m in zip(*sizes, strict=True)):
        return value
    area = math.prod(n // m for n, m in zip(*sizes, strict=True))
    return _averaged(q, value, area, area)
