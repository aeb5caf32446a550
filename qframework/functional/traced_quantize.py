"""Quantization in graphs of ``torch.compile`` on CPUs: operators of their own instead of what inductor makes of it.

Inductor takes several times as long for the gradients of scales, and quantizes a weight at each call. The operators call the
functions of eager mode, the C++ ones among them. Exported graphs hold torch's operators alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from qframework.configuration import settings
from qframework.functional.fixed_range import _FixedRange, range_gradients
from qframework.functional.weight import LargestScaled, _LargestScaled, largest_gradient

_LIBRARY = torch.library.Library("qframework", "FRAGMENT")
#: Activations are taken in the memory format that inductor has chosen for the layers around; weights in their own.
_ANY = (torch.Tag.flexible_layout,)
_OWN = (torch.Tag.needs_exact_strides,)
_RANGE = "float minimum, float maximum, str rounding"
_HOW = (
    f"{_RANGE}, str domain, str exponent_rounding, float? smallest, int[] shape, bool per_channel"
)


def _laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the layout of ``torch.empty_like(x)``, as graphs were told."""
    if y.stride() == x.stride():
        return y
    out = torch.empty_like(x)
    return y if y.stride() == out.stride() else out.copy_(y)


def takes_operators(x: Tensor) -> bool:
    """Whether a graph that is being traced gets operators for ``x``."""
    return (
        settings.kernels in ("auto", "compiled")
        and x.device.type == "cpu"
        and not torch.compiler.is_exporting()
    )


# ------------------------------------------------------------ a range that is known


_LIBRARY.define(
    f"fixed_range(Tensor x, Tensor scale, Tensor? zero_point, {_RANGE}, bool rectify) -> Tensor",
    tags=_ANY,
)


def _fixed_range(x: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any) -> Tensor:
    *bounds, rectify = how
    y = _FixedRange.forward(x, scale, zero_point, *bounds, True, rectify)  # type: ignore[call-arg]
    return _laid_out(y, x)


