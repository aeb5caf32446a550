"""Arithmetic on affine integers: exact scale, zero point and width of every result.

a + b: q = qa + qb, z = za + zb, on a common scale      -a: q = -qa, z = -za
a - b: q = qa - qb, z = za - zb                         a * b: q = qa * qb, z = 0, for za = zb = 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from qframework.functional import ceil_ste, max_int, min_int
from qframework.quant_tensor.base import Operand, QuantTensor, TensorLike
from qframework.quant_tensor.record import has_field
from qframework.quant_tensor.registry import rule
from qframework.quant_tensor.source import (
    Source,
    product_source,
    require_same_scale,
    same_source,
    scale_only,
)

if TYPE_CHECKING:
    from qframework.quant_tensor.int_quant_tensor import IntQuantTensor


def _is_int(x: Operand) -> TypeGuard[IntQuantTensor]:
    return isinstance(x, QuantTensor) and has_field(x, "bit_width") and not hasattr(x, "group_size")


def in_float64(t: Tensor) -> Tensor:
    """``t`` in float64, in which ``2^b`` and its logarithm are exact for all bit widths in use.

    In float32 ``log2(2^21 + 1)`` is 21, one bit short. MPS, which has no float64, keeps float32.

    Args:
        t: floating-point, any shape.

    Returns:
        Same shape; float64, on MPS the dtype of ``t``.
    """
    return t if t.device.type == "mps" else t.double()


def bits_of_codes(codes: Tensor) -> Tensor:
    """Bits that tell ``codes`` integers apart: ``ceil(log2(codes))``, differentiable."""
    return ceil_ste(torch.log2(codes))


def bits_of_range(low: Tensor, high: Tensor, signed: bool) -> Tensor:
    """Bits of the narrowest integer type that holds ``[low, high]``."""
    if not signed:
        return bits_of_codes(high + 1)
    return bits_of_codes(torch.maximum(high + 1, -low)) + 1


class IntegerType(NamedTuple):
    """The type of integers, without them.

    Attributes:
        bit_width: in bits.
        signed: whether they are two's complement.
        has_zero: whether 0 is among them.
    """

    bit_width: Tensor
    signed: bool
    has_zero: bool


def _type_of(q: IntQuantTensor) -> IntegerType:
    return IntegerType(q.bit_width, q.signed, q.has_zero)


def bounds(q: IntQuantTensor | IntegerType) -> tuple[Tensor, Tensor]:
    """Smallest and largest integer of the type of ``q``, in float64; one signed bit is -1 or 1."""
    bits = in_float64(q.bit_width)
    high = max_int(q.signed, False, bits)
    return min_int(q.signed, False, bits), high.clamp_min(1.0) if q.signed else high


def _sum_bits(
    a: IntQuantTensor | IntegerType, b: IntQuantTensor | IntegerType, difference: bool
) -> Tensor:
    alike = a.bit_width is b.bit_width and a.signed == b.signed and (a.signed or not difference)
    if alike and a.has_zero:
        return a.bit_width + 1  # what the general case gives, for fewer operations
    (low_a, high_a), (low_b, high_b) = bounds(a), bounds(b)
    if difference:
        low_b, high_b = (-high_b, -low_b) if b.signed else (-high_b - 1, high_b)
    signed = difference or a.signed or b.signed
    bits = bits_of_range(low_a + low_b, high_a + high_b, signed)
    return bits.to(a.bit_width.dtype)


def _common_scale(a: IntQuantTensor, b: IntQuantTensor) -> tuple[Tensor, Source]:
    if (a.training or b.training) and not same_source(a, b):
        return (a.scale + b.scale) / 2, None
    return a.scale, scale_only(a.source)


def negative(a: IntQuantTensor) -> IntQuantTensor:
    """``-a``, one bit wider: ``-(-128)`` is 128."""
    return a.replace(
        value=-a.value,
        zero_point=a.zero_point if a.symmetric else -a.zero_point,
        bit_width=a.bit_width + 1,
        signed=True,
        source=scale_only(a.source),
        has_zero=a.symmetric or a.has_zero,
    )


def absolute(a: IntQuantTensor) -> TensorLike:
    """``|a|``: unsigned integers of the same width, which hold ``|-128|``; a float tensor with a zero point."""
    if not a.symmetric:
        return a.value.abs()
    if not a.signed:
        return a
    return a.replace(value=a.value.abs(), signed=False, source=scale_only(a.source), has_zero=True)


def _shifted(a: IntQuantTensor, other: Tensor | float | complex) -> TensorLike:
    if isinstance(other, complex) or (isinstance(other, Tensor) and other.is_complex()):
        return a.value + other
    return a.replace(
        value=a.value + other,
        zero_point=a.zero_point - other / a.scale,
        symmetric=False,
        has_zero=False,
        source=scale_only(a.source),
    )


def add(a: Operand, b: Operand) -> Any:
    """``a + b``; a float operand moves the zero point.

    Raises:
        RuntimeError: two quantized tensors on different scales, in evaluation mode.
    """
    q: Any = a  # the quantized one of the two, or the first
    if not _is_int(a):
        q, b = b, a
    if not _is_int(b):
        return q.value + b.value if isinstance(b, QuantTensor) else _shifted(q, b)
    require_same_scale("the sum", q, b)
    scale, source = _common_scale(q, b)
    zero_points, types = (q.zero_point, b.zero_point), (_type_of(q), _type_of(b))

    def later() -> dict[str, Tensor]:
        return {
            "zero_point": zero_points[0] + zero_points[1],
            "bit_width": _sum_bits(*types, difference=False),
        }

    return q.replace_later(
        later,
        value=q.value + b.value,
        scale=scale,
        signed=q.signed or b.signed,
        training=q.training or b.training,
        source=source,
        symmetric=q.symmetric and b.symmetric,
        has_zero=(q.symmetric and b.symmetric) or (q.has_zero and b.has_zero),
    )


def subtract(a: Operand, b: Operand) -> Any:
    """``a - b``; always signed between quantized tensors. Raises as :func:`add`.

    The width is that of ``a + (-b)``, the negative of an unsigned integer being a signed one that is a bit wider.
    """
    if not _is_int(a):
        q: Any = b  # the quantized one of the two
        return a.value - q.value if isinstance(a, QuantTensor) else add(negative(q), a)
    if not _is_int(b):
        return a.value - b.value if isinstance(b, QuantTensor) else _shifted(a, -b)
    require_same_scale("the difference", a, b)
    scale, source = _common_scale(a, b)
    return a.replace(
        value=a.value - b.value,
        scale=scale,
        zero_point=a.zero_point - b.zero_point,
        bit_width=_sum_bits(a, b, difference=True),
        signed=True,
        training=a.training or b.training,
        source=source,
        symmetric=a.symmetric and b.symmetric,
        has_zero=(a.symmetric and b.symmetric) or (a.has_zero and b.has_zero),
    )


def _require_symmetric(operation: str, a: IntQuantTensor, b: IntQuantTensor) -> None:
    if not (a.symmetric and b.symmetric):
        raise RuntimeError(
            f"{operation} of quantized tensors needs zero points that are 0, and known to be; for a result without a "
            "scale combine their values: a.value, b.value"
        )


def multiply(a: Operand, b: Operand) -> Any:
    """``a * b``, element by element; a float operand gives a float tensor.

    Raises:
        RuntimeError: a zero point that isn't 0.
    """
    if not (_is_int(a) and _is_int(b)):
        return _value(a) * _value(b)
    _require_symmetric("the product", a, b)
    return a.replace(
        value=a.value * b.value,
        scale=a.scale * b.scale,
        bit_width=a.bit_width + b.bit_width,
        signed=a.signed or b.signed,
        training=a.training or b.training,
        source=scale_only(product_source(a, b)),
        has_zero=True,
    )


def divide(a: Operand, b: Operand) -> Any:
    """``a / b``, element by element; between quantized tensors the scale is that of a fixed-point quotient.

    ``scale = sa / (sb * 2^(bits_b - signed_b))``, width ``bits_a + bits_b``; the quotient is not on that grid in
    general, so that it is rarely valid. A float operand gives a float tensor.

    Raises:
        RuntimeError: a zero point that isn't 0.
    """
    if not (_is_int(a) and _is_int(b)):
        return _value(a) / _value(b)
    _require_symmetric("the quotient", a, b)
    largest = 2.0 ** (b.bit_width - (1 if b.signed else 0))
    return a.replace(
        value=a.value / b.value,
        scale=a.scale / (b.scale * largest),
        bit_width=a.bit_width + b.bit_width,
        signed=a.signed or b.signed,
        training=a.training or b.training,
        source=None,
        has_zero=True,
    )


def _value(x: Operand) -> Tensor | float | complex:
    return x.value if isinstance(x, QuantTensor) else x


@rule("add", "__add__", "__radd__")
def _add(input: Operand, other: Operand, *, alpha: complex = 1, out: Tensor | None = None) -> Any:
    if alpha != 1 or out is not None:
        return NotImplemented
    return add(input, other)


@rule("sub", "subtract", "__sub__")
def _sub(input: Operand, other: Operand, *, alpha: complex = 1, out: Tensor | None = None) -> Any:
    if alpha != 1 or out is not None:
        return NotImplemented
    return subtract(input, other)


@rule("__rsub__", "rsub")
def _rsub(input: Operand, other: Operand, *, alpha: complex = 1) -> Any:
    return NotImplemented if alpha != 1 else subtract(other, input)


@rule("mul", "multiply", "__mul__", "__rmul__")
def _mul(input: Operand, other: Operand, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else multiply(input, other)


@rule("div", "divide", "true_divide", "__truediv__", "__div__")
def _div(
    input: Operand, other: Operand, *, rounding_mode: str | None = None, out: Tensor | None = None
) -> Any:
    return NotImplemented if rounding_mode is not None or out is not None else divide(input, other)


@rule("neg", "negative", "__neg__")
def _neg(input: IntQuantTensor, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else negative(input)


@rule("abs", "absolute", "__abs__")
def _abs(input: IntQuantTensor, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else absolute(input)
