"""Arithmetic on affine integers: exact scale, zero point and width of every result.

a + b: q = qa + qb, z = za + zb, on a common scale      -a: q = -qa, z = -za
a - b: q = qa - qb, z = za - zb                         a * b: q = qa * qb, z = 0, for za = zb = 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qframework.functional import ceil_ste, max_int, min_int
from qframework.quant_tensor.base import QuantTensor
from qframework.quant_tensor.registry import rule
from qframework.quant_tensor.source import product_source, require_same_scale, same_source

if TYPE_CHECKING:
    from qframework.quant_tensor.int_quant_tensor import IntQuantTensor


def _is_int(x: Any) -> bool:
    return isinstance(x, QuantTensor) and hasattr(x, "bit_width") and not hasattr(x, "group_size")


def bits_of(magnitude: Tensor) -> Tensor:
    """Bits of the unsigned integers up to ``magnitude``: ``ceil(log2(magnitude + 1))``, differentiable."""
    return ceil_ste(torch.log2(magnitude + 1))


def bits_of_range(low: Tensor, high: Tensor, signed: bool) -> Tensor:
    """Bits of the narrowest integer type that holds ``[low, high]``."""
    if not signed:
        return bits_of(high)
    return torch.maximum(bits_of(high), bits_of(-low - 1)) + 1


def _bounds(q: IntQuantTensor) -> tuple[Tensor, Tensor]:
    return min_int(q.signed, False, q.bit_width), max_int(q.signed, False, q.bit_width)


def _common_scale(a: IntQuantTensor, b: IntQuantTensor) -> tuple[Tensor, Any]:
    if same_source(a, b):
        return a.scale, a.source
    if a.training or b.training:
        return (a.scale + b.scale) / 2, None
    return a.scale, a.source


def negative(a: IntQuantTensor) -> IntQuantTensor:
    """``-a``, one bit wider: ``-(-128)`` is 128."""
    return a.set(
        value=-a.value,
        zero_point=a.zero_point if a.symmetric else -a.zero_point,
        bit_width=a.bit_width + 1,
        signed=True,
    )


def absolute(a: IntQuantTensor) -> Any:
    """``|a|``: unsigned integers of the same width, which hold ``|-128|``; a float tensor with a zero point."""
    if not a.symmetric:
        return a.value.abs()
    return a.set(value=a.value.abs(), signed=False) if a.signed else a


def _shifted(a: IntQuantTensor, other: Any) -> IntQuantTensor:
    return a.set(
        value=a.value + other,
        zero_point=a.zero_point - other / a.scale,
        symmetric=False,
        has_zero=False,
        source=a.source,
    )


def add(a: Any, b: Any) -> Any:
    """``a + b``; a float operand moves the zero point.

    Raises:
        RuntimeError: two quantized tensors on different scales, in evaluation mode.
    """
    if not _is_int(a):
        a, b = b, a
    if not _is_int(b):
        return a.value + b.value if isinstance(b, QuantTensor) else _shifted(a, b)
    require_same_scale("the sum", a, b)
    scale, source = _common_scale(a, b)
    (low_a, high_a), (low_b, high_b) = _bounds(a), _bounds(b)
    signed = a.signed or b.signed
    return a.set(
        value=a.value + b.value,
        scale=scale,
        zero_point=a.zero_point + b.zero_point,
        bit_width=bits_of_range(low_a + low_b, high_a + high_b, signed),
        signed=signed,
        training=a.training or b.training,
        source=source,
        symmetric=a.symmetric and b.symmetric,
        has_zero=a.has_zero and b.has_zero,
    )


def subtract(a: Any, b: Any) -> Any:
    """``a - b``; always signed between quantized tensors. Raises as :func:`add`.

    The width is that of ``a + (-b)``, the negative of an unsigned integer being a signed one that is a bit wider.
    """
    if not _is_int(a):
        return a.value - b.value if isinstance(a, QuantTensor) else add(negative(b), a)
    if not _is_int(b):
        return a.value - b.value if isinstance(b, QuantTensor) else _shifted(a, -b)
    require_same_scale("the difference", a, b)
    scale, source = _common_scale(a, b)
    (low_a, high_a), (low_b, high_b) = _bounds(a), _bounds(b)
    low, high = (-high_b, -low_b) if b.signed else (-high_b - 1, high_b)
    return a.set(
        value=a.value - b.value,
        scale=scale,
        zero_point=a.zero_point - b.zero_point,
        bit_width=bits_of_range(low_a + low, high_a + high, True),
        signed=True,
        training=a.training or b.training,
        source=source,
        symmetric=a.symmetric and b.symmetric,
        has_zero=a.has_zero and b.has_zero,
    )


def _require_symmetric(operation: str, a: IntQuantTensor, b: IntQuantTensor) -> None:
    if not (a.symmetric and b.symmetric):
        raise RuntimeError(
            f"{operation} of quantized tensors needs zero points that are 0, and known to be; for a result without a "
            "scale combine their values: a.value, b.value"
        )


def multiply(a: Any, b: Any) -> Any:
    """``a * b``, element by element; a float operand gives a float tensor.

    Raises:
        RuntimeError: a zero point that isn't 0.
    """
    if not (_is_int(a) and _is_int(b)):
        return _value(a) * _value(b)
    _require_symmetric("the product", a, b)
    return a.set(
        value=a.value * b.value,
        scale=a.scale * b.scale,
        bit_width=a.bit_width + b.bit_width,
        signed=a.signed or b.signed,
        training=a.training or b.training,
        source=product_source(a, b),
    )


def divide(a: Any, b: Any) -> Any:
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
    return a.set(
        value=a.value / b.value,
        scale=a.scale / (b.scale * largest),
        bit_width=a.bit_width + b.bit_width,
        signed=a.signed or b.signed,
        training=a.training or b.training,
        source=None,
    )


def _value(x: Any) -> Any:
    return x.value if isinstance(x, QuantTensor) else x


@rule("add", "__add__", "__radd__")
def _add(a: Any, b: Any, *, alpha: float = 1, out: Any = None) -> Any:
    if alpha != 1 or out is not None:
        return NotImplemented
    return add(a, b)


@rule("sub", "subtract", "__sub__")
def _sub(a: Any, b: Any, *, alpha: float = 1, out: Any = None) -> Any:
    if alpha != 1 or out is not None:
        return NotImplemented
    return subtract(a, b)


@rule("__rsub__", "rsub")
def _rsub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return NotImplemented if alpha != 1 else subtract(b, a)


@rule("mul", "multiply", "__mul__", "__rmul__")
def _mul(a: Any, b: Any, *, out: Any = None) -> Any:
    return NotImplemented if out is not None else multiply(a, b)


@rule("div", "divide", "true_divide", "__truediv__", "__div__")
def _div(a: Any, b: Any, *, rounding_mode: str | None = None, out: Any = None) -> Any:
    return NotImplemented if rounding_mode is not None or out is not None else divide(a, b)


@rule("neg", "negative", "__neg__")
def _neg(a: Any, *, out: Any = None) -> Any:
    return NotImplemented if out is not None else negative(a)


@rule("abs", "absolute", "__abs__")
def _abs(a: Any, *, out: Any = None) -> Any:
    return NotImplemented if out is not None else absolute(a)
