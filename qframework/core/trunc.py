"""From the integers of an accumulator to fewer bits: shift, round, saturate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, Stateless
from qframework.core.delay import DelayWrapper
from qframework.core.function_wrapper import TensorClamp
from qframework.functional import max_int, min_int, round_ste, upcast

TruncOutput = tuple[Tensor, Tensor, Tensor, Tensor]


class TruncMsbScaling(Stateless):
    """The divisor ``2^(input bits - output bits)``: the most significant bits stay."""

    def forward(self, q: Tensor, input_bits: Tensor, output_bits: Tensor, signed: bool) -> Tensor:
        return 2.0 ** (input_bits - output_bits)  # type: ignore[no-any-return]


class TruncPowerOfTwoIntScaling(Stateless):
    """The power of two above the output's range: signed ``2^(b-1)``, unsigned ``2^b``."""

    def forward(self, bit_width: Tensor, signed: bool) -> Tensor:
        return max_int(signed, False, bit_width) + 1


class TruncIntScaling(Stateless):
    """The largest magnitude of the output's range: signed ``2^(b-1)``, unsigned ``2^b - 1``."""

    def forward(self, bit_width: Tensor, signed: bool) -> Tensor:
        return -min_int(True, False, bit_width) if signed else max_int(False, False, bit_width)


class TruncScalingWrapper(CoreModule):
    """The divisor is a scale of the integers, from 1 to ``2^(input bits - output bits)``.

    Args:
        scaling_impl: a scale of activations, called with ``(integers, threshold)``.
        trunc_int_scaling_impl: the threshold, called with ``(output bits, signed)``.
        tensor_clamp_impl: keeps the divisor between its bounds, and decides on its gradient there.
    """

    def __init__(
        self,
        scaling_impl: nn.Module,
        trunc_int_scaling_impl: nn.Module,
        tensor_clamp_impl: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scaling_impl, self.threshold = scaling_impl, trunc_int_scaling_impl
        self.tensor_clamp_impl = tensor_clamp_impl or TensorClamp()

    def forward(self, q: Tensor, input_bits: Tensor, output_bits: Tensor, signed: bool) -> Tensor:
        scale = self.scaling_impl(q, self.threshold(output_bits, signed))
        most = 2.0 ** (input_bits - output_bits)
        return self.tensor_clamp_impl(scale, torch.ones_like(most), most.clamp_min(1.0))  # type: ignore[no-any-return]


class TruncIntQuant(CoreModule):
    """``q' = clamp(round(q / t))`` of integers ``q``; scale ``s t``, zero point ``z / t``.

    Args:
        float_to_int_impl: the rounding rule: down truncates.
        bit_width_impl: output bits, called with nothing.
        trunc_scaling_impl: the divisor t, called with ``(q, input bits, output bits, signed)``.
        narrow_range: of the output.
        tensor_clamp_impl: the clamp, which decides on its gradient.
        quant_delay_steps: how many training calls return the input as it is.
    """

    def __init__(
        self,
        float_to_int_impl: nn.Module,
        bit_width_impl: nn.Module,
        trunc_scaling_impl: nn.Module | None = None,
        narrow_range: bool = False,
        tensor_clamp_impl: nn.Module | None = None,
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__()
        self.float_to_int_impl = float_to_int_impl
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.trunc_scaling_impl = trunc_scaling_impl or TruncMsbScaling()
        self.narrow_range = narrow_range
        self.tensor_clamp_impl = tensor_clamp_impl or TensorClamp()
        self.delay_wrapper = DelayWrapper(quant_delay_steps) if quant_delay_steps else None

    def forward(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, input_bit_width: Tensor, signed: bool
    ) -> TruncOutput:
        """Values, scale, zero point and bit width of the output.

        Args:
            x: dequantized values.
            scale: of ``x``.
            zero_point: of ``x``, in integer steps.
            input_bit_width: of ``x``, 0-dim.
            signed: of ``x`` and of the output.
        """
        bits: Tensor = self.msb_clamp_bit_width_impl()
        q = round_ste(upcast(x) / scale + zero_point)
        divisor: Tensor = self.trunc_scaling_impl(q, input_bit_width, bits, signed)
        low, high = (
            min_int(signed, self.narrow_range, bits),
            max_int(signed, self.narrow_range, bits),
        )
        kept = self.tensor_clamp_impl(self.float_to_int_impl(q / divisor), low, high)
        out_scale, out_zero_point = scale * divisor, zero_point / divisor
        y: Any = ((kept - out_zero_point) * out_scale).to(x.dtype)
        y = y if self.delay_wrapper is None else self.delay_wrapper(x, y)
        return y, out_scale, out_zero_point, bits
