"""The range of an integer of a given width."""

from __future__ import annotations

from torch import Tensor


def max_int(signed: bool, narrow_range: bool, bit_width: Tensor) -> Tensor:
    """Largest integer of ``bit_width`` bits.

    Unsigned ``2^b - 1`` (narrow: ``2^b - 2``), signed ``2^(b-1) - 1`` (narrow has no effect).

    Args:
        signed: two's complement or not.
        narrow_range: leave out one code, so that a signed range is symmetric.
        bit_width: float tensor of widths in bits, any shape.

    Returns:
        Float tensor of the shape of ``bit_width``; differentiable in it.
    """
    if signed:
        return (2.0 ** (bit_width - 1)) - 1
    return (2.0**bit_width) - (2 if narrow_range else 1)


def min_int(signed: bool, narrow_range: bool, bit_width: Tensor) -> Tensor:
    """Smallest integer of ``bit_width`` bits: signed ``-2^(b-1)`` (narrow: plus 1), unsigned 0.

    Args and result as for :func:`max_int`.
    """
    if signed:
        return -(2.0 ** (bit_width - 1)) + (1 if narrow_range else 0)
    return 0.0 * bit_width


def get_upper_bound_on_l1_norm(
    accumulator_bit_width: Tensor, input_bit_width: Tensor, input_is_signed: bool
) -> Tensor:
    """The largest ``sum|q|`` of weights for which no input overflows an accumulator: ``(2^(P-1) - 1) * 2^(signed - N)``.

    Args:
        accumulator_bit_width: P, sign included; float tensor.
        input_bit_width: N; float tensor.
        input_is_signed: whether inputs are two's complement integers.
    """
    room: Tensor = 2.0 ** (accumulator_bit_width - 1) - 1
    return room * 2.0 ** (float(input_is_signed) - input_bit_width)


def check_range(signed: bool, narrow_range: bool, bit_width: float) -> None:
    """Refuse a range that holds one integer or none.

    Raises:
        ValueError: for 1-bit narrow integers, which can only represent 0.
    """
    if bit_width < 1 or (bit_width < 2 and narrow_range):
        kind = "signed" if signed else "unsigned"
        raise ValueError(
            f"bit_width={bit_width:g} with signed={signed}, narrow_range={narrow_range} leaves no {kind} "
            "integer but 0; allowed: bit_width >= 2, or narrow_range=False, "
            "or quant_type='binary' for values -1 and 1"
        )
