"""What the parts of a quantizer mean, as data: arguments of functions, and what a part states of itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class IntegerGrid:
    """The integers of a quantizer.

    Attributes:
        minimum: smallest integer: a number, or a tensor that broadcasts to the values.
        maximum: largest integer, of the same type.
        rounding: how numbers become integers, a name of :data:`~qframework.functional.ROUNDINGS`.
        clamp_gradient: differentiate the clamp: outside of the range the gradient goes to the bound. Otherwise it passes
            everywhere, straight through.
        clips_first: with a differentiated clamp that comes before the rounding, as in LSQ: the values are the same, but no gradient
            passes from an end of the range on, instead of from half a step beyond.
    """

    minimum: float | Tensor
    maximum: float | Tensor
    rounding: str = "round"
    clamp_gradient: bool = True
    clips_first: bool = False


@dataclass(frozen=True)
class RestrictionRule:
    """Which numbers a scale may be.

    Attributes:
        domain: ``'fp'``, ``'log_fp'`` or ``'power_of_two'``, see :mod:`qframework.functional.scales`.
        rounding: of the exponent, in the domain of powers of two.
    """

    domain: str = "fp"
    rounding: str = "round"


@dataclass(frozen=True)
class Granularity:
    """What shares a statistic: the whole tensor, each channel, each group or each row.

    Attributes:
        channel_axis: the axis of the channels; None for the tensor.
        groups: how many neighbours are a group, and along which axis; None for none.
        rows: whether each row does, along the last axis.
    """

    channel_axis: int | None = None
    groups: tuple[int, int] | None = None
    rows: bool = False


@dataclass(frozen=True)
class StatisticRule:
    """A statistic.

    Attributes:
        kind: ``'absmax'``, ``'minmax'`` (the width of the range), ``'negative_min'``; ``'percentile'`` (of magnitudes),
            ``'percentile_interval'``, ``'negative_percentile'``.
        axis: that is reduced, None for all.
        keepdim: whether it stays, with length 1.
        low: lower percentile, in percent.
        high: upper percentile, in percent.
    """

    kind: str
    axis: int | None = None
    keepdim: bool = False
    low: float = 0.0
    high: float = 100.0


@dataclass(frozen=True)
class ScaleRule:
    """How a scale is made: ``max(magnitude, minimum) / threshold`` in its domain.

    Attributes:
        source: of the magnitude: ``'absmax'`` or ``'minmax'`` of what is quantized, or ``'learned'``.
        threshold: the positive number that the magnitude is divided by.
        domain: see :class:`RestrictionRule`.
        rounding: of the exponent, in the domain of powers of two.
        minimum: lower bound of the magnitude, None for none.
        shape: of the scale.
        channel_axis: the axis whose indices have a scale each; None where there is one for all.
        reduced_axis: the axis whose elements share a scale, one for each index of all others, as those of rows and groups do, so
            that the shape is another for each tensor; None for no such axis.
    """

    source: str
    threshold: float
    domain: str = "fp"
    rounding: str = "round"
    minimum: float | None = None
    shape: tuple[int, ...] = ()
    channel_axis: int | None = None
    reduced_axis: int | None = None
    groups: tuple[int, int] | None = None
