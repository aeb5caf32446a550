"""Rounding to floating-point formats of few bits.

With ``m`` mantissa bits and exponent bias ``B``, the numbers around ``v = x / scale`` are the multiples of
``u = 2^(max(floor(log2|v|), 1 - B) - m)``; below ``2^(1 - B)`` they are the subnormal ones.

    q = u * round(v / u);   y = clamp(q, -largest, largest) * scale
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qframework.functional.precision import upcast
from qframework.functional.registry import defined
from qframework.functional.straight_through import (
    apply_step,
    round_ste,
    tensor_clamp,
    tensor_clamp_ste,
)

#: A number, or a 0-dim tensor that is differentiated.
Number = float | Tensor

#: What is left of a floating-point number without its significand, by its dtype: integers of its size, and a mask.
EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


class MinifloatFormat(NamedTuple):
    """A format whose parameters are numbers.

    Attributes:
        mantissa_bits: of the significand, without the leading one.
        exponent_bias: ``B``; the smallest normal number is ``2^(1 - B)``.
        largest: the largest number.
        signed: whether there are negative numbers.
        overflow: what becomes of larger numbers: ``largest`` itself (0.0 says that), infinity or NaN.
    """

    mantissa_bits: int
    exponent_bias: int
    largest: float
    signed: bool = True
    overflow: float = 0.0

    @property
    def saturates(self) -> bool:
        """Whether what is too large becomes the largest number."""
        return self.overflow == 0.0


class MinifloatGrid(NamedTuple):
    """The numbers of a quantizer to minifloats.

    Attributes:
        format: of the numbers.
        rounding: of significands, a name of :data:`~qframework.functional.ROUNDINGS`.
        clamp_gradient: differentiate the clamp, so that what is clamped gets no gradient.
    """

    format: MinifloatFormat
    rounding: str = "round"
    clamp_gradient: bool = True


def largest_minifloat(exponent_bits: Any, mantissa_bits: Any, exponent_bias: Any) -> Any:
    """The largest number of a format without reserved codes: ``(2 - 2^-m) * 2^(2^e - 1 - B)``; numbers or tensors."""
    return (2.0 - 2.0 ** (-mantissa_bits)) * 2.0 ** (2.0**exponent_bits - 1 - exponent_bias)


def max_float(exponent_bit_width: Any, max_mantissa: Any, exponent_bias: Any) -> Any:
    """The largest number of a format: ``max_mantissa * 2^(2^e - 1 - B)``; numbers or tensors.

    Args:
        exponent_bit_width: e.
        max_mantissa: the largest significand, below 2.
        exponent_bias: B.
    """
    return max_mantissa * 2.0 ** (2.0**exponent_bit_width - 1 - exponent_bias)


def largest_available(
    exponent_bits: int,
    mantissa_bits: int,
    exponent_bias: int,
    reserved: Sequence[str] = (),
) -> float:
    """The largest number of a format whose top exponent has reserved codes.

    Args:
        exponent_bits: at least 1.
        mantissa_bits: at least 0.
        exponent_bias: ``B``.
        reserved: mantissas, as bits such as ``'111'``, that stand for infinity or NaN at the top exponent.

    Returns:
        The number of the code below the smallest reserved one.
    """
    if not reserved:
        return float(largest_minifloat(exponent_bits, mantissa_bits, exponent_bias))
    mantissa = min(int(bits or "0", 2) for bits in reserved) - 1
    exponent = 2**exponent_bits - 1 - exponent_bias
    if mantissa < 0:
        mantissa, exponent = 2**mantissa_bits - 1, exponent - 1
    return math.ldexp(1 + mantissa / 2**mantissa_bits, exponent)


def power_below(x: Tensor) -> Tensor:
    """``2^floor(log2|x|)`` exactly; 0 for 0, ``|x|`` for what isn't finite.

    Args:
        x: float32 or float64 tensor of any shape.
    """
    exponent = torch.frexp(x).exponent
    power = torch.ldexp(torch.ones_like(x), exponent - 1)
    return torch.where(x == 0, 0.0, torch.where(x.isfinite(), power, x.abs()))


def round_to_minifloat(
    x: Tensor,
    scale: Tensor | None,
    mantissa_bits: Number,
    exponent_bias: Number,
    largest: Number,
    signed: bool = True,
    overflow: float | None = None,
    rounding: Callable[[Tensor], Tensor] = round_ste,
    clamp: Callable[[Tensor, Tensor, Tensor], Tensor] = tensor_clamp,
) -> Tensor:
    """The numbers of a format, times a scale, that are nearest to ``x``; differentiable by all that is a tensor.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``; None for 1.
        mantissa_bits: of the significand, without the leading one.
        exponent_bias: the smallest normal number is ``2^(1 - exponent_bias)``.
        largest: the largest number.
        signed: whether there are negative numbers.
        overflow: what a larger magnitude becomes, None for the largest number.
        rounding: a straight-through rounding.
        clamp: the clamp, which decides on its gradient.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    v = upcast(x) if scale is None else upcast(x) / scale
    smallest = 2.0 ** (1 - exponent_bias)
    fixed = v.detach()
    power = power_below(fixed)
    normal = power >= smallest
    # A factor of 1 whose gradient is that of the power: floor(log2|v|) passes gradients straight through.
    follows = torch.where(normal, v / torch.where(normal, fixed, 1.0), 1.0)
    unit = torch.where(normal, power * follows, smallest) * 2.0 ** (-mantissa_bits)
    q = unit * rounding(v / unit)
    top = torch.as_tensor(largest, dtype=v.dtype, device=v.device)
    bounded: Tensor = clamp(q, -top if signed else torch.zeros_like(top), top)
    if overflow is not None:
        over = (q > top) | (fixed == math.inf)
        bounded = torch.where(over, overflow, bounded)
        if signed:
            bounded = torch.where((q < -top) | (fixed == -math.inf), -overflow, bounded)
        else:
            bounded = torch.where(fixed == -math.inf, 0.0, bounded)
    return (bounded if scale is None else bounded * scale).to(x.dtype)


