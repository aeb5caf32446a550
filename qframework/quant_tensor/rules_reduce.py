"""Sums, means and extremes along axes; choices between elements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qframework.quant_tensor.algebra import bits_of_range, bounds
from qframework.quant_tensor.base import Dims, Operand, QuantTensor, TensorLike
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.record import Record
from qframework.quant_tensor.registry import METHODS, RULES, rule
from qframework.quant_tensor.rules_pool import averaged
from qframework.quant_tensor.source import can_read, same_grid, scale_only


def _axes(q: IntQuantTensor, dim: Dims) -> tuple[int, ...]:
    ndim = q.value.dim()
    if ndim == 0 or dim is None or (isinstance(dim, (tuple, list)) and len(dim) == 0):
        return tuple(range(ndim))  # one number takes its axes as 0 or -1, which torch checks
    return tuple(d % ndim for d in ((dim,) if isinstance(dim, int) else dim))


def _without(t: Tensor, q: IntQuantTensor, axes: tuple[int, ...], keepdim: bool) -> Tensor | None:
    """A scale or zero point of what is left of some axes; None where it varies along one of them."""
    if t.numel() == 1:
        return t.reshape(())
    full = t.reshape((1,) * (q.value.dim() - t.dim()) + tuple(t.shape))
    if any(full.shape[a] > 1 for a in axes):
        return None
    return full if keepdim else full.squeeze(axes)


def _along(q: IntQuantTensor, dim: Dims, keepdim: bool) -> tuple[int, Tensor, Tensor] | None:
    """How many elements are joined, and the scale and zero point that they share."""
    axes = _axes(q, dim)
    scale, zero_point = (_without(t, q, axes, keepdim) for t in (q.scale, q.zero_point))
    if scale is None or zero_point is None:
        return None
    return math.prod([q.value.shape[a] for a in axes]), scale, zero_point


@rule("sum")
def _sum(
    q: IntQuantTensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The sum of integers, wide enough for all of them; zero points add up too."""
    found = _along(q, dim, keepdim) if dtype is None else None
    if found is None:
        return NotImplemented
    count, scale, zero_point = found
    low, high = bounds(q)
    bits = bits_of_range(low * count, high * count, q.signed)
    return q.replace(
        value=q.value.sum() if dim is None else q.value.sum(dim, keepdim),
        scale=scale,
        zero_point=zero_point if q.symmetric else zero_point * count,
        bit_width=torch.maximum(bits.to(q.bit_width.dtype), q.bit_width),
        source=scale_only(q.source) if scale.numel() == 1 else None,
        has_zero=q.symmetric or q.has_zero,
    )


@rule("mean")
def _mean(
    q: IntQuantTensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The sum of integers on a scale divided by their number."""
    found = _along(q, dim, keepdim) if dtype is None else None
    if found is None:
        return NotImplemented
    count, scale, zero_point = found
    if count == 0:
        return NotImplemented
    value = q.value.mean() if dim is None else q.value.mean(dim, keepdim)
    source = q.source if scale.numel() == 1 else None
    return averaged(
        q.replace(scale=scale, zero_point=zero_point, source=source), value, count, count
    )


def _extreme_rule(name: str) -> None:
    function = getattr(torch, name)

    def apply(q: IntQuantTensor, dim: Dims = (), keepdim: bool = False) -> Any:
        found = _along(q, dim, keepdim)
        if found is None:
            return NotImplemented
        _, scale, zero_point = found
        source = q.source if scale.numel() == 1 else None
        value = function(q.value, () if dim is None else dim, keepdim)
        return q.replace(value=value, scale=scale, zero_point=zero_point, source=source)

    rule(name)(apply)


def _choice_rule(name: str) -> None:
    function = getattr(torch, name)

    def apply(q: IntQuantTensor, dim: int | TensorLike | None = None, keepdim: bool = False) -> Any:
        """Largest or smallest elements; with ``dim`` their places too."""
        if isinstance(dim, (QuantTensor, Tensor)):
            return NotImplemented
        found = _along(q, dim, keepdim)
        if found is None:
            return NotImplemented
        _, scale, zero_point = found
        source = q.source if scale.numel() == 1 else None
        result = function(q.value) if dim is None else function(q.value, dim, keepdim)
        fields = {"scale": scale, "zero_point": zero_point, "source": source}
        if dim is None:
            return q.replace(value=result, **fields)
        return type(result)((q.replace(value=result[0], **fields), result[1]))

    rule(name)(apply)


for _name in ("amax", "amin"):
    _extreme_rule(_name)
for _name in ("max", "min"):
    _choice_rule(_name)


@rule("masked_fill")
def _masked_fill(q: IntQuantTensor, mask: Tensor, value: Operand) -> Any:
    """Zeros, where 0 is on the grid; another number leaves it."""
    zero = not isinstance(value, Tensor) and value == 0
    if not zero or not q.has_zero:
        return NotImplemented
    filled = q.value.masked_fill(mask, 0.0)
    return q.replace(value=filled) if filled.shape == q.value.shape else NotImplemented


def _where(condition: Tensor, input: Operand | None = None, other: Operand | None = None) -> Any:
    """Elements of two tensors on one grid, or of one and zeros."""
    a, b = input, other
    if a is None or b is None:
        return NotImplemented
    first, second = (a, b) if isinstance(a, Record) else (b, a)
    if not isinstance(first, Record):
        return NotImplemented
    plain_a, plain_b = (x.value if isinstance(x, QuantTensor) else x for x in (a, b))
    value = torch.where(condition, plain_a, plain_b)
    if value.shape != first.value.shape:
        return NotImplemented
    if isinstance(second, Record):
        return first.replace(value=value) if _one_grid(first, second) else NotImplemented
    zero = not isinstance(second, Tensor) and second == 0
    return first.replace(value=value) if zero and first.has_zero else NotImplemented


def _one_grid(a: Record, b: Record) -> bool:
    if type(a) is not type(b) or a.signed != b.signed or a.training or b.training:
        return False
    if same_grid(a, b):
        return True
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("scale", "zero_point", "bit_width")]
    if all(x is y for x, y in pairs):
        return True
    return all(x.shape == y.shape and can_read(x, y) and bool((x == y).all()) for x, y in pairs)


RULES[torch.where] = _where


def _tensor_where(q: TensorLike, condition: Tensor, other: Operand) -> Any:
    return _where(condition, q, other)


RULES[torch.Tensor.where] = METHODS["where"] = _tensor_where
