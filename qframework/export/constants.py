"""What a quantizer computes in one call in evaluation, as constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qframework.functional import (
    ROUNDINGS,
    MinifloatFormat,
    floating,
    minifloat_quantize,
    split_groups,
    upcast,
)
from qframework.functional.straight_through import STEPS


@dataclass(eq=False)
class Constants:
    """The constants of one call of a quantizer.

    Attributes:
        name: unique in the model: the name of the slot, with a number where its calls differ.
        slot: qualified name of the slot, ``"conv1.weight_quant"``.
        role: ``"weight"``, ``"bias"``, ``"activation"`` or ``"truncation"``.
        format: ``"integer"``, ``"binary"``, ``"ternary"`` or ``"minifloat"``.
        scale: broadcasts to the value; of the grouped shape with groups.
        zero_point: broadcasts to the value likewise; 0-dim where there is one.
        low: the smallest integer.
        high: the largest integer.
        bits: of the integers, or of the minifloats.
        signed: of the integers or minifloats.
        narrow: whether the range lacks its smallest (signed) or largest (unsigned) integer.
        shape: of the value; that of one call where it may vary.
        dtype: of the value.
        rounding: a name of :data:`qframework.functional.ROUNDINGS`.
        record: the quantized tensor, whose value another call replaces.
        activation: function in front of the quantizer.
        codes: integers of a parameter, int64; minifloats of one, divided by their scale, in float32.
        group_size: elements of a group; None without groups.
        group_dim: the axis of the groups, from 0 on.
        minifloat: the number format of minifloats.
        exponent_bits: of minifloats.
        inf_codes: whether the format has infinities.
        nan_codes: whether the format has NaN.
        threshold: half width of the dead zone of ternary values, in scales.
        truncates: divisor, scale, zero point and bits of the input of a truncation.
        symmetric: whether the zero point is 0.
        whole_zero_point: whether the zero point is an integer of the range.
        one_grid: scale and zero point as numbers, where there is one of each; else None.
    """

    name: str
    slot: str
    role: str
    format: str
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    bits: int
    signed: bool
    narrow: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    rounding: str = "round"
    record: Any = field(default=None, repr=False)
    activation: nn.Module | None = None
    codes: Tensor | None = None
    group_size: int | None = None
    group_dim: int = 0
    minifloat: MinifloatFormat | None = None
    exponent_bits: int = 0
    inf_codes: bool = False
    nan_codes: bool = False
    threshold: float = 0.0
    truncates: tuple[Tensor, Tensor, Tensor, int] | None = None
    symmetric: bool = field(init=False)
    whole_zero_point: bool = field(init=False)
    one_grid: tuple[float, float] | None = field(init=False)

    # ------------------------------------------------------------ what it means

    def __post_init__(self) -> None:
        """Read what can't be read while a model is traced."""
        z = self.zero_point
        self.symmetric = not bool(z.any())
        self.whole_zero_point = bool(((z == z.round()) & (z >= self.low) & (z <= self.high)).all())
        one = self.scale.numel() == 1 and z.numel() == 1 and self.group_size is None
        self.one_grid = (float(self.scale), float(z)) if one else None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a weight or a bias."""
        return self.role in ("weight", "bias")

    def axes(self) -> list[int]:
        """The axes of the value, from 0 on, along which scale or zero point vary."""
        rank = len(self.shape)
        found = set()
        for t in (self.scale, self.zero_point):
            found |= {rank - t.dim() + i for i, n in enumerate(t.shape) if n > 1}
        return sorted(found)

    def along(self, t: Tensor) -> Tensor:
        """A scale or zero point as a number or a vector along the one axis that it varies along."""
        axes = self.axes()
        if not axes:
            return t.reshape(())
        count = max(self.scale.numel(), self.zero_point.numel())
        return t.reshape(-1).expand(count) if t.numel() == 1 else t.reshape(-1)

    def spread(self, t: Tensor) -> Tensor:
        """A scale or zero point in a shape that broadcasts to the value, groups expanded."""
        if self.group_size is None or t.dim() != len(self.shape) + 1:
            return t
        whole = list(t.shape)
        whole[self.group_dim + 1] = self.group_size
        joined = t.expand(whole).flatten(self.group_dim, self.group_dim + 1)
        return joined.narrow(self.group_dim, 0, self.shape[self.group_dim])

    def compute(self, x: Tensor) -> Tensor:
        """The value that the quantizer gives for ``x``, behind the activation function, by its definition."""
        v = upcast(x)
        scale = self.spread(self.scale)
        if self.format == "binary":
            y = STEPS["binary_sign"](v) * scale
        elif self.format == "ternary":
            y = (v.abs() > self.threshold * scale).to(v.dtype) * torch.sign(v) * scale
        else:
            y = self.dequantized(self.rounded(self.steps(v)))
        return y.to(floating(x).dtype)

    def steps(self, x: Tensor) -> Tensor:
        """``x`` in steps of the grid, before it is rounded, in its dtype; divided by the scale for other formats."""
        if self.truncates is not None:
            divisor, scale, zero_point = (t.to(x.dtype) for t in self.truncates[:3])
            return (x / scale + zero_point).round() / divisor
        v = x / self.spread(self.scale).to(x.dtype)
        if self.format != "integer" or self.symmetric:
            return v
        return v + self.spread(self.zero_point).to(x.dtype)

    def rounded(self, steps: Tensor) -> Tensor:
        """The integers for what :meth:`steps` gives, in its dtype; minifloats for that format."""
        if self.format == "binary":
            return STEPS["binary_sign"](steps)
        if self.format == "ternary":
            return torch.where(steps.abs() > self.threshold, torch.sign(steps), 0.0).to(steps.dtype)
        if self.format == "minifloat":
            assert self.minifloat is not None
            return minifloat_quantize.definition(steps, None, self.minifloat, self.rounding)
        return ROUNDINGS[self.rounding](steps).clamp(self.low, self.high)

    def dequantized(self, integers: Tensor) -> Tensor:
        """The value of integers or minifloats, in their dtype."""
        scale = self.spread(self.scale).to(integers.dtype)
        if self.symmetric:
            return integers * scale
        return (integers - self.spread(self.zero_point).to(integers.dtype)) * scale

    def codes_of(self, value: Tensor) -> Tensor:
        """The integers of a value, int64; minifloats divided by their scale, in float64."""
        wide = value.double() / self.spread(self.scale).double()
        if self.format == "minifloat":
            return wide
        return (wide + self.spread(self.zero_point).double()).round().long()

    def rewrap(self, value: Tensor, source: object) -> Any:
        """The quantized tensor of another call, with the constants of this one."""
        return self.record.replace(value=value, training=False, source=source)

    def grouped(self, t: Tensor) -> Tensor:
        """``t``, of the shape of the value, split into groups."""
        assert self.group_size is not None
        return split_groups(t, self.group_size, self.group_dim)
