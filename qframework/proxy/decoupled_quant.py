"""Proxies of weights whose integers and values have different scales."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qframework.proxy.naming import qualified_name
from qframework.proxy.parameter_quant import WeightQuantProxyFromInjector
from qframework.quant_tensor import IntQuantTensor


class DecoupledWeightQuantProxyFromInjector(WeightQuantProxyFromInjector):
    """Quantizes a weight by a pre-scale; the quantized tensor has the scale of its values."""

    def forward(self, x: Tensor, quant_input: object = None) -> Any:
        """The quantized weight, or ``x`` itself when quantization is off.

        Args:
            x: the weight.
            quant_input: the input of the layer, where the weights depend on its width.

        Raises:
            RuntimeError: that input isn't quantized.
        """
        if self.tensor_quant is None or self.disable_quant:
            return x
        if not self.requires_quant_input:
            return super().forward(x)
        return self._quantized(x, *self._of_input(quant_input), source=self.source)

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        return super()._wrap(output, source, parameter)

    def _of_input(self, quant_input: object) -> tuple[Any, ...]:
        return ()

    def _pre(self, quant_input: object) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None
        weight = self.tracked_parameter_list[0]
        return self.tensor_quant.pre_parameters_for(weight, *self._of_input(quant_input))  # type: ignore[operator]

    def pre_scale(self, quant_input: object = None) -> Tensor | None:
        """The present scale of the integers; None when quantization is off.

        Args:
            quant_input: the input of the layer, where the weights depend on its width.
        """
        return self._pre(quant_input)[0]  # type: ignore[no-any-return]

    def pre_zero_point(self, quant_input: object = None) -> Tensor | None:
        """The present zero point of the integers; None when quantization is off.

        Args:
            quant_input: the input of the layer, where the weights depend on its width.
        """
        return self._pre(quant_input)[1]  # type: ignore[no-any-return]


class DecoupledWeightQuantWithInputProxyFromInjector(DecoupledWeightQuantProxyFromInjector):
    """The same for weights that depend on the width and sign of the layer's input."""

    requires_quant_input = True

    def freeze(self) -> None:
        """Nothing: the weights are others for inputs of another width."""

    def _of_input(self, quant_input: object) -> tuple[Any, ...]:
        if isinstance(quant_input, IntQuantTensor):
            return quant_input.bit_width, quant_input.signed
        raise RuntimeError(
            f"{qualified_name(self.tracked_module_list[0])}.{self.attribute}: {self.quantizer.__name__} bounds the "
            "accumulator for inputs of a known width, and the input is not quantized; give "
            "input_quant=Uint8ActPerTensorFloat, or feed the layer a quantized tensor (return_quant_tensor=True on "
            "the layer before)"
        )