def _fake_fixed_range(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.define(
    f"fixed_range_gradients(Tensor g, Tensor x, Tensor scale, Tensor? zero_point, {_RANGE}, bool masked, bool rectify, "
    "bool need_scale, bool need_zero) -> (Tensor, Tensor, Tensor)",
    tags=_ANY,
)


def _fixed_range_gradients(
    g: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *range_and_form, need_scale, need_zero = how
    grad_x, *others = range_gradients(
        _laid_out(g, x),
        x,
        scale,
        zero_point,
        *range_and_form,
        need_scale=need_scale,
        need_zero=need_zero,
    )
    masked = range_and_form[3]
    grads = (_laid_out(grad_x, x), *others)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if grad is None or not wanted else grad
        for grad, wanted in zip(grads, (masked, need_scale, need_zero), strict=True)
    )


def _fake_fixed_range_gradients(
    g: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    masked, _, need_scale, need_zero = how[3:]
    return (
        torch.empty_like(x) if masked else x.new_empty(0),
        torch.empty_like(scale) if need_scale else x.new_empty(0),
        torch.empty_like(scale)
        if need_zero and masked and zero_point is not None
        else x.new_empty(0),
    )


class _TracedRange(Function):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        minimum, maximum, rounding, _, rectify = how
        out: Tensor = torch.ops.qframework.fixed_range(
            x, scale, zero_point, minimum, maximum, rounding, rectify
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero_point, ctx.how = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, zero_point = ctx.saved_tensors
        _, need_scale, need_zero, _ = ctx.needs_input_grad
        masked = ctx.how[3]
        if not (masked or need_scale):
            return grad, None, None, None
        grad_x, grad_scale, grad_zero = torch.ops.qframework.fixed_range_gradients(
            grad, x, scale, zero_point, *ctx.how, need_scale, need_zero
        )
        return (
            grad_x if masked else grad,
            grad_scale if need_scale else None,
            grad_zero if need_zero and masked else None,
            None,
        )


def traced_range(x: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any) -> Tensor:
    """``fake_quantize`` with bounds that are numbers; arguments as there."""
    return _TracedRange.apply(x, scale, zero_point, how)  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------ a weight and its largest magnitude

_Found = tuple[Tensor, Tensor, Tensor, Tensor]
_LIBRARY.define(
    f"largest(Tensor x, Tensor threshold, bool keep, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_OWN,
)


def _how(operands: tuple[Any, ...]) -> LargestScaled:
    fields: Any = operands[:6]
    return LargestScaled(*fields, tuple(operands[6]), None, operands[7])  # type: ignore[call-arg]


def _largest(x: Tensor, threshold: Tensor, keep: bool, *operands: Any) -> _Found:
    key = (
        _key(x, (*operands, threshold.item())) if keep else ()
    )  # on the CPU, so that it waits for nothing
    found = _recall(x, key) if keep else None
    if found is None:
        y, scale, (top, where) = _LargestScaled.forward(x, threshold, _how(operands))
        found = (
            _laid_out(y, x),
            scale,
            top,
            x.new_empty(0, dtype=torch.int64) if where is None else where,
        )
        if keep:
            _keep(x, key, found)
    if not keep:
        return found
    y, scale, *unread = found
    copies: Any = (y.clone(), scale.clone(), *unread)  # a graph may write into what it is given
    return copies  # type: ignore[no-any-return]


def _fake_largest(x: Tensor, threshold: Tensor, keep: bool, *operands: Any) -> _Found:
    how = _how(operands)
    count = how.scale_shape[0] if how.per_channel else 0
    scale = threshold.new_empty(how.scale_shape)
    top = threshold.new_empty((count,) if how.per_channel else ())
    return torch.empty_like(x), scale, top, x.new_empty(count, dtype=torch.int64)


_LIBRARY.define(
    "largest_gradient(Tensor g, Tensor? grad_scale, Tensor x, Tensor threshold, Tensor scale, Tensor top, Tensor where, "
    f"{_HOW}) -> Tensor",
    tags=_OWN,
)


def _largest_gradient(
    g: Tensor,
    grad_scale: Tensor | None,
    x: Tensor,
    threshold: Tensor,
    scale: Tensor,
    top: Tensor,
    where: Tensor,
    *operands: Any,
) -> Tensor:
    how = _how(operands)
    found = (scale, top, where if how.per_channel else None)
    return _laid_out(largest_gradient(_laid_out(g, x), grad_scale, x, threshold, *found, how), x)


def _fake_largest_gradient(g: Tensor, grad_scale: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


class _TracedLargest(Function):
    @staticmethod
    def forward(x: Tensor, threshold: Tensor, keep: bool, how: tuple[Any, ...]) -> _Found:
        found: _Found = torch.ops.qframework.largest(x, threshold, keep, *how)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, threshold, _, ctx.how = inputs
        _, scale, top, where = output
        ctx.mark_non_differentiable(top, where)
        ctx.save_for_backward(x, threshold, scale, top, where)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, grad_scale: Tensor, *_: Any) -> Any:  # type: ignore[override]
        operands = (grad, grad_scale, *ctx.saved_tensors, *ctx.how)
        return torch.ops.qframework.largest_gradient(*operands), None, None, None


def traced_largest(x: Tensor, threshold: Tensor, how: LargestScaled) -> tuple[Tensor, Tensor]:
    """``quantize_by_largest``; arguments as there, channels first."""
    operands = (*how[:6], how.scale_shape, how.per_channel)
    keep = not torch.is_grad_enabled()
    found = _TracedLargest.apply(x, threshold, keep, operands)  # type: ignore[no-untyped-call]
    return found[0], found[1]


# ------------------------------------------------------------ what is kept for graphs of evaluation

_kept: dict[tuple[Any, ...], tuple[StorageWeakRef, int, _Found]] = {}


def _key(x: Tensor, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    lists = (tuple(o) if isinstance(o, list) else o for o in operands)
    return x.data_ptr(), x.shape, x.stride(), x.dtype, *lists


def _recall(x: Tensor, key: tuple[Any, ...]) -> _Found | None:
    known = _kept.get(key)
    if known is None or not settings.cache or x.is_inference():
        return None
    storage, version, found = known
    return found if version == x._version and not storage.expired() else None


def _keep(x: Tensor, key: tuple[Any, ...], found: _Found) -> None:
    distributed = torch.distributed
    if not settings.cache or x.is_inference():
        return
    if distributed.is_available() and distributed.is_initialized():
        return  # broadcasts and sharded parameters write without moving a counter
    for dead in [k for k, (storage, *_) in _kept.items() if storage.expired()]:
        del _kept[dead]
    _kept[key] = (StorageWeakRef(x.untyped_storage()), x._version, found)


def forget(*weights: Tensor) -> None:
    """Free what is kept of some weights."""
    places = {t.data_ptr() for t in weights}
    for key in [k for k in _kept if k[0] in places]:
        del _kept[key]


for _name, _function, _fake in (
    ("fixed_range", _fixed_range, _fake_fixed_range),
    ("fixed_range_gradients", _fixed_range_gradients, _fake_fixed_range_gradients),
    ("largest", _largest, _fake_largest),
    ("largest_gradient", _largest_gradient, _fake_largest_gradient),
):
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"qframework::{_name}", _fake, lib=_LIBRARY)
