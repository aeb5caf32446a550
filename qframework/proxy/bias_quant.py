"""Proxies of biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.inject.explanation import Rows
from qframework.inject.resolver import Resolver
from qframework.kernels.autograd import transforms_active
from qframework.kernels.trust import modes_active
from qframework.proxy.base import QuantProxy
from qframework.proxy.naming import qualified_name
from qframework.proxy.parameter_quant import ParameterQuantProxyFromInjector
from qframework.proxy.resolution import Resolution, resolver_of
from qframework.quant_tensor import IntQuantTensor, product_source

_is_compiling = torch.compiler.is_compiling
_in_transform = torch._C._are_functorch_transforms_active


class BiasQuantProxyFromInjector(ParameterQuantProxyFromInjector):
    """Quantizes a bias, by input scale times weight scale or by a scale of its own."""

    parameter_name = "bias"
    _input_scale: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_input_scale": None}

    def _build(self, resolver: Resolver | None) -> None:
        """As the base; a layer without a bias has nothing to build, but its keywords are looked at."""
        if self.tracked_parameter_list[0] is None:
            (resolver or resolver_of(self)).check_spelling()
            self.tensor_quant = None
            self.is_signed, self.is_narrow_range, self.is_symmetric = None, None, True
            self.has_zero = True
            self.rounding_mode, self.requires_input_scale, self._rows = None, False, Rows()
            self._reads_layer = True  # a bias may be assigned later
            return
        super()._build(resolver)

    def _read_settings(self, resolution: Resolution, built: nn.Module | None) -> None:
        super()._read_settings(resolution, built)
        enabled = built is not None
        self.requires_input_scale = (
            bool(resolution.read("requires_input_scale", False)) if enabled else False
        )

    def freeze(self) -> None:
        """Quantize the biases once; one by the scale of the input where that comes in first."""
        if self.requires_input_scale:
            self._memory.frozen = True
        else:
            super().freeze()

    def forward(
        self, bias: Tensor | None, quant_input: object = None, quant_weight: object = None
    ) -> Any:
        """The quantized bias, or ``bias`` itself when quantization is off.

        Args:
            bias: shape ``(C,)``, or None.
            quant_input: the layer's input, which gives the scale where ``requires_input_scale``.
            quant_weight: the layer's quantized weight, which gives the other factor.

        Raises:
            RuntimeError: a scale is required and one of the two isn't quantized, or the input has scales of rows.
        """
        if bias is None or self.tensor_quant is None or self.disable_quant:
            return bias
        if not self.requires_input_scale:
            found = self._memory.recall(self._modules.get("tensor_quant"), bias)
            return self._quantized(bias, source=self.source) if found is None else found
        if not isinstance(quant_input, IntQuantTensor):
            raise RuntimeError(self._scale_missing("input"))
        if not isinstance(quant_weight, IntQuantTensor):
            raise RuntimeError(self._scale_missing("weight"))
        if not _is_of_channels(quant_input.scale, quant_weight.value.shape):
            raise RuntimeError(self._many_scales(quant_input.scale))
        source = product_source(quant_input, quant_weight)
        scale = quant_input.scale
        if type(scale) is Tensor and not (_is_compiling() or _in_transform()):
            self.__dict__["_input_scale"] = scale.detach()
        return self._by_product(bias, scale, quant_weight.scale, source)

    def by_last_input(self, bias: Tensor, quant_weight: object) -> Any:
        """The quantized bias by the scale of the last input.

        Args:
            bias: shape ``(C,)``.
            quant_weight: the layer's quantized weight.

        Raises:
            RuntimeError: there was no input yet, or the weight isn't quantized.
        """
        if self._input_scale is None:
            raise RuntimeError(f"{self._scale_missing('input')}. Or run the layer once before")
        if not isinstance(quant_weight, IntQuantTensor):
            raise RuntimeError(self._scale_missing("weight"))
        return self._by_product(bias, self._input_scale.to(bias.device), quant_weight.scale, None)

    def _by_product(self, bias: Tensor, first: Tensor, second: Tensor, source: object) -> Any:
        """Quantize by the product of two scales."""
        memory = self._memory
        if memory.frozen:
            found = memory.recall(self._modules.get("tensor_quant"), bias, first, second)
            if found is not None:
                return found if found.source == source else found.replace(source=source)
        scale = (first * second).reshape(-1)
        if scale.numel() == 1:
            scale = scale.reshape(())
        elif scale.numel() < bias.numel():
            # scales of positions within the groups of a transposed convolution
            scale = scale.repeat(bias.numel() // scale.numel())
        passing = _is_compiling() or modes_active() or transforms_active(first, second)
        if not memory.frozen or passing or not isinstance(bias, nn.Parameter):
            return self._quantized(bias, scale, source=source)
        with torch.inference_mode(False), torch.no_grad():
            result = self._quantized(bias, scale.clone(), source=source)
        memory.keep(self.tensor_quant, (bias, first, second), result)  # type: ignore[arg-type]
        return result

    def _scale_missing(self, what: str) -> str:
        layer: Any = self.tracked_module_list[0]
        proxy = getattr(getattr(layer, "input_weight", layer), f"{what}_quant", None)
        if isinstance(proxy, QuantProxy) and proxy.is_quant_enabled and what == "weight":
            said = f"is quantized by {proxy.quantizer.__name__}, which gives no integers times one scale"
        else:
            said = (
                "is not quantized"
                if what == "weight"
                else "isn't quantized to integers by one scale"
            )
        remedy = {
            "input": "give input_quant=Int8ActPerTensorFloat, or feed the layer a quantized tensor "
            "(return_quant_tensor=True on the layer before)",
            "weight": "give a weight_quant such as Int8WeightPerTensorFloat",
        }[what]
        return (
            f"{qualified_name(layer)}: Input scale required. {self.quantizer.__name__} quantizes the bias by input "
            f"scale times weight scale, and the {what} {said}; {remedy}, or use a bias quantizer with a scale of its "
            "own, such as Int8BiasPerTensorFloatInternalScaling, or bias_quant=None (in_proj_bias_quant=None and "
            "out_proj_bias_quant=None of a QuantMultiheadAttention)"
        )

    def _many_scales(self, scale: Tensor) -> str:
        return (
            f"{qualified_name(self.tracked_module_list[0])}: {self.quantizer.__name__} quantizes the bias by input "
            f"scale times weight scale, and the input has {scale.numel()} scales, of shape {tuple(scale.shape)}: no "
            "one of them is that of a channel's sums. Use an input quantizer with one scale, such as "
            "Int8ActPerTensorFloat or Int8DynamicActPerTensorFloat, a bias quantizer with a scale of its own, such as "
            "Int8BiasPerTensorFloatInternalScaling, or bias_quant=None"
        )

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        if self.requires_input_scale:
            raise RuntimeError(self._scale_missing("input"))
        bias = self.tracked_parameter_list[0]
        return self.tensor_quant.parameters_for(bias)  # type: ignore[operator]

    def scale(self) -> Tensor | None:
        """The present scale; None when quantization is off.

        Raises:
            RuntimeError: the scale is that of an input, which isn't here.
        """
        return self._current()[0]  # type: ignore[no-any-return]

    def zero_point(self) -> Tensor | None:
        """The present zero point; None when quantization is off. Raises as :meth:`scale`."""
        return self._current()[1]  # type: ignore[no-any-return]

    def bit_width(self) -> Tensor | None:
        """The present bit width; None when quantization is off."""
        if self.tensor_quant is None or self.disable_quant:
            return None
        return self.tensor_quant.msb_clamp_bit_width_impl()  # type: ignore[operator, no-any-return]


def _is_of_channels(scale: Tensor, weight: tuple[int, ...]) -> bool:
    """Whether an input has one scale, or one for each channel of a depthwise convolution or a product by elements.

    Args:
        scale: of the input.
        weight: shape of the weight.
    """
    if scale.numel() == 1 or len(weight) < 2:
        return True
    axis = len(weight) - 1  # of channels, from the right
    depthwise = axis > 1 and weight[1] == 1
    return depthwise and scale.dim() >= axis and scale.shape[-axis] == scale.numel()
