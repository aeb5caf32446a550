"""Functions that only move elements: scales and zero points move with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.quant_tensor.base import QuantTensor
from qframework.quant_tensor.registry import RULES, rule
from qframework.quant_tensor.source import can_read, require_same_scale, same_source


def _full_rank(t: Tensor, ndim: int) -> Tensor:
    return t.reshape((1,) * (ndim - t.dim()) + tuple(t.shape))


def _moved(q: Any, results: Any, move: Callable[[Tensor], Any]) -> Any:
    """Wrap the result of a movement; ``move`` does to a scale or zero point what was done to the value."""

    def metadata(t: Tensor) -> Any:
        return None if t.numel() == 1 else move(t)

    scale, zero_point = metadata(q.scale), metadata(q.zero_point)
    one_scale, one_zero = _scalar(q.scale), _scalar(q.zero_point)
    # Scales that have moved are no longer those that the quantizer gives.
    source = q.source if scale is None and zero_point is None else None
    if isinstance(results, Tensor):
        return q.set(
            value=results,
            scale=one_scale if scale is None else scale,
            zero_point=one_zero if zero_point is None else zero_point,
            source=source,
        )
    return type(results)(
        q.set(
            value=r,
            scale=one_scale if scale is None else scale[i],
            zero_point=one_zero if zero_point is None else zero_point[i],
            source=source,
        )
        for i, r in enumerate(results)
    )


def _scalar(t: Tensor) -> Tensor:
    return t.reshape(()) if t.numel() == 1 else t


def _axis_rule(*names: str) -> None:
    """Movements of whole axes: done to a scale with its axes of length 1 as they are."""
    for name in names:
        function = getattr(torch.Tensor, name, None) or getattr(torch, name)

        def apply(q: Any, *args: Any, _function: Any = function, **kwargs: Any) -> Any:
            def move(t: Tensor) -> Any:
                return _function(_full_rank(t, q.value.dim()), *args, **kwargs)

            return _moved(q, _function(q.value, *args, **kwargs), move)

        rule(name)(apply)


_axis_rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "flip"
)


def _element_rule(*names: str) -> None:
    """Movements of elements: done to a scale that is spread over the shape of the value."""
    for name in names:
        function = getattr(torch.Tensor, name, None) or getattr(torch, name)

        def apply(q: Any, *args: Any, _function: Any = function, **kwargs: Any) -> Any:
            if not isinstance(q, QuantTensor):
                return NotImplemented

            def move(t: Tensor) -> Any:
                return _function(t.expand(q.value.shape), *args, **kwargs)

            return _moved(q, _function(q.value, *args, **kwargs), move)

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


def _reshape(q: Any, result: Tensor) -> Any:
    def move(t: Tensor) -> Tensor:
        before, after = q.value.shape, result.shape
        kept = 0  # leading axes that stay as they are needn't be spread over
        t = _full_rank(t, len(before))
        while (
            kept < min(len(before), len(after))
            and before[kept] == after[kept]
            and t.shape[kept] == 1
        ):
            kept += 1
        spread = t.expand((1,) * kept + tuple(before[kept:]))
        return spread.reshape((1,) * kept + tuple(after[kept:]))

    return _moved(q, result, move)


@rule("reshape")
def _rule_reshape(q: Any, *shape: Any, **kwargs: Any) -> Any:
    return _reshape(q, q.value.reshape(*shape, **kwargs))


@rule("view")
def _rule_view(q: Any, *shape: Any) -> Any:
    if shape and isinstance(shape[0], torch.dtype):
        return NotImplemented
    return _reshape(q, q.value.view(*shape))


@rule("view_as", "reshape_as")
def _rule_view_as(q: Any, other: Any) -> Any:
    return (
        _reshape(q, q.value.reshape(other.shape)) if isinstance(q, QuantTensor) else NotImplemented
    )


@rule("flatten")
def _rule_flatten(q: Any, *args: Any, **kwargs: Any) -> Any:
    return _reshape(q, torch.flatten(q.value, *args, **kwargs))


@rule("squeeze")
def _rule_squeeze(q: Any, dim: Any = None) -> Any:
    result = q.value.squeeze() if dim is None else q.value.squeeze(dim)
    return _reshape(q, result)


for _name, _function in (("T", lambda x: x.T), ("mT", lambda x: x.mT)):

    def _property(q: Any, _f: Any = _function) -> Any:
        return _moved(q, _f(q.value), lambda t: _f(_full_rank(t, q.value.dim())))

    RULES[getattr(torch.Tensor, _name).__get__] = _property
    setattr(QuantTensor, _name, property(_property))


@rule("pad", method=False)
def _rule_pad(q: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
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
    return _moved(q, result, move)


@rule("cat", "concat", "concatenate", method=False)
def concatenate(tensors: Any, dim: int = 0, *, out: Any = None) -> Any:
    """Joined on one scale.

    Raises:
        RuntimeError: different scales, zero points, widths or signs, in evaluation mode.
    """
    if out is not None or not all(hasattr(t, "bit_width") for t in tensors):
        return NotImplemented
    first = tensors[0]
    if len(tensors) == 1:
        return first
    value = torch.cat([t.value for t in tensors], dim)
    return _joined("the concatenation", tensors, value, lambda ts: torch.cat(ts, dim))


@rule("stack", method=False)
def stack(tensors: Any, dim: int = 0, *, out: Any = None) -> Any:
    """Stacked on one scale. Raises as :func:`concatenate`."""
    if out is not None or not all(hasattr(t, "bit_width") for t in tensors):
        return NotImplemented
    value = torch.stack([t.value for t in tensors], dim)
    return _joined("the stack", tensors, value, lambda ts: torch.stack(ts, dim))


def _joined(what: str, tensors: Any, value: Tensor, join: Callable[[Any], Tensor]) -> Any:
    first, training = tensors[0], any(t.training for t in tensors)
    if len({t.signed for t in tensors}) > 1:
        raise RuntimeError(
            f"{what} of signed and unsigned quantized tensors; quantize them alike first"
        )
    same = all(same_source(first, t) for t in tensors[1:])
    if not same:
        for t in tensors[1:]:
            require_same_scale(what, first, t)
            if not training:
                _require_equal(what, "bit widths", first.bit_width, t.bit_width)
                if not (first.symmetric and t.symmetric):
                    _require_equal(what, "zero points", first.zero_point, t.zero_point)
    fields: dict[str, Any] = {}
    per_channel = False
    for name in ("scale", "zero_point"):
        parts = [getattr(t, name) for t in tensors]
        if any(p.numel() > 1 for p in parts):
            per_channel = True
            fields[name] = join(
                [p.expand(t.value.shape) for p, t in zip(parts, tensors, strict=True)]
            )
        elif training and not same:
            fields[name] = torch.stack([_scalar(p) for p in parts]).mean()
        else:
            fields[name] = _scalar(parts[0])
    if training and not same:
        fields["bit_width"] = torch.stack([t.bit_width for t in tensors]).mean()
    return first.set(
        value=value,
        training=training,
        source=first.source if same and not per_channel else None,
        symmetric=all(t.symmetric for t in tensors),
        has_zero=all(t.has_zero for t in tensors),
        **fields,
    )


def _require_equal(what: str, name: str, a: Tensor, b: Tensor) -> None:
    if a is b:
        return
    if not can_read(a, b):
        raise RuntimeError(
            f"{what} of quantized tensors from different quantizers: their {name} can't be known to be equal while "
            "tracing; let them share one quantizer"
        )
    if not torch.allclose(a, b):
        raise RuntimeError(
            f"{what} of quantized tensors with different {name}: {a.tolist()} and {b.tolist()}"
        )
