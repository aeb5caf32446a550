"""How the activations of a recurrent cell are quantized at each step.

While statistics are collected each step goes through the proxies. Once scales are known they are read once for a
sequence, and quantizers of neighbouring columns work together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qframework.functional import IntegerGrid, Range, fake_quantize
from qframework.kernels import Static
from qframework.quant_tensor import (
    CodebookQuantTensor,
    FloatQuantTensor,
    IntQuantTensor,
    dequantize,
)

Step = Callable[[Tensor], Tensor]


class UnknownScale(Exception):
    """Each step has to go through the proxies."""


def range_of(proxies: Sequence[Any], size: int, like: Tensor) -> Range | None:
    """The range of the quantizers of neighbouring columns, None where they do nothing.

    Args:
        proxies: one for each chunk of columns.
        size: columns of a chunk.
        like: a tensor on the device of the activations.

    Raises:
        UnknownScale: there is no such range: a scale depends on the input, or quantizers differ in more than scale and width.
    """
    if all(p.is_idle for p in proxies):
        return None
    statics = [p.static(like) for p in proxies]
    found: list[Range] = [s.range for s in statics if s is not None and s.range is not None]
    if len(found) < len(proxies) or any(_how(r.grid) != _how(found[0].grid) for r in found):
        raise UnknownScale
    first = found[0]
    if all(p is proxies[0] for p in proxies):
        return first
    grid = first.grid
    if any(r.grid != grid for r in found):  # another width or sign: bounds for each column too
        bounds = zip(*((r.grid.minimum, r.grid.maximum) for r in found), strict=True)
        low, high = (first.scale.new_tensor(b).repeat_interleave(size) for b in bounds)
        grid = IntegerGrid(low, high, *_how(grid))
    return Range(torch.stack([r.scale for r in found]).repeat_interleave(size), grid)


def _how(grid: IntegerGrid) -> tuple[str, bool]:
    return grid.rounding, grid.clamp_gradient


def step_of(proxies: Sequence[Any], order: Sequence[int], size: int, like: Tensor) -> Step:
    """The function that quantizes columns in chunks of ``size``, one proxy each.

    Args:
        proxies: one for each chunk.
        order: in which they see their chunks, where they collect statistics.
        size: columns of a chunk.
        like: a tensor on the device of the activations.
    """
    if all(p.is_idle for p in proxies):
        return _unchanged
    try:
        found = range_of(proxies, size, like)
    except UnknownScale:
        return _through(proxies, order, size)
    assert found is not None
    scale, grid = found
    return lambda x: fake_quantize(x, scale, None, grid)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _through(proxies: Sequence[Any], order: Sequence[int], size: int) -> Step:
    if len(proxies) == 1:
        return lambda x: dequantize(proxies[0](x))

    def quantize(x: Tensor) -> Tensor:
        chunks = list(x.split(size, dim=-1))
        for i in order:
            chunks[i] = dequantize(proxies[i](chunks[i]))
        return torch.cat(chunks, dim=-1)

    return quantize


#: Results whose values of several steps are one such tensor.
_ON_ONE_GRID = (IntQuantTensor, FloatQuantTensor, CodebookQuantTensor)


class OutputStep:
    """The same for a result that is kept with its scale: values of each step, one quantized tensor of all."""

    def __init__(self, proxy: Any, like: Tensor) -> None:
        self.proxy, self.records = proxy, []  # type: ignore[var-annotated]
        self.idle = proxy.is_idle
        found: Static | None = None if self.idle else proxy.static(like)
        self.static = found if found is not None and found.range is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        """The quantized values."""
        if self.idle:
            return x
        if self.static is not None:
            return self.static.step(x, False)
        record = self.proxy(x)
        self.records.append(record)
        return dequantize(record)  # type: ignore[no-any-return]

    def last(self, value: Tensor) -> Any:
        """The value of the last step as a quantized tensor, where it is quantized."""
        return self.records[-1] if self.records else self.wrap(value)

    def wrap(self, value: Tensor) -> Any:
        """Values of several steps as a quantized tensor, where they are quantized."""
        if self.idle:
            return value
        if self.static is None:
            last = self.records[-1] if self.records else self.proxy(value)
            if not isinstance(last, _ON_ONE_GRID):
                return value
            scale = last.scale
            if self.proxy.training and len(self.records) > 1:
                scale = torch.stack([r.scale for r in self.records]).mean(0)
            return last.replace(value=value, scale=scale)
        proxy = self.proxy
        scale, zero_point, bit_width = self.static.rest
        return IntQuantTensor.unchecked(
            value,
            scale,
            zero_point,
            bit_width,
            bool(proxy.is_signed),
            proxy.training,
            proxy.source,
            proxy.is_symmetric,
            proxy.has_zero,
        )


def with_batch(states: Any) -> Any:
    """States of one sequence as those of a batch of one."""
    if isinstance(states, (list, tuple)):
        return [s.unsqueeze(1) for s in states]
    return None if states is None else states.unsqueeze(1)


def state_of(states: Any, place: int) -> Any:
    """That of one layer and direction."""
    if isinstance(states, (list, tuple)):
        return states[place].squeeze(0)
    return None if states is None else states[place]
