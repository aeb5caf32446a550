"""Proxies of weights and biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.following import FollowsParameters, follow
from qframework.core.tracked import TrackedParameters
from qframework.inject.explanation import Rows
from qframework.inject.resolver import Resolver
from qframework.kernels.autograd import transforms_active
from qframework.kernels.trust import modes_active
from qframework.proxy.base import QuantProxy
from qframework.proxy.codes import know_codes
from qframework.proxy.freezing import Place
from qframework.proxy.kept import is_kept, keep
from qframework.proxy.naming import qualified_name
from qframework.proxy.resolution import Resolution, resolver_of
from qframework.quant_tensor import IntQuantTensor, product_source

_is_compiling = torch.compiler.is_compiling
_in_transform = torch._C._are_functorch_transforms_active


class ParameterQuantProxyFromInjector(QuantProxy):
    """Quantizes a parameter of one or several layers."""

    parameter_name = "weight"

    @property
    def tracked_parameter_list(self) -> TrackedParameters:
        """The parameters of all layers that share this quantizer, live."""
        return TrackedParameters(self.tracked_module_list, self.parameter_name)

    def provided_names(self) -> dict[str, Any]:
        """What the layer provides: modules, parameters, shapes, dtype and device."""
        names = super().provided_names()
        parameters = self.tracked_parameter_list
        first = parameters[0]
        layer = self.tracked_module_list[0]
        names["tracked_parameter_list"] = parameters
        if first is not None:
            names.update(dtype=first.dtype, device=first.device)
            names.update(out_channels=self._out_channels(), weight_shape=tuple(first.shape))
            names["weight_ndims"] = first.dim()
        names["output_channel_dim"] = getattr(layer, "output_channel_dim", 0)
        return names

    def _out_channels(self) -> int:
        layer = self.tracked_module_list[0]
        shape = self.tracked_parameter_list[0].shape
        axis = getattr(layer, "output_channel_dim", 0)
        return int(shape[axis if axis < len(shape) else 0])

    def add_tracked_module(self, layer: nn.Module) -> None:
        """Let one more layer use this quantizer; statistics are then taken over the parameters of all.

        What was learned stays; a scale that only ever was initialised is initialised anew from all layers.

        Raises:
            ValueError: scales per channel, and another number of channels.
        """
        if any(layer is m for m in self.tracked_module_list):
            return
        first = self.tracked_module_list[0]
        if self.tensor_quant is None:
            self.tracked_module_list.append(layer)
            return
        shape = self._scale_shape()
        mine = getattr(layer, self.parameter_name)
        if shape:
            axis = next((i for i, n in enumerate(shape) if n > 1), None)
            if axis is not None and (mine.dim() != len(shape) or mine.shape[axis] != shape[axis]):
                raise ValueError(
                    f"{type(layer).__name__}.{self.attribute}: the quantizer shared from a {type(first).__name__} "
                    f"has {shape[axis]} scales, one a channel; this layer has {mine.shape[axis]} channels. "
                    "Share a per-tensor quantizer, or layers with equally many output channels."
                )
        learned = self.learned_parameters()
        self.tracked_module_list.append(layer)
        try:
            self.init_tensor_quant()
        except Exception:
            self.tracked_module_list.pop()
            raise
        self.restore_parameters(learned)

    def reinitialize(self) -> None:
        """The parameters were replaced, or loaded without this proxy's own state: start from them.

        Where neither a learned number nor a user's function depends on them, there is nothing to do.
        """
        depends = self._reads_layer or is_kept(self)
        if self.tensor_quant is not None and not depends:
            depends = any(True for _ in self.tensor_quant.parameters())
        if depends:
            self.init_tensor_quant()

    def max_uint_value(self, bit_width: Tensor) -> Tensor:
        """Largest unsigned integer of a width: ``2^b - 1``, narrow ``2^b - 2``."""
        return 2.0**bit_width - (2 if self.is_narrow_range else 1)

    def freeze(self) -> None:
        """Quantize the parameters of all layers once."""
        for parameter in self.tracked_parameter_list:
            if isinstance(parameter, nn.Parameter):
                result = self._quantized(parameter, source=self.source)
                self._memory.keep(self.tensor_quant, (parameter,), result, self._partners())  # type: ignore[arg-type]

    def _partners(self) -> list[Place]:
        """Where the parameters are that statistics are taken from, if several layers share the quantizer."""
        found: list[Place] = []
        layers = self.tracked_module_list
        for layer in layers if len(layers) > 1 else ():
            if self.parameter_name in layer._parameters:
                found.append((layer._parameters, self.parameter_name))  # type: ignore[arg-type]
                continue
            for module in layer.modules():  # it is computed, from what isn't known
                for held in (module._parameters, module._buffers):
                    found += [(held, name) for name in held]  # type: ignore[misc]
        return found

    def _quantized(self, parameter: Tensor, *scales: Tensor, source: object) -> Any:
        try:
            output = self._planned().run(parameter, *scales)
        except RuntimeError as error:
            self._resize(parameter, error)
            output = self._planned().run(parameter, *scales)
        return self._wrap(output, source, parameter)

    def _scale_shape(self) -> tuple[int, ...]:
        scaling = getattr(self.tensor_quant, "scaling_impl", None)
        return tuple(getattr(scaling, "scaling_shape", None) or ())

    def _resize(self, parameter: Tensor, error: RuntimeError) -> None:
        """Build the quantizer for a parameter of another shape, where that is why it failed and nothing is lost by it."""
        shape, now = self._scale_shape(), parameter.shape
        fits = len(shape) != len(now) or all(n in (1, m) for n, m in zip(shape, now, strict=True))
        if fits or _is_compiling():
            raise error
        learned, layers = list(self.learned_parameters()), self.tracked_module_list
        if learned or len(layers) > 1 or getattr(layers[0], self.parameter_name) is not parameter:
            what = f"holds {learned[0]}" if learned else "serves several layers"
            raise RuntimeError(
                f"{qualified_name(layers[0])}.{self.attribute}: {self.parameter_name} was given the shape {tuple(now)}, "
                f"and the quantizer has scales of shape {shape} and {what}. Assign layer.{self.parameter_name} = "
                "torch.nn.Parameter(...) in every layer that it serves, so that it starts anew, or keep the number of "
                "channels"
            ) from error
        self.init_tensor_quant()

    def _wrap(self, output: tuple[Any, ...], source: object, parameter: Tensor) -> Any:
        """The quantized tensor for what the quantizer gave for a parameter."""
        if self._is_own:
            output = self._integers(output, parameter)
        value, scale, zero_point, bit_width = output[:4]
        made = IntQuantTensor.unchecked(
            value,
            scale,
            zero_point,
            bit_width,
            bool(self.is_signed),
            self.training,
            source,
            self.is_symmetric,
            self.has_zero,
        )
        if value.dtype is torch.float32:  # as nearly always
            return made
        return know_codes(made, self.tensor_quant, parameter, output)


class WeightQuantProxyFromInjector(ParameterQuantProxyFromInjector):
    """Quantizes a weight; state-dict entries below ``weight_quant.tensor_quant``."""

    requires_quant_input = False

    def forward(self, x: Tensor) -> Any:
        """The quantized weight, or ``x`` itself when quantization is off.

        Args:
            x: the weight, of any shape; gradients flow to it.

        Returns:
            :class:`~qframework.quant_tensor.IntQuantTensor`, or ``x``.
        """
        quantizer = self._modules.get("tensor_quant")
        if quantizer is None or self.disable_quant:
            return x
        if self._memory.frozen:
            found = self._memory.recall(quantizer, x)
            if found is not None:
                return found
        return self._quantized(x, source=self.source)

    @torch.no_grad()
    def fix_scale(self) -> None:
        """Let scale and zero point stay at their present values, whatever becomes of the weight.

        A statistic of the weight is replaced by the number that it gives now, which a state dict then holds
        (``tensor_quant.scaling_impl.kept``, ``tensor_quant.zero_point_impl.kept``; a layer that was just built takes
        such a state dict too). A learned number no longer follows the weight.
        """
        if self.tensor_quant is None:
            return
        self.release()
        scale, zero_point, _ = self._current_unless_disabled()
        self.stop_following()
        numbers = {"scaling_impl": scale, "zero_point_impl": zero_point}
        parts = {slot: getattr(self.tensor_quant, slot, None) for slot in numbers}
        depending = [s for s, p in parts.items() if getattr(p, "depends_on_input", p is not None)]
        keep(self, {slot: numbers[slot] for slot in depending})

    def stop_following(self) -> None:
        """Let learned numbers that start from the weight stay as they are when it changes."""
        if self.tensor_quant is not None:
            for part in self.tensor_quant.modules():
                if isinstance(part, FollowsParameters):
                    follow(part)
                    part.follows = False

    def _current_unless_disabled(self) -> Any:
        before, self.disable_quant = self.disable_quant, False
        try:
            return self._current()
        finally:
            self.disable_quant = before

    def _current(self) -> Any:
        if self.tensor_quant is None or self.disable_quant:
            return None, None, None
        weight = self.tracked_parameter_list[0]
        try:
            return self._parameters_for(weight)
        except RuntimeError as error:
            self._resize(weight, error)
            return self._parameters_for(weight)

    def _parameters_for(self, weight: Tensor) -> Any:
        quantizer: Any = self.tensor_quant
        if hasattr(quantizer, "parameters_for"):
            return quantizer.parameters_for(weight)
        output = quantizer(weight)
        if self._is_own and len(output) == 4:
            output = self._integers(output, weight)
        return output[1:]

    def scale(self) -> Tensor | None:
        """The present scale, that broadcasts to the weight; None when quantization is off."""
        return self._current()[0]  # type: ignore[no-any-return]

    def zero_point(self) -> Tensor | None:
        """The present zero point, in integer steps; None when quantization is off."""
        return self._current()[1]  # type: ignore[no-any-return]

    def bit_width(self) -> Tensor | None:
        """The present bit width, 0-dim; None when quantization is off."""
        return self._current()[2]  # type: ignore[no-any-return]


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
        layer = self.tracked_module_list[0]
        remedy = {
            "input": "give input_quant=Int8ActPerTensorFloat, or feed the layer a quantized tensor "
            "(return_quant_tensor=True on the layer before)",
            "weight": "give a weight_quant",
        }[what]
        return (
            f"{qualified_name(layer)}: Input scale required. {self.quantizer.__name__} quantizes the bias by input "
            f"scale times weight scale, and the {what} is not quantized; {remedy}, or use a bias quantizer with a "
            "scale of its own, such as Int8BiasPerTensorFloatInternalScaling"
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
