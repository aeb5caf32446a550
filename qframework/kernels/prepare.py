"""From what the parts of a quantizer state to the fast form of the quantizer.

A plan is made when a quantizer runs first, and anew when one of its parts has changed. Where a part doesn't state what it means,
or isn't what states it, the plan is to call the quantizer: the composition of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import Constant, NotStated
from qframework.core.binary import BinaryQuant, ClampedBinaryQuant
from qframework.core.collector import LEARNED, CollectThenLearn, is_shared
from qframework.core.float_quant import FloatQuant
from qframework.core.quant import PrescaledRestrictIntQuant, RescalingIntQuant
from qframework.functional import (
    Granularity,
    IntegerGrid,
    MinifloatGrid,
    ScaleRule,
    StatisticRule,
    fake_quantize,
    high_rank,
    is_recomputing,
    quantize_by_absmax,
    quantize_by_learned_scale,
    quantize_by_minmax,
    quantize_by_percentile,
)
from qframework.kernels import native
from qframework.kernels.absmax import by_absmax
from qframework.kernels.autograd import is_compiling
from qframework.kernels.guards import Guards
from qframework.kernels.learned import by_learned_scale
from qframework.kernels.plan import Form, Plan, Reader, known_rounding
from qframework.kernels.prepare_minifloats import plan_minifloats
from qframework.kernels.prepare_signs import plan_signs
from qframework.kernels.trust import are_ours, distrust, giver_of, is_plain
from qframework.quant_tensor.later import Later, as_before


def prepare(quantizer: Any, activation: nn.Module | None = None) -> Plan:
    """How to run a quantizer: by the fast form that means the same, or by itself.

    Args:
        quantizer: a tensor quantizer.
        activation: applied before; None for none.
    """
    guards = None if is_compiling() else Guards()
    plan = Plan(quantizer, activation, guards)
    try:
        _find_form(plan, Reader(guards))
    except NotStated as why:
        plan.reason = why.args[0]
    if guards is not None:
        guards.watch(quantizer)
        if activation is not None:
            guards.watch(activation)
            if type(activation) is nn.ReLU:
                guards.watch_settings(activation)
        guards.close()
    return plan


def _find_form(plan: Plan, reader: Reader) -> None:
    quantizer = plan.quantizer
    rule = reader.stated(quantizer)
    if getattr(quantizer, "observer_only", False):
        raise NotStated("values pass unquantized while statistics are collected")
    if isinstance(quantizer, RescalingIntQuant):
        _plan_integers(plan, reader)
    elif isinstance(quantizer, PrescaledRestrictIntQuant):
        _plan_prescaled(plan, reader)
    elif isinstance(quantizer, FloatQuant):
        plan_minifloats(plan, reader, MinifloatGrid(*rule))
    elif isinstance(quantizer, (BinaryQuant, ClampedBinaryQuant)):
        plan_signs(plan, rule)
    else:
        raise NotStated(f"no faster form is known of {type(quantizer).__name__}")


# ------------------------------------------------------------ integers


def _plan_integers(plan: Plan, reader: Reader) -> None:
    quantizer = plan.quantizer
    try:
        stated = reader.stated(quantizer.msb_clamp_bit_width_impl)
    except NotStated:
        stated = None
    bits = stated if type(stated) is int else None
    grid: IntegerGrid = reader.stated(quantizer.int_quant, bits)
    known_rounding(grid.rounding)
    symmetric = _is_symmetric(reader, quantizer.zero_point_impl)
    plan.name, plan.form = "fake_quantize", _by_parts(quantizer, grid, bits is None, symmetric)
    if bits is None:
        return
    try:
        view: Granularity | None = reader.stated(quantizer.int_quant.input_view_impl)
        if view is None:
            plan.grid, plan.symmetric = grid, symmetric
        if grid.clips_first:  # as one by a scale that is known
            return
        threshold = reader.stated(quantizer.int_scaling_impl, bits)
        rule: ScaleRule = reader.stated(quantizer.scaling_impl, threshold)
        if not isinstance(rule, ScaleRule):
            return
        known_rounding(rule.rounding)
        if rule.groups != (None if view is None else view.groups):
            return
        if rule.source == "learned":
            if not symmetric or view is not None:
                return
            plan.name = "quantize_by_learned_scale"
            plan.fuses_relu = _is_relu(plan.activation)
            ranks = _ranks(reader, quantizer.scaling_impl)
            plan.form = _by_learned_scale(quantizer, bits, grid, rule, plan.fuses_relu, ranks)
        elif rule.source == "absmax" and symmetric:
            plan.name, plan.form = "quantize_by_absmax", _by_absmax(quantizer, bits, grid, rule)
        elif grid.clamp_gradient or view is not None:
            return
        elif rule.source == "minmax" and _follows(reader, quantizer, rule):
            plan.name, plan.form = "quantize_by_minmax", _by_minmax(quantizer, bits, grid, rule)
    except NotStated:  # the scale is computed by its parts
        return


def _is_symmetric(reader: Reader, zero_point: nn.Module) -> bool:
    """Whether there is no zero point."""
    try:
        return reader.stated(zero_point) is None
    except NotStated:
        return False


def _follows(reader: Reader, quantizer: Any, rule: ScaleRule) -> bool:
    """Whether the zero point is that of the range that the scale is taken from, rounded as the values are."""
    zero_point = quantizer.zero_point_impl
    found: Granularity = reader.stated(zero_point)
    return (
        found == Granularity(rule.channel_axis)
        and zero_point.int_quant is quantizer.int_quant
        and zero_point.zero_point_shape == rule.shape
    )


_RELU = nn.ReLU.forward


def _is_relu(activation: nn.Module | None) -> bool:
    return (
        type(activation) is nn.ReLU
        and not activation.inplace
        and nn.ReLU.forward is _RELU
        and distrust(activation, "forward") is None
    )


def _by_parts(
    quantizer: RescalingIntQuant, grid: IntegerGrid, learned_width: bool, symmetric: bool
) -> Form:
    """By scale, zero point and width of the parts themselves."""
    rounds: Any = quantizer.int_quant

    def run(x: Tensor, relu: bool = False) -> Any:
        seen = torch.relu(x) if relu else x
        scale, zero_point, bit_width = quantizer.parameters_for(seen)
        if not is_plain(scale, zero_point, bit_width):
            y = quantizer.quantize(seen, scale, zero_point, bit_width)
            return y, scale, zero_point, bit_width
        bounds = grid
        if learned_width:
            low, high = rounds.min_int(bit_width), rounds.max_int(bit_width)
            bounds = IntegerGrid(low, high, grid.rounding, grid.clamp_gradient)
        shift = None if symmetric else zero_point
        y = fake_quantize(rounds.input_view_impl(x), scale, shift, bounds, relu)
        return y, scale, zero_point, bit_width

    return run


def _ranks(reader: Reader, scaling: Any) -> Callable[[int], int] | None:
    """From a number of elements to the rank of the magnitude that is collected; None for other statistics."""
    if not hasattr(scaling, "statistic_rule"):
        return None
    try:
        found: StatisticRule = reader.read(scaling, "statistic_rule")
    except NotStated:
        return None
    return partial(high_rank, found.high) if found.kind == "percentile" else None


def _by_learned_scale(
    quantizer: RescalingIntQuant,
    bits: int,
    grid: IntegerGrid,
    rule: ScaleRule,
    relu: bool,
    ranks: Callable[[int], int] | None,
) -> Form:
    scaling: Any = quantizer.scaling_impl
    beside = _beside(quantizer.msb_clamp_bit_width_impl, bits)
    held = _held(scaling)
    collects = hasattr(scaling, "is_collecting")
    decides = collects and not are_ours(type(scaling), "to_evaluate")
    by_parts = _by_parts(quantizer, grid, False, True)
    quantize = by_learned_scale(grid, rule, relu)
    if is_compiling():
        quantize = partial(quantize_by_learned_scale, grid=grid, rule=rule, relu=relu)

    def run(x: Tensor) -> Any:
        if collects and scaling.training and may_collect(scaling):
            if ranks is None or is_compiling() or x.numel() == 0 or is_shared():
                return by_parts(x, relu)
            if scaling.stored().shape != rule.shape:  # it was assigned
                return by_parts(x, relu)
            rank = ranks(x.numel())
            y, scale, found, finite = quantize_by_percentile(x, rank, grid, rule, relu)
            if not is_recomputing():
                scaling.record(found.detach(), finite)
            return y, scale, *beside(y, scale)
        follows = decides or (collects and scaling.used_when_copied is not None)
        stored = scaling.to_evaluate() if follows else held()
        if not is_plain(stored):
            return by_parts(x, relu)
        y, scale = quantize(x, stored)
        return y, scale, *beside(y, scale)

    return run


def _held(scaling: Any) -> Callable[[], Tensor]:
    """The function that gives a learned number, as it is kept where the class that says what is stored says that too."""
    kind = type(scaling)
    same = giver_of(kind, "held") is giver_of(kind, "stored") and not is_compiling()
    return scaling.held if same else scaling.stored  # type: ignore[no-any-return]


def may_collect(scaling: Any) -> bool:
    """Whether the present call collects; under a compiler, whether it might."""
    if is_compiling():
        return bool(scaling.training and not scaling.switched)
    if scaling.switched and type(scaling).is_collecting is CollectThenLearn.is_collecting:
        if native.count_in(scaling._buffers["collected_steps"]) == LEARNED:  # as it would find
            return False
    return bool(scaling.is_collecting())


def _by_absmax(quantizer: RescalingIntQuant, bits: int, grid: IntegerGrid, rule: ScaleRule) -> Form:
    beside = _beside(quantizer.msb_clamp_bit_width_impl, bits, rule.groups is None)
    quantize = by_absmax(grid, rule)
    if is_compiling():
        quantize = partial(quantize_by_absmax, grid=grid, rule=rule)

    view: Any = quantizer.int_quant.input_view_impl
    by_parts = _by_parts(quantizer, grid, False, True)

    def run(x: Tensor) -> Any:
        if x.numel() == 0 or x.dim() == 0:  # there may be no rows
            return by_parts(x)
        y, scale = quantize(view(x))
        return y, scale, *beside(y, scale)

    return run


def _by_minmax(quantizer: RescalingIntQuant, bits: int, grid: IntegerGrid, rule: ScaleRule) -> Form:
    width = _constant(quantizer.msb_clamp_bit_width_impl, bits)

    def run(x: Tensor) -> Any:
        return *quantize_by_minmax(x, grid, rule), width()

    return run


def _constant(width: Any, bits: int) -> Callable[[], Tensor]:
    """The function that gives a constant bit width as a tensor."""
    known = isinstance(width, Constant) and are_ours(type(width), "forward")
    return partial(width.number, float(bits)) if known else width.forward


def _zero(scale: Tensor) -> Tensor:
    return scale.new_zeros(())


#: From values and their scale to what a quantizer returns beside.
Beside = Callable[[Tensor, Tensor], tuple[Any, ...]]


def _beside(width: Any, bits: int, may_wait: bool = True) -> Beside:
    """Zero point 0 and a constant bit width; where they may wait, made when they are looked at: small tensors take as long as large ones."""
    number = _constant(width, bits)

    def now(y: Tensor, scale: Tensor) -> tuple[Any, ...]:
        return _zero(scale), number()

    def later(y: Tensor, scale: Tensor) -> tuple[Any, ...]:
        if y.dtype is not torch.float32:  # integers of half precision are found by all numbers
            return _zero(scale), number()
        return (_Constants(scale, width._buffers["place"], float(bits)),)

    known = isinstance(width, Constant) and are_ours(type(width), "forward", "number")
    return later if may_wait and known and not is_compiling() else now


class _Constants(Later):
    """A zero point and a bit width that are known, before they are tensors; of the scale it keeps no graph alive."""

    __slots__ = ("_bits", "_device", "_dtype", "_place")

    def __init__(self, scale: Tensor, place: Any, bits: float) -> None:
        self._found = {}
        self._dtype, self._device = scale.dtype, scale.device
        self._place, self._bits = place, bits

    def fields(self) -> dict[str, Tensor]:
        if not self._found:
            self._found = as_before(self._numbers, False)
        return self._found

    def _numbers(self) -> dict[str, Tensor]:
        return {
            "zero_point": torch.zeros((), dtype=self._dtype, device=self._device),
            "bit_width": self._place.new_full((), self._bits),
        }


#: The dtypes of bit widths.
_WIDTHS = (torch.float32, torch.float64)


def _plan_prescaled(plan: Plan, reader: Reader) -> None:
    quantizer = plan.quantizer
    width, rounds = quantizer.msb_clamp_bit_width_impl, quantizer.int_quant
    bits = reader.stated(width)
    grids: dict[torch.dtype, IntegerGrid]
    try:
        grids = dict.fromkeys(_WIDTHS, reader.stated(rounds, bits))
    except NotStated:  # wide bounds are those that the dtype of the width holds
        grids = {dtype: reader.stated(rounds, bits, dtype) for dtype in _WIDTHS}
    known_rounding(grids[torch.float32].rounding)

    def run(x: Tensor, scale: Tensor) -> Any:
        bit_width = width.forward()
        y = fake_quantize(rounds.input_view_impl(x), scale, None, grids[bit_width.dtype])
        return y, scale, _zero(scale), bit_width

    plan.name, plan.form = "fake_quantize", run
