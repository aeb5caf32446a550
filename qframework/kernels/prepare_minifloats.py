"""The fast forms of quantizers to minifloats."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from qframework.core.base import NotStated
from qframework.core.float_quant import FloatQuant
from qframework.functional import (
    Granularity,
    MinifloatGrid,
    ScaleRule,
    minifloat_quantize,
    quantize_by_absmax,
)
from qframework.kernels.absmax import by_absmax
from qframework.kernels.autograd import is_compiling
from qframework.kernels.plan import Form, Plan, Reader, known_rounding
from qframework.kernels.trust import is_plain


def plan_minifloats(plan: Plan, reader: Reader, grid: MinifloatGrid) -> None:
    """Find the form of a plan.

    Args:
        plan: of a :class:`~qframework.core.float_quant.FloatQuant`.
        reader: reads the rules of its parts.
        grid: its numbers.
    """
    quantizer: Any = plan.quantizer
    known_rounding(grid.rounding)
    plan.name, plan.form, plan.format = "minifloat_quantize", _by_scale(quantizer, grid), grid
    if quantizer.scaling_impl is None:
        return
    try:
        view: Granularity | None = reader.stated(quantizer.input_view_impl)
        rule: ScaleRule = reader.stated(quantizer.scaling_impl, grid.format.largest)
        if not isinstance(rule, ScaleRule) or rule.source != "absmax":
            return
        known_rounding(rule.rounding)
        if rule.groups != (None if view is None else view.groups):
            return
    except NotStated:  # the scale is computed by its parts
        return
    plan.name, plan.form = "quantize_by_absmax", _minifloats_by_absmax(quantizer, grid, rule)


def _by_scale(quantizer: FloatQuant, grid: MinifloatGrid) -> Form:
    def run(x: Tensor) -> Any:
        scale = quantizer.scale_for(x)
        used = None if quantizer.scaling_impl is None else scale
        viewed = quantizer.input_view_impl(x)
        if is_plain(scale):
            y = minifloat_quantize(viewed, used, *grid)
        else:
            y = quantizer.quantize(viewed, used)
        return quantizer.described(y, scale)

    return run


def _minifloats_by_absmax(quantizer: FloatQuant, grid: MinifloatGrid, rule: ScaleRule) -> Form:
    quantize, by_scale = by_absmax(grid, rule), _by_scale(quantizer, grid)
    if is_compiling():
        quantize = partial(quantize_by_absmax, grid=grid, rule=rule)

    def run(x: Tensor) -> Any:
        if x.numel() == 0 or x.dim() == 0:
            return by_scale(x)
        return quantizer.described(*quantize(quantizer.input_view_impl(x)))

    return run
