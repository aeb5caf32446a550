"""Quantizers whose scale doesn't depend on what they quantize: it is computed once, for many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.float_quant import FloatQuant
from qframework.functional import IntegerGrid, Range, fake_quantize, minifloat_quantize
from qframework.kernels.autograd import is_compiling, is_grad_enabled, may_fuse
from qframework.kernels.native.static import StaticQuantizer
from qframework.kernels.plan import Plan
from qframework.kernels.prepare import may_collect
from qframework.kernels.trust import distrust, is_plain, modes_active

#: From values, and whether they are to go through a ReLU, to quantized values.
Step = Callable[[Tensor, bool], Tensor]


class Static:
    """A quantizer with a scale that is known, behind its activation function.

    Attributes:
        step: quantizes values.
        rest: what the quantizer returns beside the values: scale, zero point, bit width, ...
        grid: the integers; None where there are none.
        symmetric: whether there is no zero point.
    """

    def __init__(
        self,
        plan: Plan,
        step: Step,
        rest: tuple[Any, ...],
        grid: IntegerGrid | None = None,
        symmetric: bool = False,
    ) -> None:
        self.activation: nn.Module | None = plan.activation
        self.fuses_relu = plan.fuses_relu
        self.step, self.rest, self.grid, self.symmetric = step, rest, grid, symmetric

    def __call__(self, x: Tensor) -> tuple[Any, ...]:
        """What the quantizer returns for what the activation function makes of ``x``."""
        if self.activation is not None and not self.fuses_relu:
            x = self.activation(x)
        return self.step(x, self.fuses_relu), *self.rest

    def tensors(self) -> tuple[Any, ...]:
        """What was computed."""
        return self.rest

    @property
    def range(self) -> Range | None:
        """Scale and integers, where there is one scale, and no zero point; else None, and where they are clipped first."""
        scale: Tensor = self.rest[0]
        if self.grid is None or self.grid.clips_first or not self.symmetric or scale.numel() != 1:
            return None
        return Range(scale if scale.dim() == 0 else scale.reshape(()), self.grid)


def static(plan: Plan, like: Tensor) -> Static | None:
    """The quantizer of a plan with its present scale; None where each call has to compute it.

    Args:
        plan: of the quantizer.
        like: a tensor on the device of the values.
    """
    quantizer: Any = plan.quantizer
    if plan.form is None or _depends_on_input(quantizer):
        return None
    if isinstance(quantizer, FloatQuant):
        scale = quantizer.scale_for(like)
        if not is_plain(scale):
            return None
        rest = quantizer.described(like, scale)[1:]
        return Static(plan, _minifloats(plan, quantizer, scale), rest)
    if plan.grid is None:
        return None
    scale, zero_point, bit_width = quantizer.parameters_for(like)
    if not is_plain(scale, zero_point):
        return None
    shift = None if plan.symmetric else zero_point
    step = _integers(scale, shift, plan.grid)
    return Static(plan, step, (scale, zero_point, bit_width), plan.grid, plan.symmetric)


def _depends_on_input(quantizer: Any) -> bool:
    for part in (quantizer.scaling_impl, getattr(quantizer, "zero_point_impl", None)):
        if part is None:
            continue
        if hasattr(part, "is_collecting"):
            depends = may_collect(part)
        else:
            depends = getattr(part, "depends_on_input", True)
        # One that is derived from a part that doesn't look at the input, or has a hook, may do so.
        if depends or all(distrust(part, method) for method in _VOUCHING):
            return True
    return False


#: What is stated along with what a part looks at.
_VOUCHING = ("rule", "statistic_rule", "depends_on_input")


def _integers(scale: Tensor, zero_point: Tensor | None, grid: IntegerGrid) -> Step:
    known: StaticQuantizer | None = None

    def step(x: Tensor, relu: bool) -> Tensor:
        nonlocal known
        if is_compiling():
            return fake_quantize(x, scale, zero_point, grid, relu)
        if modes_active() or not is_plain(x):
            return fake_quantize.definition(x, scale, zero_point, grid, relu)
        if may_fuse() and not is_grad_enabled():
            quick = known  # once, as other threads may call it, too
            y = None if quick is None else quick(x, relu)
            if y is not None:
                return y
            known = StaticQuantizer.for_values(x, scale, zero_point, grid)
        return fake_quantize(x, scale, zero_point, grid, relu)

    return step


def _minifloats(plan: Plan, quantizer: FloatQuant, scale: Tensor) -> Step:
    used, known = None if quantizer.scaling_impl is None else scale, None

    def step(x: Tensor, relu: bool) -> Tensor:
        nonlocal known
        x = quantizer.input_view_impl(torch.relu(x) if relu else x)
        if is_compiling():
            return minifloat_quantize(x, used, *plan.format)
        if modes_active() or not is_plain(x):
            return minifloat_quantize.definition(x, used, *plan.format)
        if may_fuse() and not is_grad_enabled():
            quick: StaticQuantizer | None = known
            y = None if quick is None else quick(x, False)
            if y is not None:
                return y
            known = StaticQuantizer.for_values(x, used, None, plan.format)  # type: ignore[arg-type]
        return minifloat_quantize(x, used, *plan.format)

    return step
