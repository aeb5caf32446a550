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

from qframework.configuration import settings
from qframework.core.base import Constant, NotStated
from qframework.core.collector import is_shared
from qframework.core.float_quant import FloatQuant
from qframework.core.quant import PrescaledRestrictIntQuant, RescalingIntQuant
from qframework.functional import (
    ROUNDINGS,
    Granularity,
    IntegerGrid,
    MinifloatGrid,
    ScaleRule,
    StatisticRule,
    fake_quantize,
    high_rank,
    is_recomputing,
    minifloat_quantize,
    quantize_by_absmax,
    quantize_by_learned_scale,
    quantize_by_minmax,
    quantize_by_percentile,
)
from qframework.kernels import native
from qframework.kernels.autograd import (
    is_compiling,
    may_fuse,
    may_fuse_in_graph,
    safe_from_writes,
)
from qframework.kernels.trust import (
    Guards,
    distrust,
    distrust_all,
    function_names,
    giver_of,
    is_plain,
    modes_active,
)

#: From values, and for some quantizers a scale, to what the quantizer returns.
Form = Callable[..., Any]


class Reader:
    """Reads the rules of parts, and remembers what they depend on.

    Args:
        guards: remember the parts; None under a compiler, which has guards of its own.
    """

    def __init__(self, guards: Guards | None = None) -> None:
        self.guards = guards
        reason = distrust_all()
        if reason is not None:
            raise NotStated(reason)

    def stated(self, part: nn.Module, *args: Any) -> Any:
        """The rule of a part.

        Args:
            part: of a quantizer.
            *args: what its ``rule`` takes besides.

        Raises:
            NotStated: there is none, or it isn't what the part computes.
        """
        return self.read(part, "rule", *args)

    def read(self, part: nn.Module, method: str, *args: Any) -> Any:
        """What a method states, see :meth:`stated`."""
        if not isinstance(part, nn.Module):
            raise NotStated(f"{getattr(part, '__name__', type(part).__name__)} is no module")
        if self.guards is not None:
            self.guards.watch(part)
        else:
            for name in function_names(type(part)):  # looked at, so that a compiler watches it
                getattr(part, name)
        reason = distrust(part, method)
        if reason is not None:
            raise NotStated(reason)
        if self.guards is not None:
            self.guards.watch_settings(part)
        try:
            return getattr(part, method)(self.stated, *args)
        except NotStated:
            raise
        except Exception as error:
            given_by = giver_of(type(part), method).__module__
            if given_by.startswith("qframework.") and isinstance(error, (TypeError, ValueError)):
                raise  # what the part holds isn't allowed
            # A class that knows nothing of rules may have a method of that name.
            raise NotStated(f"{type(part).__name__}.{method} is no rule: {error}") from error


def _known_rounding(rounding: Any) -> None:
    """Refuse a rounding that only the composition knows."""
    if rounding not in ROUNDINGS:
        raise NotStated(f"no faster form rounds by {rounding!r}")


class Plan:
    """How a quantizer runs.

    Attributes:
        name: of the function that computes, for people; ``'composed'`` where the quantizer itself is called.
        reason: why it is called itself, else empty.
        grid: the integers, where values by a scale that is known are those of
            :func:`~qframework.functional.fake_quantize`, else None.
        symmetric: whether there is no zero point.
        format: of minifloats, their rounding and whether the clamp is differentiated; else empty.
        fuses_relu: whether the form does what the activation function would do, a ReLU.
        guards: what holds as long as the plan does; None under a compiler.
    """

    def __init__(self, quantizer: Any, activation: nn.Module | None, guards: Guards | None) -> None:
        self.quantizer, self.activation, self.guards = quantizer, activation, guards
        self.form: Form | None = None
        self.fuses_relu = False
        self.name, self.reason = "composed", ""
        self.grid: IntegerGrid | None = None
        self.symmetric = False
        self.format: tuple[Any, ...] = ()

    def holds(self, quantizer: Any, activation: nn.Module | None) -> bool:
        """Whether it still is the plan of a quantizer, behind an activation function."""
        return (
            self.quantizer is quantizer
            and self.activation is activation
            and self.guards is not None
            and self.guards.hold()
        )

    def run(self, x: Tensor, *scales: Tensor) -> Any:
        """What the quantizer returns for what the activation function makes of ``x``.

        Args:
            x: floating-point values.
            *scales: what the quantizer takes besides.
        """
        fast = (
            self.form is not None
            and ((may_fuse() and not modes_active()) or may_fuse_in_graph())
            and is_plain(x, *scales)
        )
        if self.activation is not None and not (fast and self.fuses_relu):
            x = self.activation(x)
        if fast:
            if self.fuses_relu and x.requires_grad:
                x = safe_from_writes(x)
            return self.form(x, *scales)  # type: ignore[misc]
        return self.quantizer(x, *scales)

    def path(self, x: Tensor | None = None) -> str:
        """Which form runs, for people: ``'C++ function'``, ``'fused'`` or ``'composed'``, of which function, and why.

        Args:
            x: for these values; None for any.
        """
        if settings.kernels == "reference":
            return "composed: settings.kernels is 'reference'"
        if self.form is None:
            return f"composed: {self.reason}"
        if settings.kernels == "auto" and native.available():
            if x is None:
                least = native.tensors.SMALLEST
                return f"C++ function from {least:,} elements on, else fused: {self.name}"
            if native.serves(x.detach(), (), "round") is not None:
                return f"C++ function: {self.name}"
        return f"fused: {self.name}"


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
        _plan_minifloats(plan, reader, MinifloatGrid(*rule))
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
    _known_rounding(grid.rounding)
    symmetric = _is_symmetric(reader, quantizer.zero_point_impl)
    plan.name, plan.form = "fake_quantize", _by_parts(quantizer, grid, bits is None, symmetric)
    if bits is None:
        return
    try:
        view: Granularity | None = reader.stated(quantizer.int_quant.input_view_impl)
        if view is None:
            plan.grid, plan.symmetric = grid, symmetric
        threshold = reader.stated(quantizer.int_scaling_impl, bits)
        rule: ScaleRule = reader.stated(quantizer.scaling_impl, threshold)
        if not isinstance(rule, ScaleRule):
            return
        _known_rounding(rule.rounding)
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
    width = _constant(quantizer.msb_clamp_bit_width_impl, bits)
    collects = hasattr(scaling, "is_collecting")
    by_parts = _by_parts(quantizer, grid, False, True)
    quantize = _quickest(quantize_by_learned_scale)

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
            return y, scale, _zero(scale), width()
        stored = scaling.to_evaluate() if collects else scaling.stored()
        if not is_plain(stored):
            return by_parts(x, relu)
        y, scale = quantize(x, stored, grid, rule, relu)
        return y, scale, _zero(scale), width()

    return run


