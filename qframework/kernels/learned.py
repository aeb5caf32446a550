"""Values quantized by a learned scale, in one differentiable step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    add_kernel,
    in_shape,
    quantize_by_learned_scale,
)
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, is_grad_enabled, may_fuse, may_overwrite
from qframework.kernels.integer import can_fuse_relu, quantize_gradients
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import quantize
from qframework.kernels.scales import learned_scale_gradient, learned_scale_values


def _values(x: Tensor, stored: Tensor, scheme: native.Scheme) -> tuple[Tensor, Tensor]:
    grid: Any = scheme.grid
    rule: Any = scheme.rule
    if rule.domain == "fp":
        layout = native.serves(x, stored.shape, grid.rounding, stored)
        if layout is not None:
            return native.quantize_by_learned_scale(layout, x, stored, scheme)
    scale = learned_scale_values(in_shape(stored, rule), rule)
    return quantize(x, scale, None, grid, scheme.relu), scale


class _QuantizeByLearnedScale(Fused):
    tensors = (0, 1)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, stored: Tensor, scheme: native.Scheme
    ) -> tuple[Tensor, Tensor]:
        y, scale = _values(x, stored, scheme)
        ctx.save_for_backward(x, stored, scale)
        ctx.how = scheme
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def define(ctx: Context, x: Tensor, stored: Tensor) -> Any:  # type: ignore[override]
        scheme: native.Scheme = ctx.how
        how: Any = (scheme.grid, scheme.rule, scheme.relu)
        return quantize_by_learned_scale.definition(x, stored, *how)

    @staticmethod
    def gradients(ctx: Context, grad: Tensor | None, grad_scale: Tensor | None) -> Any:  # type: ignore[override]
        x, stored, scale = ctx.saved_tensors
        scheme, need_stored = ctx.how, ctx.needs_input_grad[1]
        grid, rule = scheme.grid, scheme.rule
        grad_x = None
        if grad is not None:
            overwrite = may_overwrite(grad, x)
            grad = native.laid_out_as(grad, x)
            if rule.domain == "fp" and need_stored:
                incoming = (grad_scale,)
                layout = native.serves(
                    x, stored.shape, grid.rounding, stored, g=grad, incoming=incoming
                )
                if layout is not None:
                    more = (stored, grad_scale, overwrite)
                    found = native.gradients(layout, grad, x, scale, None, scheme, *more)
                    return *found[:2], None
            grad_x, of_values, _ = quantize_gradients(
                grad, x, scale, None, grid, scheme.relu, need_scale=need_stored, need_zero=False
            )
            if of_values is not None:
                grad_scale = of_values if grad_scale is None else grad_scale + of_values
        grad_stored = None
        if need_stored and grad_scale is not None:
            grad_stored = learned_scale_gradient(grad_scale, in_shape(stored, rule), rule)
            grad_stored = grad_stored.reshape(stored.shape)
        return grad_x, grad_stored, None


def by_learned_scale(
    grid: IntegerGrid, rule: ScaleRule, relu: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """:func:`~qframework.functional.quantize_by_learned_scale` for many values and numbers, where fused functions may run."""
    fuses = relu and can_fuse_relu(None, grid)
    scheme = native.Scheme(grid, rule, fuses)

    def run(x: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        if relu and not fuses:
            x = torch.relu(x)
        if not is_grad_enabled():
            return _values(x, stored, scheme)
        y, scale = _QuantizeByLearnedScale.call(x, stored, scheme)
        return note_origin(y, x, scale, None, scheme), scale

    return run


@add_kernel(quantize_by_learned_scale, "fused", may_fuse)
def _fused(x: Tensor, stored: Tensor, grid: IntegerGrid, rule: ScaleRule, relu: bool) -> Any:
    return by_learned_scale(grid, rule, relu)(x, stored)
