"""The proxy of an accumulator whose bits are reduced."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qframework.proxy.base import QuantProxy
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import IntQuantTensor


class TruncQuantProxyFromInjector(QuantProxy):
    """Reduces the bits of a quantized tensor; state-dict entries below ``trunc_quant.tensor_quant``."""

    def forward(self, x: Any) -> Any:
        """The tensor with fewer bits, or ``x`` itself when quantization is off.

        Args:
            x: :class:`~qframework.quant_tensor.IntQuantTensor` of any shape.

        Returns:
            One of the same sign, with the bits of the quantizer and a larger scale.

        Raises:
            RuntimeError: ``x`` isn't quantized.
        """
        if self.tensor_quant is None or self.disable_quant:
            return x
        if not isinstance(x, IntQuantTensor):
            raise RuntimeError(
                f"{qualified_name(self.tracked_module_list[0])}.{self.attribute}: {self.quantizer.__name__} reduces "
                f"the bits of a quantized tensor, got a {type(x).__name__}; let the layer before return one "
                "(return_quant_tensor=True)"
            )
        value, scale, zero_point, bit_width = self.tensor_quant(
            x.value, x.scale, x.zero_point, x.bit_width, x.signed
        )
        # The divisor depends on the width of x, so that one source can have several scales.
        return IntQuantTensor.unchecked(
            value,
            scale,
            zero_point,
            bit_width,
            x.signed,
            self.training,
            None,
            x.symmetric,
        )

    def bit_width(self) -> Tensor | None:
        """The bits of the output, 0-dim; None when quantization is off."""
        if self.tensor_quant is None or self.disable_quant:
            return None
        return self.tensor_quant.msb_clamp_bit_width_impl()  # type: ignore[operator, no-any-return]
