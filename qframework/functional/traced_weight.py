"""Weights and their largest magnitudes in graphs of ``torch.compile``.

In training a weight is quantized by torch's functions, in a form that inductor makes few passes over memory of. In evaluation
on CPUs there is an operator that keeps the quantized weight between calls of a graph. Exported graphs hold torch's operators
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from qframework.configuration import settings
from qframework.functional.fixed_range import _FixedRange, sum_to
from qframework.functional.scale import _StatisticScale
from qframework.functional.straight_through import ROUNDINGS
from qframework.functional.traced_range import own_buffer
from qframework.functional.traced_statistics import places_in
from qframework.functional.weight import LargestScaled, _LargestScaled, slope_of

_LIBRARY = torch.library.Library("qframework", "FRAGMENT")


def traced_largest(
    x: Tensor, threshold: Tensor, how: LargestScaled
) -> tuple[Tensor, Tensor] | None:
    """``quantize_by_largest`` in a graph that is being traced, channels first; None where nothing here takes it."""
    if settings.kernels == "reference" or torch.compiler.is_exporting():
        return None
    if torch.is_grad_enabled():
        found = _TracedLargest.apply(x, threshold, how)  # type: ignore[no-untyped-call]
        return found[0], found[1]
    if settings.kernels == "fused" or x.device.type != "cpu":
        return None
    operands = (*how[:6], how.scale_shape, how.per_channel)
    y, scale = torch.ops.qframework.kept_largest(x, threshold, *operands)
    return y, scale


# ------------------------------------------------------------ in training


class _TracedLargest(Function):
    """Sums by channel first, as :func:`~qframework.functional.fixed_range.sum_to` does in graphs."""

    @staticmethod
    def forward(x: Tensor, threshold: Tensor, how: LargestScaled) -> tuple[Tensor, Tensor, Tensor]:
        magnitudes = x.abs()
        top = magnitudes.amax(_inner(x), keepdim=True) if how.per_channel else magnitudes.amax()
        settings = (how.domain, how.exponent_rounding, how.scale_minimum)
        scale = _StatisticScale.forward(top.to(threshold.dtype), threshold, *settings)
        scale = own_buffer(scale.reshape(how.scale_shape))
        fixed = (how.minimum, how.maximum, how.rounding, False, False)
        return _FixedRange.forward(x, scale, None, *fixed), scale, top

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, threshold, ctx.how = inputs
        _, scale, top = output
        ctx.mark_non_differentiable(top)
        ctx.save_for_backward(x, threshold, scale, top)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, grad_scale: Tensor, _: Any) -> Any:  # type: ignore[override]
        x, threshold, scale, top = ctx.saved_tensors
        how = ctx.how
        exact = x.to(scale.dtype) / scale
        error = ROUNDINGS[how.rounding](exact).clamp(how.minimum, how.maximum) - exact
        hit = x.abs() == top
        slope = slope_of(top.to(scale.dtype), threshold, how)
        share = (sum_to(error * grad, scale) + grad_scale).reshape(top.shape) * slope
        if how.per_channel:
            places = places_in(x.shape[1:], x.device)
            first = torch.where(hit, places, x[0].numel()).amin(_inner(x), keepdim=True)
            hit = places == first
        else:
            share = share / sum_to(hit.to(scale.dtype), top)
        moved = torch.where(top > 0, share, 0.0).to(x.dtype) * x.sign()
        return torch.where(hit, grad + moved, grad), None, None


def _inner(x: Tensor) -> list[int]:
    return list(range(1, x.dim()))


# ------------------------------------------------------------ in evaluation: kept between calls of a graph

_kept: dict[tuple[Any, ...], tuple[StorageWeakRef, int, tuple[Tensor, Tensor]]] = {}


def _kept_largest(x: Tensor, threshold: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    lists = (tuple(o) if isinstance(o, list) else o for o in operands)
    # The threshold is read on the CPU, so that it waits for nothing.
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype, *lists, threshold.item())
    found = _recall(x, key)
    if found is None:
        found = _LargestScaled.forward(x, threshold, _how(operands))[:2]
        _keep(x, key, found)
    return found[0].clone(), found[1].clone()  # a graph may write into what it is given


def _fake_kept_largest(x: Tensor, threshold: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), threshold.new_empty(_how(operands).scale_shape)


def _how(operands: tuple[Any, ...]) -> LargestScaled:
    fields: Any = operands[:6]
    return LargestScaled(*fields, tuple(operands[6]), None, operands[7])  # type: ignore[call-arg]


def _recall(x: Tensor, key: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    known = _kept.get(key)
    if known is None or not settings.cache or x.is_inference():
        return None
    storage, version, found = known
    return found if version == x._version and not storage.expired() else None


def _keep(x: Tensor, key: tuple[Any, ...], found: tuple[Tensor, Tensor]) -> None:
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


_LIBRARY.define(
    "kept_largest(Tensor x, Tensor threshold, float minimum, float maximum, str rounding, str domain, "
    "str exponent_rounding, float? smallest, int[] shape, bool per_channel) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),  # its own, since that is the tensor that stays
)
_LIBRARY.impl("kept_largest", _kept_largest, "CPU")
torch.library.register_fake("qframework::kept_largest", _fake_kept_largest, lib=_LIBRARY)