def may_collect(scaling: Any) -> bool:
    """Whether the present call collects; under a compiler, whether it might."""
    if is_compiling():
        return bool(scaling.training and not scaling.switched)
    return bool(scaling.is_collecting())


def _by_absmax(quantizer: RescalingIntQuant, bits: int, grid: IntegerGrid, rule: ScaleRule) -> Form:
    width = _constant(quantizer.msb_clamp_bit_width_impl, bits)
    quantize, view = _quickest(quantize_by_absmax), quantizer.int_quant.input_view_impl
    by_parts = _by_parts(quantizer, grid, False, True)

    def run(x: Tensor) -> Any:
        if x.numel() == 0 or x.dim() == 0:  # there may be no rows
            return by_parts(x)
        y, scale = quantize(view(x), grid, rule)
        return y, scale, _zero(scale), width()

    return run


def _by_minmax(quantizer: RescalingIntQuant, bits: int, grid: IntegerGrid, rule: ScaleRule) -> Form:
    width = _constant(quantizer.msb_clamp_bit_width_impl, bits)
    quantize = _quickest(quantize_by_minmax)

    def run(x: Tensor) -> Any:
        return *quantize(x, grid, rule), width()

    return run


def _quickest(function: Any) -> Any:
    """What a function runs where fused functions may: Plan.run has asked."""
    if is_compiling():
        return function
    return next(kernel.run for kernel in function.kernels if kernel.name == "fused")


def _constant(width: Any, bits: int) -> Callable[[], Tensor]:
    """The function that gives a constant bit width as a tensor."""
    return partial(width.number, float(bits)) if isinstance(width, Constant) else width.forward


def _zero(scale: Tensor) -> Tensor:
    return scale.new_zeros(())


def _plan_prescaled(plan: Plan, reader: Reader) -> None:
    quantizer = plan.quantizer
    width, rounds = quantizer.msb_clamp_bit_width_impl, quantizer.int_quant
    grid: IntegerGrid = reader.stated(rounds, reader.stated(width))
    _known_rounding(grid.rounding)

    def run(x: Tensor, scale: Tensor) -> Any:
        y = fake_quantize(rounds.input_view_impl(x), scale, None, grid)
        return y, scale, _zero(scale), width.forward()

    plan.name, plan.form, plan.grid = "fake_quantize", run, grid


# ------------------------------------------------------------ minifloats


def _plan_minifloats(plan: Plan, reader: Reader, grid: MinifloatGrid) -> None:
    quantizer: FloatQuant = plan.quantizer
    _known_rounding(grid.rounding)
    plan.name, plan.form, plan.format = "minifloat_quantize", _by_scale(quantizer, grid), grid
    if quantizer.scaling_impl is None:
        return
    try:
        view: Granularity | None = reader.stated(quantizer.input_view_impl)
        rule: ScaleRule = reader.stated(quantizer.scaling_impl, grid.format.largest)
        if not isinstance(rule, ScaleRule) or rule.source != "absmax":
            return
        _known_rounding(rule.rounding)
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
    quantize, by_scale = _quickest(quantize_by_absmax), _by_scale(quantizer, grid)

    def run(x: Tensor) -> Any:
        if x.numel() == 0 or x.dim() == 0:
            return by_scale(x)
        return quantizer.described(*quantize(quantizer.input_view_impl(x), grid, rule))

    return run