@defined
def minifloat_quantize(
    x: Tensor,
    scale: Tensor | None,
    format: MinifloatFormat,
    rounding: str = "round",
    clamp_gradient: bool = True,
) -> Tensor:
    """The numbers of a format, times a scale, that are nearest to ``x``.

    Gradients pass straight through both roundings, that of the exponent and that of the significand, so that they
    grow and shrink with the value: a normal number gets ``y / x`` times the gradient, a subnormal one the gradient
    itself, and what is clamped none. The scale gets the rest.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``; None for 1.
        format: of the numbers.
        rounding: a name of :data:`~qframework.functional.straight_through.ROUNDINGS`.
        clamp_gradient: differentiate the clamp, so that what is clamped gets no gradient.

    Returns:
        Tensor with the shape and dtype of ``x``. NaN stays NaN. An infinity overflows as a format without saturation
        has it, and has no nearest number, NaN, in one that saturates.
    """
    return round_to_minifloat(
        x,
        scale,
        format.mantissa_bits,
        format.exponent_bias,
        format.largest,
        format.signed,
        None if format.saturates else format.overflow,
        lambda v: apply_step(v, rounding),
        tensor_clamp if clamp_gradient else tensor_clamp_ste,
    )


def minifloat_codes(
    exponent_bits: int, mantissa_bits: int, exponent_bias: int, signed: bool = True
) -> list[float]:
    """The number of each code, without regard to reserved ones: sign, exponent, mantissa from the top bit down."""
    codes = []
    for sign in (1.0, -1.0) if signed else (1.0,):
        for exponent in range(2**exponent_bits):
            for mantissa in range(2**mantissa_bits):
                fraction = mantissa / 2**mantissa_bits + (exponent > 0)
                codes.append(sign * math.ldexp(fraction, max(exponent, 1) - exponent_bias))
    return codes
