"""The parts of a minifloat quantizer: widths, bias, largest number, clamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import Constant, CoreModule, Stated, Stateless
from qframework.core.bit_width import BitWidthConst
from qframework.core.function_wrapper import TensorClamp


class MantissaBitWidthConst(BitWidthConst):
    """A fixed width of a mantissa, which may be 0; see :class:`~qframework.core.bit_width.BitWidthConst`."""

    least = 0


class StaticExponentBias(Constant):
    """A fixed bias, an integer.

    Args:
        exponent_bias: the smallest normal number is ``2^(1 - exponent_bias)``.
        dtype: of the 0-dim tensor that ``forward()`` returns.
        device: of that tensor.

    Attributes:
        bias: the number, an int; assign another one to change it.
    """

    def __init__(
        self,
        exponent_bias: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.bias = exponent_bias

    @property
    def exponent_bias(self) -> Tensor:
        """The bias as a 0-dim tensor."""
        return self.number(float(self.bias))

    def rule(self, stated: Stated) -> int:
        """The bias."""
        return self.bias

    def forward(self) -> Tensor:
        """The bias as a 0-dim tensor."""
        return self.exponent_bias


class ComputeExponentBias(CoreModule):
    """The bias of IEEE 754 for an exponent's width, ``2^(e-1) - 1``.

    Args:
        exponent_bit_width_impl: the width, called with nothing.
    """

    def __init__(self, exponent_bit_width_impl: nn.Module) -> None:
        super().__init__()
        self.exponent_bit_width_impl = exponent_bit_width_impl

    def forward(self) -> Tensor:
        return 2.0 ** (self.exponent_bit_width_impl() - 1) - 1  # type: ignore[no-any-return]


class ComputeMaxMantissa(Stateless):
    """The largest significand of a width: ``2 - 2^-m``."""

    def rule(self, stated: Stated, mantissa_bits: int) -> float:
        """The number for a width in bits."""
        return 2.0 - 2.0**-mantissa_bits

    def forward(self, mantissa_bit_width: Tensor) -> Tensor:
        return 2.0 - 2.0 ** (-mantissa_bit_width)


StaticMaxMantissa = ComputeMaxMantissa


class FloatScaling(Stateless):
    """The threshold of a scale: the largest number of the format.

    Args:
        max_available_float: below the reserved codes; None for a format without any.
        inf_values: those that mean infinity; ``max_available_float`` is below them.
        nan_values: those that mean NaN; ``max_available_float`` is below them.
        saturating: of the format; the threshold is the same either way.
        device: ignored; the result is on the device of the widths.
        dtype: ignored; the result has the dtype of the widths.
        compute_max_mantissa: the largest significand of a width.
    """

    def __init__(
        self,
        max_available_float: float | None = None,
        inf_values: Sequence[str] | None = None,
        nan_values: Sequence[str] | None = None,
        saturating: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        compute_max_mantissa: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.max_available_float = max_available_float
        self.compute_max_mantissa = compute_max_mantissa or ComputeMaxMantissa()

    def rule(self, stated: Stated, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
        """The number for widths in bits and a bias."""
        top = stated(self.compute_max_mantissa, mantissa_bits) * 2.0 ** (
            2**exponent_bits - 1 - bias
        )
        return float(
            top if self.max_available_float is None else min(top, self.max_available_float)
        )

    def forward(
        self, exponent_bit_width: Tensor, mantissa_bit_width: Tensor, exponent_bias: Tensor
    ) -> Tensor:
        top = 2.0 ** (2.0**exponent_bit_width - 1 - exponent_bias)
        largest: Tensor = self.compute_max_mantissa(mantissa_bit_width) * top
        bound = self.max_available_float
        return largest if bound is None else largest.clamp_max(bound)


class FloatClamp(Stateless):
    """What becomes of numbers beyond the largest.

    Args:
        tensor_clamp_impl: the clamp, which decides on its gradient.
        signed: whether there are negative numbers.
        inf_values: mantissas that mean infinity at the top exponent, as bits; None for none.
        nan_values: mantissas that mean NaN at the top exponent, as bits; None for none.
        max_available_float: the largest number below those codes; None where there are none.
        saturating: clamp; otherwise larger numbers become infinity, or NaN in a format without it.
        device: ignored; the result is on the device of the numbers.
        dtype: ignored; the result has the dtype of the numbers.

    Raises:
        ValueError: no saturation in a format with neither infinity nor NaN.
    """

    def __init__(
        self,
        tensor_clamp_impl: nn.Module | None = None,
        signed: bool = True,
        inf_values: Sequence[str] | None = None,
        nan_values: Sequence[str] | None = None,
        max_available_float: float | None = None,
        saturating: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not saturating and not inf_values and not nan_values:
            raise ValueError(
                "saturating=False needs a code for what overflows, and the format has neither infinity nor NaN; give "
                "inf_values or nan_values, or saturating=True"
            )
        self.tensor_clamp_impl = tensor_clamp_impl or TensorClamp()
        self.signed, self.saturating = signed, saturating
        self.inf_values = None if inf_values is None else tuple(inf_values)
        self.nan_values = None if nan_values is None else tuple(nan_values)
        self.max_available_float = max_available_float

    def rule(self, stated: Stated) -> bool:
        """Whether the clamp is differentiated."""
        return bool(stated(self.tensor_clamp_impl))

    @property
    def overflow(self) -> float | None:
        """What a number beyond the largest becomes; None for the largest."""
        if self.saturating:
            return None
        return math.inf if self.inf_values else math.nan

    def forward(self, x: Tensor, low: Any, high: Any) -> Tensor:
        """``x`` between two bounds."""
        return self.tensor_clamp_impl(x, low, high)  # type: ignore[no-any-return]
