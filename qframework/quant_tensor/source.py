"""Whether two tensors have the same scale, known from where their scales come from.

A source stands for a grid: scale, zero point, width and sign. ``("scale", source)`` stands for its scale alone; sums,
negations and sums of products have that, since their zero points and widths are others.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qframework.quant_tensor.record import Record

#: Where a scale comes from: an object for the quantizer that made it, or a tuple that says how it follows from other
#: sources; compared with ``==``. None where it is unknown.
Source = Hashable | None


def product_source(a: Record, b: Record) -> Source:
    """The source of the product of two scales, None where one of them is unknown."""
    source_a, source_b = _of_scale(a.source), _of_scale(b.source)
    if source_a is None or source_b is None:
        return None
    return ("product", source_a, source_b)


def scale_only(source: Source) -> Source:
    """The source of a tensor that has the scale of ``source``, and another zero point, width or sign."""
    return None if source is None else ("scale", _of_scale(source))


def _of_scale(source: Source) -> Source:
    if isinstance(source, tuple) and source[0] == "scale":
        of_scale: Source = source[1]
        return of_scale
    return source


def moved_source(q: Record, *how: object) -> Source:
    """The source of ``q`` with its elements moved; None where several scales move in a way unknown.

    One scale stays what it is. Several are the same as others of their source only when they moved alike.

    Args:
        q: before the movement.
        *how: which movement it is: strings, ints, slices, and lists of them.
    """
    if q.source is None or (q.scale.numel() == 1 and q.zero_point.numel() == 1):
        return q.source
    if not how or not _is_constant(how):
        return None
    moved = ("moved", _of_scale(q.source), _hashable(how))
    return moved if _of_scale(q.source) is q.source else ("scale", moved)


def _is_constant(x: object) -> bool:
    if isinstance(x, (tuple, list)):
        return all(_is_constant(i) for i in x)
    if isinstance(x, slice):
        return _is_constant((x.start, x.stop, x.step))
    return x is None or x is Ellipsis or type(x) in (bool, int, str)


def _hashable(x: object) -> object:
    if isinstance(x, (tuple, list)):
        return tuple([_hashable(i) for i in x])
    return ("slice", x.start, x.stop, x.step) if isinstance(x, slice) else x


def same_grid(a: Record, b: Record) -> bool:
    """True when scale, zero point, width and sign are known to be the same, without looking."""
    if a is b:
        return True
    if a.training or b.training or a.source is None:
        return False
    return a.source == b.source and _of_scale(a.source) is a.source


def same_source(a: Record, b: Record) -> bool:
    """True when both scales are known to come from one place, in evaluation mode, where it doesn't move."""
    if a.training or b.training:
        return a.scale is b.scale
    if a.scale is b.scale:
        return True
    return a.source is not None and _of_scale(a.source) == _of_scale(b.source)


def can_read(*tensors: Tensor) -> bool:
    """Whether values may be looked at: not while tracing, not on the meta device."""
    if torch.compiler.is_compiling():
        return False
    return not any(t.is_meta or type(t) is torch._subclasses.FakeTensor for t in tensors)


def require_same_scale(operation: str, a: Record, b: Record) -> None:
    """Refuse two tensors whose scales differ, or can't be known to be the same.

    Raises:
        RuntimeError: with the remedy.
    """
    if same_source(a, b) or a.training or b.training:
        return
    remedy = (
        "Let both come from one quantizer: QuantIdentity(act_quant=other.act_quant), "
        "or add their values: a.value + b.value"
    )
    if not can_read(a.scale, b.scale):
        raise RuntimeError(
            f"{operation} of two quantized tensors: they come from different quantizers, so that their scales can't "
            f"be known to be the same while tracing. {remedy}"
        )
    if not _broadcast(a.scale.shape, b.scale.shape):
        raise RuntimeError(
            f"{operation} of two quantized tensors: scales of shapes {tuple(a.scale.shape)} and "
            f"{tuple(b.scale.shape)}. {remedy}"
        )
    if not torch.allclose(a.scale, b.scale):
        raise RuntimeError(
            f"{operation} of two quantized tensors with different scales: {_brief(a.scale)} and {_brief(b.scale)}. "
            f"Integers on different grids can't be combined exactly. {remedy}"
        )


def _broadcast(a: torch.Size, b: torch.Size) -> bool:
    return all(n == m or 1 in (n, m) for n, m in zip(reversed(a), reversed(b), strict=False))


def _brief(t: Tensor) -> str:
    if t.numel() == 1:
        return f"{float(t.detach()):.6g}"
    return (
        f"{float(t.detach().min()):.6g} to {float(t.detach().max()):.6g} (shape {tuple(t.shape)})"
    )
