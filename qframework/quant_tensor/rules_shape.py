"""Functions that only move elements: scales and zero points move with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.functional.products import Numbers
from qframework.quant_tensor.base import Dims, QuantTensor, TensorLike, dispatch
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.record import Record, has_field
from qframework.quant_tensor.registry import METHODS, RULES, rule
from qframework.quant_tensor.source import (
    can_read,
    moved_source,
    require_same_scale,
    same_grid,
    same_source,
    scale_only,
)


def _full_rank(t: Tensor, ndim: int) -> Tensor:
    return t.reshape((1,) * (ndim - t.dim()) + tuple(t.shape))


def _moved(
    q: Record,
    results: Tensor | Sequence[Tensor],
    move: Callable[[Tensor], Any],
    *how: object,
    of_value: Callable[[Tensor], Any] | None = None,
) -> Any:
    """Wrap the result of a movement.

    Args:
        q: before.
        results: the moved value, or several.
        move: does to a scale or zero point what was done to the value.
        *how: name and arguments of the movement.
        of_value: does it to a tensor of the shape of the value; None where that isn't known.
    """

    def metadata(t: Tensor) -> Any:
        return None if t.numel() == 1 else move(t)

    scale, zero_point = metadata(q.scale), metadata(q.zero_point)
    one_scale, one_zero = _scalar(q.scale), _scalar(q.zero_point)
    if isinstance(results, Tensor):
        made = q.replace(
            value=results,
            scale=one_scale if scale is None else scale,
            zero_point=one_zero if zero_point is None else zero_point,
            source=moved_source(q, *how),
        )
        return made if of_value is None else q.moved_codes(made, of_value)
    several: Callable[..., Any] = type(results)

    def part(i: int, r: Tensor) -> Record:
        made = q.replace(
            value=r,
            scale=one_scale if scale is None else scale[i],
            zero_point=one_zero if zero_point is None else zero_point[i],
            source=moved_source(q, *how, i) if how else moved_source(q),
        )
        return made if of_value is None else q.moved_codes(made, lambda t: of_value(t)[i])

    return several(part(i, r) for i, r in enumerate(results))


def _scalar(t: Tensor) -> Tensor:
    return t.reshape(()) if t.numel() == 1 else t


def _axis_rule(*names: str) -> None:
    """Movements of whole axes: done to a scale with its axes of length 1 as they are."""
    for name in names:
        function = getattr(torch.Tensor, name, None) or getattr(torch, name)

        def apply(
            q: Record,
            *args: object,
            _name: str = name,
            _function: Callable[..., Any] = function,
            **kwargs: object,
        ) -> Any:
            def move(t: Tensor) -> Any:
                return _function(_full_rank(t, q.value.dim()), *args, **kwargs)

            def of_value(t: Tensor) -> Any:
                return _function(t, *args, **kwargs)

            how = (_name, args, list(kwargs.items()))
            return _moved(q, of_value(q.value), move, *how, of_value=of_value)

        rule(name)(apply)


_axis_rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "flip"
)


def _element_rule(*names: str) -> None:
    """Movements of elements: done to a scale that is spread over the shape of the value."""
    for name in names:
        function = getattr(torch.Tensor, name, None) or getattr(torch, name)

        def apply(
            q: Tensor | Record,
            *args: object,
            _name: str = name,
            _function: Callable[..., Any] = function,
            **kwargs: object,
        ) -> Any:
            if not isinstance(q, QuantTensor):
                return NotImplemented

            def move(t: Tensor) -> Any:
                spread = t.expand(q.value.shape)
                if _name == "take_along_dim":  # torch looks at the elements in one row by a view
                    spread = spread.contiguous()
                return _function(spread, *args, **kwargs)

            def of_value(t: Tensor) -> Any:
                return _function(t, *args, **kwargs)

            how = (_name, args, list(kwargs.items()))
            return _moved(q, of_value(q.value), move, *how, of_value=of_value)

        rule(name)(apply)


_element_rule(
    "unflatten",
    "expand",
    "expand_as",
    "repeat",
    "tile",
    "roll",
    "rot90",
    "chunk",
    "unsafe_chunk",
    "split",
    "tensor_split",
    "unbind",
    "narrow",
    "select",
    "index_select",
    "gather",
    "take_along_dim",
    "repeat_interleave",
    "diagonal",
    "t",
    "ravel",
    "pixel_shuffle",
    "pixel_unshuffle",
    "__getitem__",
)


def _rule_tensor_unfold(q: Record, dimension: int, size: int, step: int) -> Any:
    """Windows along an axis, overlapping or not."""

    def move(t: Tensor) -> Tensor:
        return t.expand(q.value.shape).unfold(dimension, size, step)

    result = q.value.unfold(dimension, size, step)
    return _moved(q, result, move, "unfold", dimension, size, step)


RULES[torch.Tensor.unfold] = METHODS["unfold"] = _rule_tensor_unfold


def _rule_unfold(
    q: Record,
    kernel_size: Numbers,
    dilation: Numbers = 1,
    padding: Numbers = 0,
    stride: Numbers = 1,
) -> Any:
    """Columns of image patches; zeros of the padding have to be on the grid, and one scale on all of it."""
    padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    if q.scale.numel() > 1 or q.zero_point.numel() > 1 or (padded and not q.has_zero):
        return NotImplemented
    unfold: Callable[..., Tensor] = F.unfold
    return q.replace(value=unfold(q.value, kernel_size, dilation, padding, stride))


RULES[F.unfold] = _rule_unfold


def _reshape(q: Record, result: Tensor) -> Any:
    before, after = q.value.shape, result.shape
    metadata = [_full_rank(t, len(before)) for t in (q.scale, q.zero_point) if t.numel() > 1]
    kept = 0  # leading axes that stay as they are needn't be spread over
    while (
        kept < min(len(before), len(after))
        and before[kept] == after[kept]
        and all(t.shape[kept] == 1 for t in metadata)
    ):
        kept += 1

    def move(t: Tensor) -> Tensor:
        spread = _full_rank(t, len(before)).expand((1,) * kept + tuple(before[kept:]))
        return spread.reshape((1,) * kept + tuple(after[kept:]))

    def of_value(t: Tensor) -> Tensor:
        return t.reshape(after)

    if not metadata:
        return _moved(q, result, move, of_value=of_value)
    how = ("reshape", kept, tuple(before[kept:]), tuple(after[kept:]))
    return _moved(q, result, move, *how, of_value=of_value)


@rule("reshape")
def _rule_reshape(q: Record, *shape: Any, **kwargs: Any) -> Any:
    return _reshape(q, q.value.reshape(*shape, **kwargs))


@rule("view")
def _rule_view(q: Record, *shape: Any, **kwargs: Any) -> Any:
    if isinstance(kwargs.get("dtype", shape[0] if shape else None), torch.dtype):
        return NotImplemented  # the same bits as other numbers are on no grid
    return _reshape(q, q.value.view(*shape, **kwargs))


@rule("view_as", "reshape_as")
def _rule_view_as(q: Tensor | Record, other: TensorLike) -> Any:
    return (
        _reshape(q, q.value.reshape(other.shape)) if isinstance(q, QuantTensor) else NotImplemented
    )


@rule("flatten")
def _rule_flatten(q: Record, *args: Any, **kwargs: Any) -> Any:
    return _reshape(q, torch.flatten(q.value, *args, **kwargs))


@rule("squeeze")
def _rule_squeeze(q: Record, dim: Dims = None) -> Any:
    result = q.value.squeeze() if dim is None else q.value.squeeze(dim)
    return _reshape(q, result)


for _name, _function in (("T", lambda x: x.T), ("mT", lambda x: x.mT)):
    _get = getattr(torch.Tensor, _name).__get__

    def _turned(q: Record, _f: Callable[[Tensor], Tensor] = _function, _name: str = _name) -> Any:
        return _moved(
            q, _f(q.value), lambda t: _f(_full_rank(t, q.value.dim())), _name, of_value=_f
        )

    def _property(q: Record, _get: Any = _get) -> Any:
        return dispatch(_get, (q,), {})

    RULES[_get] = _turned
    setattr(QuantTensor, _name, property(_property))


@rule("pad", method=False)
def _rule_pad(
    q: Record, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    """Padding with 0, or by repetition; another constant leaves the grid."""
    if mode == "constant" and ((value or 0.0) != 0.0 or not q.has_zero):
        return NotImplemented

    def move(t: Tensor) -> Tensor:
        t = _full_rank(t, q.value.dim())
        if all(n == 1 for n in t.shape[-(len(pad) // 2) :]):
            return t  # it doesn't vary along the axes that grow
        spread = t.expand(q.value.shape)
        return F.pad(spread, pad, mode, 1.0 if mode == "constant" else None)

    result = F.pad(q.value, pad, mode, value)
    if mode == "constant" and not q.symmetric and q.zero_point.numel() > 1:
        return NotImplemented  # 0 isn't the same integer everywhere
    return _moved(q, result, move, "pad", pad, mode)


@rule("cat", "concat", "concatenate", method=False)
def concatenate(tensors: Sequence[TensorLike], dim: int = 0, *, out: Tensor | None = None) -> Any:
    """Joined on one scale.

    Raises:
        RuntimeError: different scales, zero points, widths or signs, in evaluation mode.
    """
    if out is not None or not _all_ints(tensors):
        return NotImplemented
    first = tensors[0]
    if len(tensors) == 1:
        return first
    value = torch.cat([t.value for t in tensors], dim)
    return _joined("the concatenation", tensors, value, lambda ts: torch.cat(ts, dim))


@rule("stack", method=False)
def stack(tensors: Sequence[TensorLike], dim: int = 0, *, out: Tensor | None = None) -> Any:
    """Stacked on one scale. Raises as :func:`concatenate`."""
    if out is not None or not _all_ints(tensors):
        return NotImplemented
    value = torch.stack([t.value for t in tensors], dim)
    return _joined("the stack", tensors, value, lambda ts: torch.stack(ts, dim))


def _all_ints(tensors: Sequence[TensorLike]) -> TypeGuard[Sequence[IntQuantTensor]]:
    return all(has_field(t, "bit_width") for t in tensors)


def _joined(
    what: str,
    tensors: Sequence[IntQuantTensor],
    value: Tensor,
    join: Callable[[list[Tensor]], Tensor],
) -> IntQuantTensor:
    first, training = tensors[0], any(t.training for t in tensors)
    if len({t.signed for t in tensors}) > 1:
        raise RuntimeError(
            f"{what} of signed and unsigned quantized tensors; quantize them alike first"
        )
    same_grids = all(same_grid(first, t) for t in tensors[1:])
    same_scales = same_grids or all(same_source(first, t) for t in tensors[1:])
    symmetric = all(t.symmetric for t in tensors)
    same_zeros = symmetric or same_grids or not training
    if not same_grids:
        for t in tensors[1:]:
            require_same_scale(what, first, t)
            if not training:
                _require_equal(what, "bit widths", first.bit_width, t.bit_width)
                if not symmetric:
                    known = _require_equal(what, "zero points", first.zero_point, t.zero_point)
                    same_zeros = same_zeros and known
    average = training and not same_scales
    fields: dict[str, Any] = {}
    for name, same in (("scale", same_scales or not training), ("zero_point", same_zeros)):
        parts = [getattr(t, name) for t in tensors]
        if any(p.numel() > 1 for p in parts) or not (same or average):
            fields[name] = join(
                [p.expand(t.value.shape) for p, t in zip(parts, tensors, strict=True)]
            )
        elif average:
            fields[name] = torch.stack([_scalar(p) for p in parts]).mean()
        else:
            fields[name] = _scalar(parts[0])
    if not same_grids and any(t.bit_width is not first.bit_width for t in tensors):
        fields["bit_width"] = torch.stack([t.bit_width for t in tensors]).amax(0)
    source = first.source if same_grids else scale_only(first.source) if same_scales else None
    if fields["scale"].numel() > 1 or fields["zero_point"].numel() > 1:
        source = None
    return first.replace(
        value=value,
        training=training,
        source=source,
        symmetric=symmetric,
        has_zero=all(t.has_zero for t in tensors),
        **fields,
    )


def _require_equal(what: str, name: str, a: Tensor, b: Tensor) -> bool:
    """Refuse what is known to differ; False while tracing, when the result holds both, spread or wider."""
    if a is b:
        return True
    if not can_read(a, b):
        return False
    alike = a.shape == b.shape or a.numel() == 1 or b.numel() == 1
    if not (alike and torch.allclose(a, b)):
        raise RuntimeError(
            f"{what} of quantized tensors with different {name}: {a.tolist()} and {b.tolist()}"
        )
    return True
