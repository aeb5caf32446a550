"""Quantization by a known range in graphs of ``torch.compile``, in a form that inductor makes few passes over memory of.

It quantizes in the pass that computes the values, and masks and sums gradients in the passes of the layer before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.fixed_range import _FixedRange, range_gradients


def own_buffer(t: Tensor, again: bool = False) -> Tensor:
    """``t`` in memory of its own, computed once.

    Inductor would compute a small tensor again for each element of the large one that it is used with, but not what a view
    of any strides is taken of.

    Args:
        t: small tensor.
        again: make a node that isn't taken for that of another call, so that what is computed with it in the backward pass
            is not what was computed in the forward pass, which would then be kept.
    """
    if again:
        return t.unsqueeze(0).as_strided(t.shape, t.stride())
    return t.as_strided(t.shape, t.stride())


class _TracedRange(Function):
    """Nothing else of the size of the values is kept than they: backwards all starts from them and the scale."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        *fixed, rectify = how
        x = torch.relu(x) if rectify else x
        return _FixedRange.forward(x, own_buffer(scale), zero_point, *fixed, False)  # type: ignore[call-arg]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero_point, ctx.how = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, zero_point = ctx.saved_tensors
        _, need_scale, need_zero, _ = ctx.needs_input_grad
        x = torch.relu(x) if ctx.how[-1] else x  # as forwards, and so the same tensor
        needed = {"need_scale": need_scale, "need_zero": need_zero}
        return *range_gradients(
            grad, x, own_buffer(scale, True), zero_point, *ctx.how, **needed
        ), None


def traced_range(x: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any) -> Tensor:
    """``fake_quantize`` with bounds that are numbers; arguments as there."""
    return _TracedRange.apply(x, scale, zero_point, how)  # type: ignore[no-any-return, no-untyped-call]
