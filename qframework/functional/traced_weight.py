"""Weights and their largest magnitudes in graphs of ``torch.compile``.

In training a weight is quantized by torch's functions, in a form that inductor makes few passes over memory of. In evaluation
on CPUs there is an operator that keeps the quantized weight between calls of a graph. Exported graphs hold torch's operators
alone.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from qframework.configuration import settings
from qframework.functional.autograd import distributed_active
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
    y, scale = torch.ops.qframework.kept_largest(x, threshold, str(tuple(how)))
    return y.contiguous() if x.is_contiguous() else y, scale


# ------------------------------------------------------------ in training


class _TracedLargest(Function):
    """Sums by channel first, as :func:`~qframework.functional.fixed_range.sum_to` does in graphs."""

    @staticmethod
    def forward(x: Tensor, threshold: Tensor, how: LargestScaled) -> tuple[Tensor, Tensor, Tensor]:
        magnitudes = x.abs()
        top = magnitudes.amax(_inner(x), keepdim=True) if how.per_channel else magnitudes.amax()
        domain = (how.domain, how.exponent_rounding, how.scale_minimum)
        scale = _StatisticScale.forward(top.to(threshold.dtype), threshold, *domain)
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


class _Kept(NamedTuple):
    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    values: Tensor
    scale: Tensor


#: By address, how it is quantized, and threshold.
_kept: dict[tuple[int, str, float], _Kept] = {}


def _kept_largest(x: Tensor, threshold: Tensor, how: str) -> tuple[Tensor, Tensor]:
    # In one frame: see Memory.recall. The threshold is read on the CPU, so that it waits for nothing.
    key = (x.data_ptr(), how, threshold.item())
    known = _kept.get(key)
    if (
        known is None
        or not settings.cache
        or x.is_inference()
        or known.version != x._version
        or known.shape != x.shape
        or known.strides != x.stride()
        or known.dtype is not x.dtype
        or known.storage.expired()
    ):
        y, scale, _ = _LargestScaled.forward(x, threshold, _decoded(how))
        y = torch.empty_like(y, memory_format=_layout(x)).copy_(y)
        _keep(x, key, y, scale)
    else:
        y, scale = known.values, known.scale
    return y.clone(), scale.clone()  # a graph may write into what it is given


def _fake_kept_largest(x: Tensor, threshold: Tensor, how: str) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=_layout(x))
    return y, threshold.new_empty(_decoded(how).scale_shape)


def _layout(x: Tensor) -> torch.memory_format:
    """How a quantized weight is kept: as inductor wants it for a convolution on CPUs, so that it isn't laid out anew each time."""
    wanted = torch.channels_last
    other = x.dim() == 4 and x.is_contiguous() and not x.is_contiguous(memory_format=wanted)
    return wanted if other else torch.preserve_format


@cache
def _decoded(how: str) -> LargestScaled:
    return LargestScaled(*ast.literal_eval(how))


def _keep(x: Tensor, key: tuple[int, str, float], values: Tensor, scale: Tensor) -> None:
    if not settings.cache or x.is_inference() or distributed_active():
        return
    for dead in [k for k, known in _kept.items() if known.storage.expired()]:
        del _kept[dead]
    storage = StorageWeakRef(x.untyped_storage())
    _kept[key] = _Kept(storage, x._version, x.dtype, x.shape, x.stride(), values, scale)


def forget(*weights: Tensor) -> None:
    """Free what is kept of some weights."""
    places = {t.data_ptr() for t in weights}
    for key in [k for k in _kept if k[0] in places]:
        del _kept[key]


_LIBRARY.define(
    "kept_largest(Tensor x, Tensor threshold, str how) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),  # its own, since that is the tensor that stays
)
_LIBRARY.impl("kept_largest", _kept_largest, "CPU")
torch.library.register_fake("qframework::kept_largest", _fake_kept_largest, lib=_LIBRARY)
