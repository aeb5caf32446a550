"""Proxies of weights and activations in minifloats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qframework.core.float_quant import FloatQuant
from qframework.proxy.base import QuantProxy
from qframework.proxy.dynamic_quant import DynamicActQuantProxyFromInjector
from qframework.proxy.parameter_quant import WeightQuantProxyFromInjector
from qframework.proxy.runtime_quant import ActQuantProxyFromInjector
from qframework.quant_tensor import FloatQuantTensor


class FloatQuantProxy(QuantProxy):
    """What the proxies of minifloats tell of their format."""

    @property
    def _float_quant(self) -> FloatQuant:
        assert isinstance(self.tensor_quant, FloatQuant)
        return self.tensor_quant

    def exponent_bit_width(self) -> Tensor | None:
        """Bits of the exponent, 0-dim; None when quantization is off."""
        return self._float_quant.widths()[0] if self.is_quant_enabled else None

    def mantissa_bit_width(self) -> Tensor | None:
        """Bits of the mantissa, 0-dim; None when quantization is off."""
        return self._float_quant.widths()[1] if self.is_quant_enabled else None

    def exponent_bias(self) -> Tensor | None:
        """The bias, 0-dim; None when quantization is off."""
        return self._float_quant.widths()[2] if self.is_quant_enabled else None

    def is_saturating(self) -> bool | None:
        """Whether numbers that are too large become the largest; None when quantization is off."""
        return self._float_quant.float_clamp_impl.saturating if self.is_quant_enabled else None

    def inf_values(self) -> tuple[str, ...] | None:
        """Mantissas that mean infinity at the top exponent; None where there are none."""
        return self._float_quant.float_clamp_impl.inf_values if self.is_quant_enabled else None

    def nan_values(self) -> tuple[str, ...] | None:
        """Mantissas that mean NaN at the top exponent; None where there are none."""
        return self._float_quant.float_clamp_impl.nan_values if self.is_quant_enabled else None

    def _format(self, values: Mapping[str, str]) -> str:
        exponent, mantissa = values["exponent_bit_width"], values["mantissa_bit_width"]
        return f"{'' if self.is_signed else 'u'}fp{values['bit_width']} e{exponent}m{mantissa}"

    def format_fields(self) -> tuple[Any, ...]:
        """Overflow, reserved codes and sign, as a quantized tensor wants them."""
        clamp = self._float_quant.float_clamp_impl
        return clamp.saturating, clamp.inf_values, clamp.nan_values, bool(self.is_signed)


class WeightFloatQuantProxyFromInjector(FloatQuantProxy, WeightQuantProxyFromInjector):
    """Quantizes a weight to a :class:`~qframework.quant_tensor.FloatQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        fields = (*self.format_fields(), self.training, source, True, True)
        return FloatQuantTensor.of_fields((*output[:6], *fields))


class ActFloatQuantProxyFromInjector(FloatQuantProxy, ActQuantProxyFromInjector):
    """Quantizes activations to a :class:`~qframework.quant_tensor.FloatQuantTensor`."""

    def _wrap(self, output: tuple[Any, ...], x: Tensor) -> Any:
        fields = (*self.format_fields(), self.training, self.source, True, True)
        return FloatQuantTensor.of_fields((*output[:6], *fields))


class DynamicActFloatQuantProxyFromInjector(FloatQuantProxy, DynamicActQuantProxyFromInjector):
    """The same by scales that each input has for itself."""

    def _wrap(self, output: tuple[Any, ...], x: Tensor) -> Any:
        fields = (*self.format_fields(), self.training, None, True, True)
        return FloatQuantTensor.of_fields((*output[:6], *fields))
