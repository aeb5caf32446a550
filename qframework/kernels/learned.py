"""Values quantized by a learned scale, in one differentiable step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    add_kernel,
    quantize_by_learned_scale,
)
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, apply, may_fuse
from qframework.kernels.integer import can_fuse_relu, quantize_gradients
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import quantize
from qframework.kernels.scales import learned_scale_gradient, learned_scale_values


def _values(
    x: Tensor, stored: Tensor, grid: IntegerGrid, rule: ScaleRule, relu: bool
) -> tuple[Tensor, Tensor]:
    if rule.domain == "fp":
        layout = native.serves(x, stored.shape, grid.rounding, stored)
        if layout is not None:
            return native.quantize_by_learned_scale(layout, x, stored, grid, rule, relu)
    scale = learned_scale_values(stored, rule)
    return quantize(x, scale, None, grid, relu), scale


class _QuantizeByLearnedScale(Fused):
    tensors = (0, 1)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, stored: Tensor, grid: IntegerGrid, rule: ScaleRule, relu: bool
    ) -> tuple[Tensor, Tensor]:
        y, scale = _values(x, stored, grid, rule, relu)
        ctx.save_for_backward(x, stored, scale)
        ctx.how = (grid, rule, relu)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def define(ctx: Context, x: Tensor, stored: Tensor) -> Any:  # type: ignore[override]
        return quantize_by_learned_scale.definition(x, stored, *ctx.how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor | None, grad_scale: Tensor | None) -> Any:  # type: ignore[override]
        x, stored, scale = ctx.saved_tensors
        grid, rule, relu = ctx.how
        need_stored = ctx.needs_input_grad[1]
        grad_x = None
        if grad is not None:
            grad = native.laid_out_as(grad, x)
            if rule.domain == "fp" and need_stored:
                incoming = (grad_scale,)
                layout = native.serves(
                    x, stored.shape, grid.rounding, stored, g=grad, incoming=incoming
                )
                if layout is not None:
                    more = (stored, rule.threshold, grad_scale)
                    found = native.gradients(layout, grad, x, scale, None, grid, relu, *more)
                    return *found[:2], None, None, None
            needed = {"need_scale": need_stored, "need_zero": False}
            grad_x, of_values, _ = quantize_gradients(grad, x, scale, None, grid, relu, **needed)
            if of_values is not None:
                grad_scale = of_values if grad_scale is None else grad_scale + of_values
        grad_stored = None
        if need_stored and grad_scale is not None:
            grad_stored = learned_scale_gradient(grad_scale, stored, rule)
        return grad_x, grad_stored, None, None, None


@add_kernel(quantize_by_learned_scale, "fused", may_fuse)
def _fused(x: Tensor, stored: Tensor, grid: IntegerGrid, rule: ScaleRule, relu: bool) -> Any:
    if relu and not can_fuse_relu(None, grid):
        x, relu = torch.relu(x), False
    if not torch.is_grad_enabled():
        return _values(x, stored, grid, rule, relu)
    y, scale = apply(_QuantizeByLearnedScale, x, stored, grid, rule, relu)
    return note_origin(y, x, scale, None, grid, relu), scale
