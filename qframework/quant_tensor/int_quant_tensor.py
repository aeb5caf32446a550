"""Affine integers in a dequantized tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import is_half, max_int, min_int, upcast
from qframework.quant_tensor import algebra
from qframework.quant_tensor.base import Operand
from qframework.quant_tensor.record import Record, fill, is_compiling, register
from qframework.quant_tensor.source import Source, can_read, scale_only
from qframework.quant_tensor.validation import as_tensor, check_fields, check_names

#: How far from an integer a value may be, by its dtype.
TOLERANCE = {torch.float64: 0.1, torch.float32: 0.2, torch.float16: 0.5, torch.bfloat16: 0.5}


class IntQuantTensor(Record):
    """A tensor of integers ``q`` in dequantized form: ``value = (q - zero_point) * scale``.

    Args:
        value: floating-point tensor of any shape.
        scale: positive; a number, or a tensor that broadcasts to ``value``.
        zero_point: in integer steps; a number, or a tensor that broadcasts to ``value``.
        bit_width: bits of the integers, at least 1; a number or a 0-dim tensor.
        signed: whether the integers are two's complement.
        training: whether it was made in training mode.
        source: where the scale comes from; equal sources in evaluation mode mean equal scales.
        symmetric: the zero point is known to be 0; looked up when None.
        has_zero: 0 is known to be on the grid; looked up when None.

    Raises:
        TypeError: a field of a type that it can't be.
        ValueError: a scale that isn't positive and finite, less than one bit, a shape that doesn't broadcast.
    """

    tensor_names = ("value", "scale", "zero_point", "bit_width")
    static_names = ("signed", "training", "source", "symmetric", "has_zero")

    bit_width: Tensor

    def __init__(
        self,
        value: Tensor,
        scale: Tensor | float,
        zero_point: Tensor | float,
        bit_width: Tensor | float,
        signed: bool,
        training: bool = False,
        source: Source = None,
        symmetric: bool | None = None,
        has_zero: bool | None = None,
    ) -> None:
        fields = check_fields(value, scale, zero_point, bit_width, signed, training)
        known_symmetric, known_zero = _look_at(zero_point, bit_width, fields[4])
        symmetric = known_symmetric if symmetric is None else symmetric
        has_zero = known_zero if has_zero is None else has_zero
        fill(self, (*fields, source, symmetric, has_zero))

    @classmethod
    def unchecked(
        cls,
        value: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bit_width: Tensor,
        signed: bool,
        training: bool,
        source: Source = None,
        symmetric: bool = False,
        has_zero: bool | None = None,
    ) -> IntQuantTensor:
        """Make one without any check, for layers and rules; arguments as for the class, all tensors."""
        self = object.__new__(cls)
        has_zero = symmetric if has_zero is None else has_zero
        tensors = (value, scale, zero_point, bit_width)
        fill(self, (*tensors, signed, training, source, symmetric, has_zero))
        return self

    @classmethod
    def of_output(
        cls,
        output: tuple[Any, ...],
        signed: bool,
        training: bool,
        source: Source,
        symmetric: bool,
        has_zero: bool,
    ) -> IntQuantTensor:
        """Make one, without any check, of what a quantizer returned.

        Args:
            output: value, scale, zero point and bit width; or value, scale, and what gives the other two when they are looked at.
            signed: as for the class, and so the others.
            training: as for the class.
            source: as for the class.
            symmetric: as for the class.
            has_zero: as for the class.
        """
        self = object.__new__(cls)
        if is_compiling():
            fill(self, (*output[:4], signed, training, source, symmetric, has_zero))
            return self
        held = self.__dict__
        if len(output) == 3:
            held["value"], held["scale"], held["_later"] = output
        else:
            held["value"], held["scale"], held["zero_point"], held["bit_width"] = output[:4]
        held["signed"], held["training"], held["source"] = signed, training, source
        held["symmetric"], held["has_zero"] = symmetric, has_zero
        return self

    # ------------------------------------------------------------ the record

    def set(self, **changes: object) -> IntQuantTensor:
        """The same tensor with fields replaced; numbers become tensors, other checks aren't made.

        What a new field makes unknown is looked up again: another scale has no source, another zero point may not be 0.

        Raises:
            TypeError: an unknown field, or one that is neither a number nor a tensor.
        """
        check_names(changes, self.tensor_names + self.static_names)
        given: dict[str, Any] = changes
        fields = dict(given)
        for name in self.tensor_names[1:]:
            if name in changes:
                fields[name] = as_tensor(name, given[name], given.get("value", self.value))
        if "scale" in changes:
            fields["source"] = None
        elif "zero_point" in changes or "bit_width" in changes or "signed" in changes:
            fields["source"] = scale_only(self.source)
        if "zero_point" in changes or "bit_width" in changes or "signed" in changes:
            same = 0 if self.symmetric else self.zero_point
            bits, signed = (
                given.get("bit_width", self.bit_width),
                fields.get("signed", self.signed),
            )
            found = _look_at(given.get("zero_point", same), bits, signed)
            fields["symmetric"], fields["has_zero"] = found
        for name in ("source", "symmetric", "has_zero"):
            if name in changes:
                fields[name] = changes[name]
        return self.replace(**fields)

    # ------------------------------------------------------------ integers

    @property
    def _pre_round_int_value(self) -> Tensor:
        return upcast(self.value) / self.scale + self.zero_point

    def _integers(self) -> Tensor:
        known = self.known_codes()
        return nearest(self, self.scale, self.zero_point) if known is None else known.round()

    @property
    def is_valid(self) -> bool:
        """Whether ``value / scale + zero_point`` are, up to rounding errors, integers of the declared range.

        Reads all values; a 1-bit tensor is valid when it holds no more than two integers of the right sign.
        """
        with torch.no_grad():
            exact = self._pre_round_int_value
            rounded = self._integers()
            if not bool(near(self, exact, rounded, self.scale, self.zero_point).all()):
                return False
            if float(self.bit_width) < 2:
                few = rounded.unique().numel() <= 2
                return few and (self.signed or not bool((rounded < 0).any()))
            low, high = (
                min_int(self.signed, False, self.bit_width),
                max_int(self.signed, False, self.bit_width),
            )
            return bool(((rounded >= low) & (rounded <= high)).all())

    def int(self, float_datatype: bool = False) -> Tensor:
        """The integers ``q``.

        Args:
            float_datatype: return them in the float dtype of the scale; above 8 bits in float32 at least.

        Returns:
            int8 or uint8 up to 8 bits, else int32, or int64 where an integer needs it; same shape.

        Raises:
            RuntimeError: the tensor isn't valid.
        """
        if not self.is_valid:
            with torch.no_grad():
                exact = self._pre_round_int_value
                off = float((exact - exact.round()).abs().max())
                span = f"{float(exact.min()):.6g} to {float(exact.max()):.6g}"
            sign = "signed" if self.signed else "unsigned"
            raise RuntimeError(
                f"this IntQuantTensor is not valid: value / scale + zero_point spans {span} and is up to {off:.3g} "
                f"away from an integer; allowed are {sign} integers of {float(self.bit_width):g} bits"
            )
        rounded = self._integers()
        bits = float(self.bit_width)
        if float_datatype:
            dtype = self.scale.dtype if bits <= 8 else rounded.dtype
            return rounded.to(dtype)
        if bits <= 8:
            return rounded.to(torch.int8 if self.signed else torch.uint8)
        fits = bits < 32 or bool(((rounded >= -(2.0**31)) & (rounded < 2.0**31)).all())
        return rounded.to(torch.int32 if fits else torch.int64)

    # ------------------------------------------------------------ arithmetic

    def __neg__(self) -> Any:
        return algebra.negative(self)

    def __abs__(self) -> Any:
        return algebra.absolute(self)

    def __add__(self, other: Operand) -> Any:
        return algebra.add(self, other)

    def __radd__(self, other: Operand) -> Any:
        return algebra.add(self, other)

    def __sub__(self, other: Operand) -> Any:
        return algebra.subtract(self, other)

    def __rsub__(self, other: Operand) -> Any:
        return algebra.subtract(other, self)

    def __mul__(self, other: Operand) -> Any:
        return algebra.multiply(self, other)

    def __rmul__(self, other: Operand) -> Any:
        return algebra.multiply(other, self)

    def __truediv__(self, other: Operand) -> Any:
        return algebra.divide(self, other)

    def __rtruediv__(self, other: Operand) -> Any:
        return algebra.divide(other, self)


def _look_at(
    zero_point: Tensor | float, bit_width: Tensor | float, signed: bool
) -> tuple[bool, bool]:
    """Whether a zero point is 0, and whether 0 is on the grid, as far as it can be known.

    A signed type of one bit holds -1 and 1, and no 0.
    """
    with torch.no_grad():
        if not isinstance(bit_width, Tensor):
            bit_width = torch.tensor(float(bit_width), device="cpu")
        widths_known = can_read(bit_width)
        if not isinstance(zero_point, Tensor):
            if zero_point == 0:
                return True, not (signed and widths_known and bool(bit_width < 2))
            zero_point = torch.tensor(float(zero_point), device="cpu")
        if not (widths_known and can_read(zero_point)):
            return False, False
        if signed and bool(bit_width < 2):
            return not bool(zero_point.any()), False
        low, high = (f(signed, False, bit_width) for f in (min_int, max_int))
        whole = (zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)
        return not bool(zero_point.any()), bool(whole.all())


def _steps_to(q: Record, whole: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The value of integers, in the dtype of a record."""
    return ((whole - zero_point) * scale).to(q.value.dtype)


