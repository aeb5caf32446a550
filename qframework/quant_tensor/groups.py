"""Integers and minifloats in groups that share a scale, in a dequantized tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    grouped_shape,
    join_groups,
    max_int,
    min_int,
    split_groups,
    upcast,
)
from qframework.quant_tensor.decaying import DecayingRecord
from qframework.quant_tensor.float_quant_tensor import (
    _FLOATS,
    Codes,
    FloatQuantTensor,
    MinifloatRecord,
    codes_of,
    is_minifloat,
    snapped,
)
from qframework.quant_tensor.int_quant_tensor import TOLERANCE, near, nearest
from qframework.quant_tensor.record import fill, register
from qframework.quant_tensor.validation import as_tensor


class GroupwiseQuantTensor(DecayingRecord):
    """Base of tensors whose groups of neighbours share a scale.

    Attributes:
        value: dequantized, in the ungrouped shape.
        scale_: of the grouped shape with length 1 for the elements of a group.
        zero_point_: likewise, or without axes.
        group_size: elements of a group.
        group_dim: axis that is split into groups, as it was given; may be negative.
    """

    scale_: Tensor
    zero_point_: Tensor
    group_size: int
    group_dim: int

    @property
    def value_(self) -> Tensor:
        """The value in its grouped shape."""
        return split_groups(self.value, self.group_size, self.group_dim)

    @property
    def dequant_shape(self) -> torch.Size:
        """The ungrouped shape."""
        return self.value.shape

    def _spread(self, t: Tensor) -> Tensor:
        if t.numel() == 1 and t.dim() <= 1:
            return t.reshape(())
        whole = grouped_shape(self.value.shape, self.group_size, self.group_dim)
        return join_groups(t.expand(whole), self.group_dim, self.value.shape)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale of each element, in the shape of ``value``."""
        return self._spread(self.scale_)

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """The zero point of each element, in the shape of ``value``; without axes where it is one number."""
        return self._spread(self.zero_point_)

    def expand_groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, scale and zero point, all in the ungrouped shape."""
        return self.value, self.scale, self.zero_point

    @staticmethod
    def from_expanded(value: Tensor, group_size: int, group_dim: int) -> Tensor:
        """A tensor in its grouped shape."""
        return split_groups(value, group_size, group_dim)

    def _grouped(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        return join_groups(values(self.value_), self.group_dim, self.value.shape)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE.get(self.value.dtype, 0.2)

    @property
    def _unscaled_(self) -> Tensor:
        """``value / scale`` in the grouped shape, in float32 where the value is of half precision."""
        return upcast(self.value_) / self.scale_


def _group_fields(
    value: Tensor,
    scale: Tensor,
    zero_point: Tensor | float,
    group_size: int,
    group_dim: int,
    dequant_shape: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value in the ungrouped shape, scale and zero point, checked.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that aren't those of groups.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"value must be a floating-point tensor, got {type(value).__name__}")
    dim = group_dim % max(value.dim() - 1, 1)
    if value.dim() < 2 or value.shape[dim + 1] != group_size:
        raise ValueError(
            f"value of shape {tuple(value.shape)} isn't grouped: axis {dim + 1} should hold the {group_size} elements "
            "of a group; see GroupwiseIntQuantTensor.from_expanded"
        )
    if not isinstance(scale, Tensor) or (scale.dim() > 0 and scale.dim() != value.dim()):
        raise ValueError(
            f"scale must have the {value.dim()} axes of the grouped value, with 1 for the elements of a group"
        )
    joined = join_groups(value, dim, dequant_shape)
    return joined, scale, as_tensor("zero_point", zero_point, value)


class GroupwiseIntQuantTensor(GroupwiseQuantTensor):
    """Integers in groups: ``value = (q - zero_point) * scale``, a scale for each group.

    Args:
        value: grouped, see :func:`split_groups`.
        scale: of the grouped shape with 1 for the elements of a group.
        zero_point: likewise, or a number.
        group_size: elements of a group.
        group_dim: axis of the ungrouped shape that is split.
        bit_width: bits of the integers, a number or a 0-dim tensor.
        signed: whether the integers are two's complement.
        training: whether it was made in training mode.
        dequant_shape: the ungrouped shape; None when nothing is padded.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that aren't those of groups.
    """

    tensor_names = ("value", "scale_", "zero_point_", "bit_width")
    static_names = (
        "group_size",
        "group_dim",
        "signed",
        "training",
        "source",
        "symmetric",
        "has_zero",
    )

    bit_width: Tensor

    def __init__(
        self,
        value: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        group_size: int,
        group_dim: int,
        bit_width: Tensor | float,
        signed: bool,
        training: bool = False,
        dequant_shape: Sequence[int] | None = None,
    ) -> None:
        first = _group_fields(value, scale, zero_point, group_size, group_dim, dequant_shape)
        symmetric = not isinstance(zero_point, Tensor) and zero_point == 0
        bits = as_tensor("bit_width", bit_width, value)
        static = (group_size, group_dim, bool(signed), bool(training), None, symmetric, symmetric)
        fill(self, (*first, bits, *static))

    @property
    def _pre_round_int_value(self) -> Tensor:
        return self._grouped(lambda _: self._unscaled_ + self.zero_point_)

    def _integers(self) -> Tensor:
        known = self.known_codes()
        return nearest(self, self.scale, self.zero_point) if known is None else known.round()

    @property
    def is_valid(self) -> bool:
        """Whether ``value / scale + zero_point`` are, up to rounding errors, integers of the declared range."""
        with torch.no_grad():
            exact = self._pre_round_int_value
            rounded = self._integers()
            low = min_int(self.signed, False, self.bit_width)
            high = max_int(self.signed, False, self.bit_width)
            close = near(self, exact, rounded, self.scale, self.zero_point)
            return bool((close & (rounded >= low) & (rounded <= high)).all())

    def int(self, float_datatype: bool = False) -> Tensor:
        """The integers, in the ungrouped shape.

        Args:
            float_datatype: return them in a float dtype.

        Returns:
            int8 or uint8 up to 8 bits, else int32.

        Raises:
            RuntimeError: the tensor isn't valid.
        """
        if not self.is_valid:
            raise RuntimeError(
                "this GroupwiseIntQuantTensor is not valid: value / scale + zero_point are not all integers of "
                f"{float(self.bit_width):g} bits"
            )
        rounded = self._integers()
        if float_datatype:
            return rounded
        if float(self.bit_width) > 8:
            return rounded.to(torch.int32)
        return rounded.to(torch.int8 if self.signed else torch.uint8)

    def __neg__(self) -> Any:
        return -self.value

    def __abs__(self) -> Any:
        return self.value.abs()


class GroupwiseFloatQuantTensor(MinifloatRecord, GroupwiseQuantTensor):
    """Minifloats in groups: ``value = minifloat * scale``, a scale for each group.

    Args:
        value: grouped, see :func:`split_groups`.
        scale: of the grouped shape with 1 for the elements of a group.
        zero_point: 0.
        group_size: elements of a group.
        group_dim: axis of the ungrouped shape that is split.
        exponent_bit_width: see :class:`FloatQuantTensor`.
        mantissa_bit_width: likewise.
        exponent_bias: likewise.
        saturating: likewise.
        inf_values: likewise.
        nan_values: likewise.
        signed: likewise.
        training: likewise.
        dequant_shape: the ungrouped shape; None when nothing is padded.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that aren't those of groups.
    """

    tensor_names = ("value", "scale_", "zero_point_", *_FLOATS)
    static_names = ("group_size", "group_dim", *FloatQuantTensor.static_names)

    def __init__(
        self,
        value: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        group_size: int,
        group_dim: int,
        exponent_bit_width: Tensor | float,
        mantissa_bit_width: Tensor | float,
        exponent_bias: Tensor | float,
        saturating: bool,
        inf_values: Codes,
        nan_values: Codes,
        signed: bool,
        training: bool = False,
        dequant_shape: Sequence[int] | None = None,
    ) -> None:
        first = _group_fields(value, scale, zero_point, group_size, group_dim, dequant_shape)
        widths = (exponent_bit_width, mantissa_bit_width, exponent_bias)
        tensors = (as_tensor(n, w, value) for n, w in zip(_FLOATS, widths, strict=True))
        codes = tuple(None if c is None else tuple(c) for c in (inf_values, nan_values))
        static = (bool(saturating), *codes, bool(signed), bool(training), None, True, True)
        fill(self, (*first, *tensors, group_size, group_dim, *static))

    @property
    def is_valid(self) -> bool:
        """Whether ``value / scale`` are, up to rounding errors, numbers of the format. Reads all values."""
        return is_minifloat(self._unscaled_, self, self._tolerance)

    def minifloat(self, float_datatype: bool = True) -> Tensor:
        """``value / scale`` on the grid of the format, in the ungrouped shape.

        Args:
            float_datatype: as floating-point numbers; else as their codes, see :meth:`codes`.
        """
        if not float_datatype:
            return self.codes()
        return self._grouped(lambda _: snapped(self._unscaled_, self._unit(self._unscaled_)))

    def codes(self) -> Tensor:
        """The codes, in the ungrouped shape; see :meth:`FloatQuantTensor.codes`.

        Raises:
            RuntimeError: the tensor isn't valid.
        """
        if not self.is_valid:
            raise RuntimeError(
                "this GroupwiseFloatQuantTensor is not valid: not all of value / scale are numbers of its format"
            )
        return self._grouped(lambda _: codes_of(self._unscaled_, self))


register(GroupwiseIntQuantTensor)
register(GroupwiseFloatQuantTensor)
