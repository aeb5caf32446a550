"""Minifloats in a dequantized tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qframework.functional import largest_available, power_below, upcast
from qframework.quant_tensor.decaying import DecayingRecord
from qframework.quant_tensor.int_quant_tensor import TOLERANCE
from qframework.quant_tensor.record import fill, register
from qframework.quant_tensor.source import Source
from qframework.quant_tensor.validation import as_tensor, check_fields

Codes = tuple[str, ...] | None
_FLOATS = (
    "exponent_bit_width",
    "mantissa_bit_width",
    "exponent_bias",
)


class MinifloatRecord(DecayingRecord):
    """What minifloats have in common, one scale or one for each group."""

    exponent_bit_width: Tensor
    mantissa_bit_width: Tensor
    exponent_bias: Tensor
    saturating: bool
    inf_values: Codes
    nan_values: Codes

    def _unit(self, v: Tensor) -> Tensor:
        """The distance between neighbours around ``v``."""
        power = torch.maximum(power_below(v), 2.0 ** (1 - self.exponent_bias))
        return power * 2.0 ** (-self.mantissa_bit_width)

    def largest(self) -> float:
        """The largest number of the format; reads the widths."""
        reserved = (*(self.inf_values or ()), *(self.nan_values or ()))
        exponent, mantissa, bias = (int(getattr(self, n)) for n in _FLOATS)
        return largest_available(exponent, mantissa, bias, reserved)

    def __neg__(self) -> Any:
        return self.replace(value=-self.value) if self.signed else -self.value

    def __abs__(self) -> Any:
        return self.replace(value=self.value.abs())


class FloatQuantTensor(MinifloatRecord):
    """A tensor of minifloats in dequantized form: ``value = minifloat * scale``.

    Args:
        value: floating-point tensor of any shape.
        scale: positive; a number, or a tensor that broadcasts to ``value``.
        zero_point: 0; kept for the likeness with integers.
        exponent_bit_width: bits of the exponent, at least 1; a number or a 0-dim tensor.
        mantissa_bit_width: bits of the mantissa, likewise, at least 0.
        exponent_bias: likewise; the smallest normal number is ``2^(1 - bias)``.
        saturating: whether what was too large became the largest number.
        inf_values: mantissas, as bits such as ``'00'``, that mean infinity at the top exponent; None for none.
        nan_values: mantissas that mean NaN there, likewise.
        signed: whether there are negative numbers.
        training: whether it was made in training mode.
        source: where the scale comes from; equal sources in evaluation mode mean equal scales.

    Raises:
        TypeError: a field of a type that it can't be.
        ValueError: a scale that isn't positive and finite, a shape that doesn't broadcast.
    """

    tensor_names = ("value", "scale", "zero_point", *_FLOATS)
    static_names = (
        "saturating",
        "inf_values",
        "nan_values",
        "signed",
        "training",
        "source",
        "symmetric",
        "has_zero",
    )

    def __init__(
        self,
        value: Tensor,
        scale: Tensor | float,
        zero_point: Tensor | float,
        exponent_bit_width: Tensor | float,
        mantissa_bit_width: Tensor | float,
        exponent_bias: Tensor | float,
        saturating: bool,
        inf_values: Codes,
        nan_values: Codes,
        signed: bool,
        training: bool = False,
        source: Source = None,
    ) -> None:
        first = check_fields(value, scale, zero_point, 1.0, signed, training)
        widths = (exponent_bit_width, mantissa_bit_width, exponent_bias)
        tensors = (as_tensor(n, w, value) for n, w in zip(_FLOATS, widths, strict=True))
        codes = tuple(None if c is None else tuple(c) for c in (inf_values, nan_values))
        static = (bool(saturating), *codes, *first[4:], source, True, True)
        fill(self, (*first[:3], *tensors, *static))

    @property
    def _unscaled(self) -> Tensor:
        """``value / scale``, in float32 where the value is of half precision."""
        return upcast(self.value) / self.scale

    @property
    def _pre_round_float_value(self) -> Tensor:
        v = self._unscaled
        return v / self._unit(v)

    @property
    def is_valid(self) -> bool:
        """Whether ``value / scale`` are, up to rounding errors, numbers of the format. Reads all values.

        Infinities and NaN are, where the format has codes for them and doesn't saturate.
        """
        return is_minifloat(self._unscaled, self, TOLERANCE.get(self.value.dtype, 0.2))

    def minifloat(self, float_datatype: bool = True) -> Tensor:
        """``value / scale`` on the grid of the format.

        Args:
            float_datatype: as floating-point numbers; else as their codes, see :meth:`codes`.
        """
        return (
            snapped(self._unscaled, self._unit(self._unscaled)) if float_datatype else self.codes()
        )

    def int(self) -> Tensor:
        """The significands as whole numbers, ``minifloat / unit``, in a float dtype."""
        v = snapped(self._unscaled, self._unit(self._unscaled))  # which may be a power of two
        return (v / self._unit(v)).round()

    def codes(self) -> Tensor:
        """The codes: sign, exponent and mantissa from the top bit down; that of 0 has no sign.

        Returns:
            uint8 up to 8 bits, else int32; same shape.

        Raises:
            RuntimeError: the tensor isn't valid.
        """
        if not self.is_valid:
            raise RuntimeError(
                f"this {type(self).__name__} is not valid: not all of value / scale are numbers of its format"
            )
        return codes_of(self._unscaled, self)


def snapped(v: Tensor, unit: Tensor) -> Tensor:
    """``v`` on multiples of ``unit``."""
    return (v / unit).round() * unit


def is_minifloat(v: Tensor, q: MinifloatRecord, tolerance: float) -> bool:
    """Whether all of ``v`` are numbers of the format of ``q``, up to a tolerance in units."""
    with torch.no_grad():
        steps = v / q._unit(v)
        largest = q.largest() * (1 + max(1e-5, torch.finfo(q.value.dtype).eps))
        good = ((steps - steps.round()).abs() < tolerance) & (v.abs() <= largest)
        if not q.signed:
            good &= v >= 0
        if not q.saturating:
            good |= v.isinf() & bool(q.inf_values) | v.isnan() & bool(q.nan_values)
        return bool(good.all())


def codes_of(v: Tensor, q: MinifloatRecord) -> Tensor:
    """The codes of numbers of the format of ``q``."""
    exponent_bits, mantissa_bits, bias = (int(getattr(q, n)) for n in _FLOATS)
    unit: Tensor = q._unit(v)
    significand: Tensor = (v / unit).round().abs()
    power = unit * 2.0**mantissa_bits
    normal = significand >= 2**mantissa_bits
    exponent = torch.frexp(power).exponent - 1 + bias
    whole = significand.nan_to_num(0, 0, 0).long()
    code = torch.where(normal, (exponent - 1) * 2**mantissa_bits + whole, whole)
    top = (2**exponent_bits - 1) * 2**mantissa_bits
    code = torch.where(v.isinf(), top + _first(q.inf_values), code)
    code = torch.where(v.isnan(), top + _first(q.nan_values), code)
    if q.signed:
        code = code + (v < 0).long() * 2 ** (exponent_bits + mantissa_bits)
    bits = exponent_bits + mantissa_bits + int(q.signed)
    return code.to(torch.uint8 if bits <= 8 else torch.int32)


def _first(codes: Sequence[str] | None) -> int:
    return int(codes[0] or "0", 2) if codes else 0


register(FloatQuantTensor)