def nearest(q: Record, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The integers of a record, in a float dtype: those that are its value, in its dtype, where there are such.

    Args:
        q: with the fields ``value``, ``bit_width`` and ``signed``.
        scale: that broadcasts to the value.
        zero_point: likewise.
    """
    rounded = (upcast(q.value) / scale + zero_point).round()
    if not is_half(q.value.dtype):
        return rounded
    bits: Tensor = q.bit_width  # type: ignore[attr-defined]
    low, high = min_int(q.signed, False, bits), max_int(q.signed, False, bits)
    found = rounded
    for step in (1, -1, 0):  # half precision has fewer digits than an integer may need
        near_by = (rounded + step).clamp(low, high)
        found = torch.where(_steps_to(q, near_by, scale, zero_point) == q.value, near_by, found)
    return found


def near(q: Record, exact: Tensor, whole: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Where integers are those of a record, up to rounding errors.

    Args:
        q: the record.
        exact: ``value / scale + zero_point``.
        whole: the integers.
        scale: that broadcasts to the value.
        zero_point: likewise.
    """
    close = (exact - whole).abs() < TOLERANCE.get(q.value.dtype, 0.2)
    if is_half(q.value.dtype):
        close |= _steps_to(q, whole, scale, zero_point) == q.value
    return close


register(IntQuantTensor)
