"""Values quantized by a learned scale, in one differentiable step.

scale = stored_scale(v) as in :mod:`qframework.functional.scale`, y = clamp(round(x / scale)) * scale
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional import native
from qframework.functional.autograd import apply, keep, kept
from qframework.functional.fixed_range import _FixedRange, can_rectify, range_gradients
from qframework.functional.origin import forget_origin, note
from qframework.functional.scale import _StoredScale, slope_of_stored


class LearnedScaled(NamedTuple):
    """How values are quantized by a learned scale.

    Attributes:
        minimum, maximum: smallest and largest integer.
        rounding: a name of :data:`~qframework.functional.ROUNDINGS`.
        masked: which clamp gradient, see :func:`~qframework.functional.fake_quantize`.
        domain, exponent_rounding, scale_minimum: of the scale, see :func:`~qframework.functional.stored_scale`.
    """

    minimum: float
    maximum: float
    rounding: str
    masked: bool
    domain: str
    exponent_rounding: str
    scale_minimum: float | None


class _LearnedScaled(Function):
    @staticmethod
    def forward(
        x: Tensor, stored: Tensor, threshold: Tensor, how: LearnedScaled, rectify: bool
    ) -> tuple[Tensor, Tensor]:
        if how.domain == "fp":
            layout = native.serves(x, stored.shape, how.rounding, stored, threshold)
            if layout is not None:
                settings = (threshold, how.scale_minimum, *how[:3], rectify)
                return native.quantize_by_stored(layout, x, stored, *settings)
        scale = _StoredScale.forward(stored, threshold, *how[4:])
        return _FixedRange.forward(x, scale, None, *how[:4], rectify), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, stored, threshold, ctx.how, ctx.rectify = inputs
        keep(ctx, x, stored, threshold)
        ctx.scale = output[1].detach()
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor | None, grad_scale: Tensor | None) -> Any:  # type: ignore[override]
        forget_origin(ctx)
        x, stored, threshold = kept(ctx)
        how, need = ctx.how, ctx.needs_input_grad
        grad_x = None
        if grad is not None:
            settings = (*how[:4], ctx.rectify)
            if how.domain == "fp" and need[1]:
                layout = native.serves(
                    x,
                    stored.shape,
                    how.rounding,
                    stored,
                    threshold,
                    g=grad,
                    incoming=(grad_scale,),
                )
                if layout is not None:
                    operands: Any = (None, *settings, stored, threshold, grad_scale)
                    found = native.gradients(layout, grad, x, ctx.scale, *operands)
                    return *found[:2], None, None, None
            grad_x, of_range, _ = range_gradients(
                grad, x, ctx.scale, None, *settings, need_scale=need[1], need_zero=False
            )
            if of_range is not None:
                grad_scale = of_range if grad_scale is None else grad_scale + of_range
        grad_stored = None
        if need[1] and grad_scale is not None:
            grad_stored = grad_scale / threshold * slope_of_stored(stored, threshold, *how[4:6])
        return grad_x, grad_stored, None, None, None


def quantize_by_stored(
    x: Tensor, stored: Tensor, threshold: Tensor, how: LearnedScaled, rectify: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize by a learned scale.

    Args:
        x: floating-point tensor.
        stored: the learned number in its domain; the scale broadcasts to ``x``.
        threshold: positive integer that the magnitude is divided by, 0-dim, without a gradient.
        how: range, rounding, gradient, domain.
        rectify: quantize ``relu(x)``.

    Returns:
        Dequantized values in the shape and dtype of ``x``, and the scale.
    """
    if rectify and not can_rectify(None, how.minimum, how.rounding, how.masked):
        x, rectify = torch.relu(x), False
    y, scale = apply(_LearnedScaled, x, stored, threshold, how, rectify)
    if not torch.compiler.is_compiling():
        note(y, x, scale, None, (*how[:4], rectify))
    return y, scale
