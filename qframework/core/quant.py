"""Integer tensor quantizers; all but :class:`IntQuant` return ``(value, scale, zero_point, bit_width)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated
from qframework.core.bit_width import BitWidthConst
from qframework.core.delay import DelayWrapper
from qframework.core.function_wrapper import Identity, RoundSte, TensorClamp
from qframework.core.protocols import BitWidth, Scaling, ZeroPoint
from qframework.functional import IntegerGrid, check_range, floating, max_int, min_int, upcast

#: Integers of more bits aren't all numbers of float32.
_EXACT_BITS = 24

QuantOutput = tuple[Tensor, Tensor, Tensor, Tensor]


def _largest_float_below(power: Tensor) -> Tensor:
    """The largest number of the dtype below a power of two: where a float can't hold ``2^b - 1``."""
    return power * (1 - torch.finfo(power.dtype).eps / 2)


class IntQuant(CoreModule):
    """``q = clamp(round(x / scale + zero_point), min_int, max_int)``, ``y = (q - zero_point) * scale``.

    Bounds that the float dtype can't hold (over 24 bits in float32) are the nearest inside the range.

    Args:
        narrow_range, signed: the integer range.
        input_view_impl: shapes the input before, the identity when None.
        float_to_int_impl: the rounding rule.
        tensor_clamp_impl: the clamp, which decides on its gradient.
        quant_delay_steps: how many training calls return the input as it is.
    """

    def __init__(
        self,
        narrow_range: bool,
        signed: bool,
        input_view_impl: nn.Module | None = None,
        float_to_int_impl: nn.Module | None = None,
        tensor_clamp_impl: nn.Module | None = None,
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__()
        self.narrow_range, self.signed = narrow_range, signed
        self.input_view_impl = input_view_impl or Identity()
        self.float_to_int_impl = float_to_int_impl or RoundSte()
        self.tensor_clamp_impl = tensor_clamp_impl or TensorClamp()
        self.delay_wrapper = DelayWrapper(quant_delay_steps) if quant_delay_steps else None

    def min_int(self, bit_width: Tensor) -> Tensor:
        """Smallest integer, 0-dim float tensor."""
        return min_int(self.signed, self.narrow_range, bit_width)

    def max_int(self, bit_width: Tensor) -> Tensor:
        """Largest integer that the dtype of ``bit_width`` holds, 0-dim float tensor."""
        bound = max_int(self.signed, self.narrow_range, bit_width)
        power = 2.0 ** (bit_width - 1) if self.signed else 2.0**bit_width
        return torch.minimum(bound, _largest_float_below(power))

    def rule(
        self, stated: Stated, bits: int | None, dtype: torch.dtype | None = None
    ) -> IntegerGrid:
        """The integers of a width in bits; None for a width that isn't a number, whose bounds infinities stand for.

        Args:
            stated: gives the rules of the parts.
            bits: the width.
            dtype: of the width, for one whose bounds float32 may not hold.
        """
        if self.delay_wrapper is not None:
            raise NotStated("quantization starts after some steps")
        how = (stated(self.float_to_int_impl), stated(self.tensor_clamp_impl))
        if bits is None:
            return IntegerGrid(-math.inf, math.inf, *how)
        if bits > _EXACT_BITS and dtype is None:
            raise NotStated(f"float32 doesn't hold the bounds of {bits} bits")
        power = float(2 ** (bits - 1) if self.signed else 2**bits)
        eps = torch.finfo(dtype or torch.float32).eps
        narrow = self.narrow_range and power * eps <= 2  # where a float tells power - 1 from power
        if self.signed:
            return IntegerGrid(narrow - power, min(power - 1, power * (1 - eps / 2)), *how)
        largest = power - 1 - self.narrow_range
        return IntegerGrid(0.0, min(largest, power * (1 - eps / 2)), *how)

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The integers ``q`` of a viewed ``x``, in float32 at least, with straight-through gradients."""
        q = self.float_to_int_impl(upcast(x) / scale + zero_point)
        return self.tensor_clamp_impl(q, self.min_int(bit_width), self.max_int(bit_width))  # type: ignore[no-any-return]

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The dequantized values of ``x``.

        Args:
            scale: tensor that broadcasts to the viewed ``x``.
            zero_point: in integer steps, a tensor that broadcasts to the viewed ``x``.
            bit_width: 0-dim tensor.
            x: floating-point values.
        """
        viewed = self.input_view_impl(x)
        q = self.to_int(scale, zero_point, bit_width, viewed)
        y = ((q - zero_point) * scale).to(x.dtype)
        return y if self.delay_wrapper is None else self.delay_wrapper(viewed, y)


class DecoupledIntQuant(CoreModule):
    """Integers by one scale and zero point, values by another.

    ``q = clamp(round(x / pre_scale + pre_zero_point))``, ``y = (q - zero_point) * scale``. Arguments as for
    :class:`IntQuant`.
    """

    def __init__(
        self,
        narrow_range: bool,
        signed: bool,
        input_view_impl: nn.Module | None = None,
        float_to_int_impl: nn.Module | None = None,
        tensor_clamp_impl: nn.Module | None = None,
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__()
        self.int_quant = IntQuant(narrow_range, signed, None, float_to_int_impl, tensor_clamp_impl)
        self.input_view_impl = input_view_impl or Identity()
        self.delay_wrapper = DelayWrapper(quant_delay_steps) if quant_delay_steps else None

    def forward(
        self,
        pre_scale: Tensor,
        pre_zero_point: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bit_width: Tensor,
        x: Tensor,
    ) -> Tensor:
        """The dequantized values of ``x``.

        Args:
            pre_scale: of the integers, a tensor that broadcasts to the viewed ``x``.
            pre_zero_point: of the integers, in steps of ``pre_scale``.
            scale: of the values.
            zero_point: of the values, in steps of ``scale``.
            bit_width: 0-dim tensor.
            x: floating-point values.
        """
        viewed = self.input_view_impl(x)
        q = self.int_quant.to_int(pre_scale, pre_zero_point, bit_width, viewed)
        y = (q - zero_point) * scale
        return y if self.delay_wrapper is None else self.delay_wrapper(viewed, y)


class RescalingIntQuant(CoreModule):
    """An integer quantizer that computes its own scale, zero point and bit width.

    Args:
        int_quant: rounds and clamps.
        scaling_impl: called with ``(x, threshold)``.
        int_scaling_impl: from the bit width to the integer threshold of the scale.
        zero_point_impl: called with ``(x, scale, bit_width)``.
        bit_width_impl: called with nothing.

    Attributes:
        observer_only: return the input as it is, while statistics are collected.

    Raises:
        ValueError: a constant width whose range holds no integer but 0.
    """

    def __init__(
        self,
        int_quant: nn.Module,
        scaling_impl: Scaling,
        int_scaling_impl: nn.Module,
        zero_point_impl: ZeroPoint,
        bit_width_impl: BitWidth,
    ) -> None:
        super().__init__()
        self.int_quant = int_quant
        self.scaling_impl = scaling_impl
        self.int_scaling_impl = int_scaling_impl
        self.zero_point_impl = zero_point_impl
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.observer_only = False
        if isinstance(bit_width_impl, BitWidthConst) and isinstance(int_quant, IntQuant):
            check_range(int_quant.signed, int_quant.narrow_range, bit_width_impl.bits)

    def rule(self, stated: Stated) -> None:
        """The composition of its parts, whose rules say the rest."""

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and bit width for ``x``."""
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self.int_scaling_impl(bit_width))
        return scale, self.zero_point_impl(x, scale, bit_width), bit_width

    @property
    def depends_on_input(self) -> bool:
        """Whether scale or zero point depend on the input of the present call."""
        return any(
            getattr(part, "depends_on_input", True)
            for part in (self.scaling_impl, self.zero_point_impl)
        )

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: Tensor) -> Tensor:
        """Values of ``x`` by parameters that are known; arguments as :meth:`parameters_for` gives them."""
        if self.observer_only:
            return x
        return self.int_quant(scale, zero_point, bit_width, x)  # type: ignore[no-any-return]

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: Tensor) -> Tensor:
        """The integers of ``x`` by parameters that are known, viewed as :attr:`int_quant` does, in a float dtype."""
        return codes_by(self.int_quant, x, scale, zero_point, bit_width)

    def forward(self, x: Tensor) -> QuantOutput:
        """Values, scale, zero point and bit width of ``x``, of any shape; integers become torch's default dtype."""
        x = floating(x)
        scale, zero_point, bit_width = self.parameters_for(x)
        return self.quantize(x, scale, zero_point, bit_width), scale, zero_point, bit_width


class PrescaledRestrictIntQuant(CoreModule):
    """An integer quantizer of a bias: the scale is given, the zero point is 0.

    Args:
        int_quant: rounds and clamps.
        bit_width_impl: called with nothing.
    """

    def __init__(self, int_quant: nn.Module, bit_width_impl: BitWidth) -> None:
        super().__init__()
        self.int_quant, self.msb_clamp_bit_width_impl = int_quant, bit_width_impl

    def rule(self, stated: Stated) -> None:
        """The composition of its parts, whose rules say the rest."""

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: Tensor) -> Tensor:
        """The integers of ``x``, in a float dtype."""
        return codes_by(self.int_quant, x, scale, zero_point, bit_width)

    def forward(self, x: Tensor, scale: Tensor) -> QuantOutput:
        """Quantize ``x`` by ``scale``, which broadcasts to it."""
        x = floating(x)
        bit_width = self.msb_clamp_bit_width_impl()
        zero_point = torch.zeros((), dtype=scale.dtype, device=scale.device)
        return self.int_quant(scale, zero_point, bit_width, x), scale, zero_point, bit_width


def codes_by(
    int_quant: nn.Module, x: Tensor, scale: Tensor, zero_point: Tensor, bit_width: Tensor
) -> Tensor:
    """The integers that an integer quantizer makes of ``x``, in a float dtype.

    Args:
        int_quant: the quantizer.
        x: before it is viewed.
        scale: as its ``to_int`` takes it.
        zero_point: likewise.
        bit_width: likewise.
    """
    quantizer: Any = int_quant
    return quantizer.to_int(scale, zero_point, bit_width, quantizer.input_view_impl(floating(x)))  # type: ignore[no-any-return]
