"""Binary and ternary quantizers; they return ``(value, scale, zero_point, bit_width)``."""

from __future__ import annotations

from torch import Tensor, nn

from qframework.core.base import Constant, NotStated, Stated
from qframework.core.delay import DelayWrapper
from qframework.core.function_wrapper import TensorClamp
from qframework.core.quant import QuantOutput
from qframework.functional import (
    binary_sign_ste,
    floating,
    quantize_to_signs,
    ternary_sign_ste,
)


class _ScaledSign(Constant):
    has_zero = False

    def __init__(self, scaling_impl: nn.Module, bits: float, quant_delay_steps: int | None) -> None:
        super().__init__(None, None)
        self.scaling_impl, self.bits = scaling_impl, bits
        self.delay_wrapper = DelayWrapper(quant_delay_steps) if quant_delay_steps else None
        self.observer_only = False

    def _not_delayed(self) -> None:
        if self.delay_wrapper is not None:
            raise NotStated("quantization starts after some steps")

    def _output(self, x: Tensor, y: Tensor, scale: Tensor) -> QuantOutput:
        if self.observer_only:
            y = x
        elif self.delay_wrapper is not None:
            y = self.delay_wrapper(x, y)
        return y, scale, self.number(0.0), self.number(self.bits)


class BinaryQuant(_ScaledSign):
    """``y = scale`` where ``x >= 0``, else ``-scale``; NaN stays NaN; the gradient passes everywhere.

    Args:
        scaling_impl: called with ``(x,)``.
        signed: must be True.
        quant_delay_steps: how many training calls return the input as it is.

    Raises:
        ValueError: unsigned.
    """

    def __init__(
        self, scaling_impl: nn.Module, signed: bool = True, quant_delay_steps: int = 0
    ) -> None:
        if not signed:
            raise ValueError(
                "a binary quantizer has the values -scale and scale: signed must be True, got False"
            )
        super().__init__(scaling_impl, 1.0, quant_delay_steps)

    def rule(self, stated: Stated) -> bool:
        """That there is no clamp whose gradient counts."""
        self._not_delayed()
        return False

    def forward(self, x: Tensor) -> QuantOutput:
        x = floating(x)
        scale = self.scaling_impl(x)
        return self._output(x, quantize_to_signs(x, scale), scale)


class ClampedBinaryQuant(_ScaledSign):
    """:class:`BinaryQuant` behind a clamp to ``[-scale, scale]``, which decides on the gradient outside.

    Args:
        scaling_impl: called with ``(x,)``.
        tensor_clamp_impl: the clamp.
        quant_delay_steps: how many training calls return the input as it is.
        signed: must be True.

    Raises:
        ValueError: unsigned.
    """

    def __init__(
        self,
        scaling_impl: nn.Module,
        tensor_clamp_impl: nn.Module | None = None,
        quant_delay_steps: int = 0,
        signed: bool = True,
    ) -> None:
        if not signed:
            raise ValueError(
                "a binary quantizer has the values -scale and scale: signed must be True, got False"
            )
        super().__init__(scaling_impl, 1.0, quant_delay_steps)
        self.tensor_clamp_impl = tensor_clamp_impl or TensorClamp()

    def rule(self, stated: Stated) -> bool:
        """Whether the clamp is differentiated."""
        self._not_delayed()
        return bool(stated(self.tensor_clamp_impl))

    def forward(self, x: Tensor) -> QuantOutput:
        x = floating(x)
        scale = self.scaling_impl(x)
        clamped = self.tensor_clamp_impl(x, -scale, scale)
        return self._output(x, binary_sign_ste(clamped) * scale, scale)


class TernaryQuant(_ScaledSign):
    """``y = sign(x) * scale`` where ``|x| > threshold * scale``, else 0; NaN stays NaN.

    The gradient passes where ``y`` isn't 0, also far outside.

    Args:
        scaling_impl: called with ``(x,)``.
        threshold: half width of the dead zone as a fraction of the scale, 0 to 1.
        quant_delay_steps: how many training calls return the input as it is.

    Raises:
        ValueError: ``threshold`` outside 0 to 1.
    """

    has_zero = True

    def __init__(
        self, scaling_impl: nn.Module, threshold: float, quant_delay_steps: int | None = None
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a fraction of the scale, 0 to 1; got {threshold!r}")
        super().__init__(scaling_impl, 2.0, quant_delay_steps)
        self.threshold = threshold

    def forward(self, x: Tensor) -> QuantOutput:
        x = floating(x)
        scale = self.scaling_impl(x)
        mask = (~x.abs().le(self.threshold * scale)).to(x.dtype)  # NaN is outside of the dead zone
        return self._output(x, mask * ternary_sign_ste(x) * scale, scale)
