"""Rounding to floating-point formats of few bits.

With ``m`` mantissa bits and exponent bias ``B``, the numbers around ``v = x / scale`` are the multiples of
``u = 2^(max(floor(log2|v|), 1 - B) - m)``; below ``2^(1 - B)`` they are the subnormal ones.

    q = u * round(v / u);   y = clamp(q, -largest, largest) * scale
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.autograd import apply, is_fused, keep, kept
from qframework.functional.fixed_range import compute_dtype, sum_to
from qframework.functional.straight_through import (
    ROUNDINGS,
    apply_step,
    round_ste,
    tensor_clamp,
    tensor_clamp_ste,
)

#: What is left of a floating-point number without its significand, by its dtype.
_EXPONENT = {
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
        overflow: what becomes of larger numbers: ``largest`` itself, infinity or NaN.
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


def largest_minifloat(exponent_bits: Any, mantissa_bits: Any, exponent_bias: Any) -> Any:
    """The largest number of a format without reserved codes: ``(2 - 2^-m) * 2^(2^e - 1 - B)``; numbers or tensors."""
    return (2.0 - 2.0 ** (-mantissa_bits)) * 2.0 ** (2.0**exponent_bits - 1 - exponent_bias)


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
    """``2^floor(log2|x|)`` exactly, for float32 or float64; 0 for 0 and subnormal numbers, infinity for infinity, NaN."""
    integers, mask = _EXPONENT[x.dtype]
    return (x.view(integers) & mask).view(x.dtype)


def _rounded(v: Tensor, fmt: MinifloatFormat, rounding: str) -> tuple[Tensor, Tensor]:
    """``v`` on the unbounded grid, and ``2^floor(log2|v|)``."""
    power = power_below(v)
    unit = power.clamp_min(2.0 ** (1 - fmt.exponent_bias)) * 2.0**-fmt.mantissa_bits
    q = ROUNDINGS[rounding](v / unit) * unit
    return q if fmt.saturates else torch.where(v.isinf(), v, q), power


def _bounded(q: Tensor, fmt: MinifloatFormat) -> Tensor:
    bounded = q.clamp(-fmt.largest if fmt.signed else 0.0, fmt.largest)
    if fmt.saturates:
        return bounded
    if fmt.signed:
        bounded = torch.where(q < -fmt.largest, -fmt.overflow, bounded)
    return torch.where(q > fmt.largest, fmt.overflow, bounded)


class _Minifloat(Function):
    """Keeps its input alone; see :func:`minifloat_quantize`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor | None, fmt: MinifloatFormat, rounding: str, masked: bool
    ) -> Tensor:
        v = x.to(compute_dtype(x))
        v = v if scale is None else v / scale
        q = _bounded(_rounded(v, fmt, rounding)[0], fmt)
        return (q if scale is None else q * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, ctx.format, ctx.rounding, ctx.masked = inputs
        keep(ctx, x, scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = kept(ctx)
        fmt: MinifloatFormat = ctx.format
        g = grad.to(compute_dtype(x))
        v = x.to(g.dtype)
        v = v if scale is None else v / scale
        q, power = _rounded(v, fmt, ctx.rounding)
        normal = power >= 2.0 ** (1 - fmt.exponent_bias)
        inside = None
        grad_x = g * torch.where(normal, q / v, 1.0)
        if ctx.masked:
            inside = (q.abs() if fmt.signed else q) <= fmt.largest
            inside = inside if fmt.signed else inside & (q >= 0)
            grad_x = torch.where(inside, grad_x, 0.0)
        grad_scale = None
        if scale is not None and ctx.needs_input_grad[1]:
            moved = torch.where(normal, q, v)
            moved = moved if inside is None else torch.where(inside, moved, 0.0)
            grad_scale = sum_to(g * (_bounded(q, fmt) - moved), scale)
        return grad_x.to(grad.dtype), grad_scale, None, None, None


def minifloat_quantize(
    x: Tensor,
    scale: Tensor | None,
    fmt: MinifloatFormat,
    rounding: str = "round",
    masked: bool = True,
) -> Tensor:
    """The numbers of a format, times a scale, that are nearest to ``x``.

    Gradients pass straight through both roundings, that of the exponent and that of the significand, so that they
    grow and shrink with the value: a normal number gets ``y / x`` times the gradient, a subnormal one the gradient
    itself, and what is clamped none. The scale gets the rest.

    Args:
        x: floating-point tensor; half precision is computed in float32 and returned in its own dtype.
        scale: positive tensor that broadcasts to ``x``; None for 1.
        fmt: the format.
        rounding: a name of :data:`~qframework.functional.straight_through.ROUNDINGS`.
        masked: whether what is clamped gets no gradient.

    Returns:
        Tensor with the shape and dtype of ``x``. NaN stays NaN. An infinity overflows as a format without saturation
        has it, and has no nearest number, NaN, in one that saturates.
    """
    if is_fused():
        return apply(_Minifloat, x, scale, fmt, rounding, masked)  # type: ignore[no-any-return]
    return minifloat_reference(
        x,
        scale,
        fmt.mantissa_bits,
        fmt.exponent_bias,
        fmt.largest,
        fmt.signed,
        None if fmt.saturates else fmt.overflow,
        lambda v: apply_step(v, rounding),
        tensor_clamp if masked else tensor_clamp_ste,
    )


def minifloat_reference(
    x: Tensor,
    scale: Tensor | None,
    mantissa_bits: Any,
    exponent_bias: Any,
    largest: Any,
    signed: bool = True,
    overflow: float | None = None,
    rounding: Any = round_ste,
    clamp: Any = tensor_clamp,
) -> Tensor:
    """:func:`minifloat_quantize` composed of straight-through functions, differentiable by all that is a tensor.

    Args:
        x: as there.
        scale: as there.
        mantissa_bits: a number or a 0-dim tensor.
        exponent_bias: likewise.
        largest: the largest number, likewise.
        signed: whether there are negative numbers.
        overflow: what a larger magnitude becomes, None for the largest number.
        rounding: a straight-through rounding.
        clamp: the clamp, which decides on its gradient.
    """
    v = x.to(compute_dtype(x))
    v = v if scale is None else v / scale
    smallest = 2.0 ** (1 - exponent_bias)
    fixed = v.detach()
    power = _power_below_anywhere(fixed)
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
    scaled: Tensor = bounded if scale is None else bounded * scale
    return scaled.to(x.dtype)


def _power_below_anywhere(x: Tensor) -> Tensor:
    """:func:`power_below` by functions that every transform knows."""
    exponent = torch.frexp(x).exponent
    power = torch.ldexp(torch.ones_like(x), exponent - 1)
    return torch.where(x == 0, 0.0, torch.where(x.isfinite(), power, x.abs()))


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
