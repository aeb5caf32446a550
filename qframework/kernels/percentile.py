"""Values quantized by a percentile of their magnitudes, in one differentiable step, as a collection goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    add_kernel,
    all_finite,
    compute_dtype,
    over,
    quantize_by_percentile,
)
from qframework.kernels import native
from qframework.kernels.autograd import Context, Fused, apply, may_fuse
from qframework.kernels.integer import can_fuse_relu, quantize_gradients
from qframework.kernels.recomputation import note_origin
from qframework.kernels.rounding import quantize
from qframework.kernels.statistics import can_search_blocks, from_end, search_blocks


class _QuantizeByPercentile(Fused):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Context, x: Tensor, rank: int, grid: IntegerGrid, rule: ScaleRule, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Ranks are the same before and after a ReLU.
        near, largest = from_end(rank, x.numel())
        found, where, end = search_blocks(x, near, largest, not relu)
        finite = torch.isfinite(end) if largest else all_finite(torch.relu(x) if relu else x)
        found = found.to(compute_dtype(x.dtype))
        magnitude = torch.relu(found).clamp_min(rule.minimum or 0.0).reshape(rule.shape)
        scale = over(magnitude, rule.threshold)
        ctx.save_for_backward(x, scale, where)
        ctx.how = (rank, grid, rule, relu)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(magnitude, finite)
        return quantize(x, scale, None, grid, relu), scale, magnitude, finite

    @staticmethod
    def define(ctx: Context, x: Tensor) -> Any:  # type: ignore[override]
        return quantize_by_percentile.definition(x, *ctx.how)

    @staticmethod
    def gradients(
        ctx: Context, grad: Tensor | None, grad_scale: Tensor | None, *others: Any
    ) -> Any:  # type: ignore[override]
        x, scale, where = ctx.saved_tensors
        _, grid, rule, relu = ctx.how
        g = torch.zeros_like(x) if grad is None else grad
        needed = {"need_scale": True, "need_zero": False}
        grad_x, whole, _ = quantize_gradients(g, x, scale, None, grid, relu, **needed)
        assert whole is not None
        whole = whole if grad_scale is None else whole + grad_scale
        element = x.reshape(-1).gather(0, where)
        slope = (element > 0).to(whole.dtype) if relu else element.sign().to(whole.dtype)
        share = (over(whole.reshape(1), rule.threshold) * slope).to(g.dtype)
        grad_x = grad_x.clone() if grad_x is grad else grad_x
        grad_x.index_put_(torch.unravel_index(where, x.shape), share, accumulate=True)
        return grad_x, None, None, None, None


def _serves(x: Tensor, rank: int, grid: IntegerGrid, rule: ScaleRule, relu: bool) -> bool:
    n = x.numel()
    if relu and not can_fuse_relu(None, grid):
        return False
    return may_fuse() and can_search_blocks(n, from_end(rank, n)[0])


@add_kernel(quantize_by_percentile, "fused", _serves)
def _fused(x: Tensor, rank: int, grid: IntegerGrid, rule: ScaleRule, relu: bool) -> Any:
    y, *rest = apply(_QuantizeByPercentile, x, rank, grid, rule, relu)
    return note_origin(y, x, rest[0], None, native.Scheme(grid, relu=relu)), *rest
